"""`epd-ray evaluate`, for `ray job submit --working-dir . -- python jobs/evaluate.py ...`."""

from epd_ray.cli import main

main("evaluate")
