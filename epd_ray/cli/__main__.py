"""`python -m epd_ray.cli`."""

from epd_ray.cli import main

main()
