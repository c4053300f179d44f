"""`epd-ray distill`, for `ray job submit --working-dir . -- python jobs/distill.py ...`."""

from epd_ray.cli import main

main("distill")
