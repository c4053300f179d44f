"""The peak memory of a process, on the host and on its GPU."""

import resource
import sys
from dataclasses import dataclass

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss


@dataclass(frozen=True)
class Memory:
    """Peak memory of a process, in bytes.

    Attributes:
        host: peak resident set size, shared pages included.
        device: peak that torch allocated on the GPU; None if the process has not used CUDA.
        device_total: memory that the GPU has; None if the process has not used CUDA.
    """

    host: int
    device: int | None = None
    device_total: int | None = None


def peak_memory() -> Memory:
    """The peak memory of this process so far."""
    import torch

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
    if not torch.cuda.is_initialized():  # do not initialise CUDA here, because that alone takes GPU memory
        return Memory(host)
    return Memory(host, torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties().total_memory)
