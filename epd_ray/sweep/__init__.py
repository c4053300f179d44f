"""Sweeps: many runs with other values of some keys, as trials on Ray Tune, and the best solver among them."""
