"""Devices and dtypes by name."""

import torch

from epd_ray.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """A torch device; "auto" takes cuda, else mps, else cpu.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError([f"device {name!r} is not available ({why}): use auto or cpu"]) from error


def pick_dtype(name: str) -> torch.dtype:
    """A floating dtype; "auto" is bfloat16, which is also the fastest on CPUs.

    Raises:
        ConfigError: unknown name.
    """
    if name == "auto":
        name = "bfloat16"
    if name not in DTYPES:
        raise ConfigError([f"dtype {name!r} is unknown: use auto, {', '.join(DTYPES)}"])
    return DTYPES[name]
