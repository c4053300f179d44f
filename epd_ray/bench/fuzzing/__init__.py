"""Throws damaged documents at importers and servers: `python -m epd_ray.bench.fuzzing [count] [kind ...]`."""
