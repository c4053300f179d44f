"""`epd-ray score`, for `ray job submit --working-dir . -- python jobs/score.py ...`."""

from epd_ray.cli import main

main("score")
