"""`epd-ray train`, for `ray job submit --working-dir . -- python jobs/train.py ...`."""

from epd_ray.cli import main

main("train")
