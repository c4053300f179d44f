"""A trained solver in a diffusers pipeline: as its scheduler, or with the points of an interval evaluated at once."""
