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


def one_thread() -> None:
    """Compute with one thread where there is no GPU: the last bits of a sum depend on how many there are."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def pick_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """A floating dtype; "auto" is bfloat16 where the device computes in it, else float16 on GPUs, float32 on CPUs.

    Args:
        name: "auto" or one of DTYPES.
        device: that it is for; bfloat16 is assumed to be native when None.

    Raises:
        ConfigError: unknown name.
    """
    if name == "auto":
        return _native(device)
    if name not in DTYPES:
        raise ConfigError([f"dtype {name!r} is unknown: use auto, {', '.join(DTYPES)}"])
    return DTYPES[name]


def _native(device: torch.device | None) -> torch.dtype:
    if device is None:
        return torch.bfloat16
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    return torch.bfloat16


def _cpu_has_bfloat16() -> bool:
    """Whether products of bfloat16 are instructions; emulated, they are slower than those of float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())  # CPUs with AMX have it too
