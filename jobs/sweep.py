"""`epd-ray sweep`, for `ray job submit --working-dir . -- python jobs/sweep.py ...`."""

from epd_ray.cli import main

main("sweep")
