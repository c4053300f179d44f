"""Scripts for interpreters of other environments: they build the published packages' networks and let them score."""
