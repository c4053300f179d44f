"""What memory a process has taken at most, on the host and on its GPU."""

import resource
import sys
from dataclasses import dataclass

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes.

    Attributes:
        host: resident set of the process, shared pages included.
        device: allocated by torch on CUDA; None where it is not used.
        device_total: what the GPU has; None where it is not used.
    """

    host: int
    device: int | None = None
    device_total: int | None = None


def peak_memory() -> Memory:
    """Of this process so far."""
    import torch

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
    if not torch.cuda.is_initialized():  # nor is it here: that would take memory of its own
        return Memory(host)
    return Memory(host, torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties().total_memory)
