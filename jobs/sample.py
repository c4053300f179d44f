"""`epd-ray sample`, for `ray job submit --working-dir . -- python jobs/sample.py ...`."""

from epd_ray.cli import main

main("sample")
