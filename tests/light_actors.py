"""Actors of tests that import next to nothing, since each process of one would import it anew."""

import os
import time

from epd_ray.errors import ModelError


class Worker:
    """Sleeps and answers; a late one cannot load."""

    def __init__(self, number: int, refuse: bool = False) -> None:
        self.number, self.refuse = number, refuse

    def ready(self) -> None:
        if self.refuse:
            raise ModelError("no weights on this node")

    def work(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.number

    def pid(self) -> int:
        return os.getpid()
