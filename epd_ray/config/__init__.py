"""The configuration of a run: its sections and keys, how they are read from YAML and overrides, and what is wrong."""
