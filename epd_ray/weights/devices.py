"""Torch devices and dtypes by name."""

import torch

from epd_ray.errors import ConfigError, shown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """A torch device by name; "auto" is cuda if available, else mps, else cpu.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"device {shown(name)} is not available ({reason}): use auto or cpu"]) from error


def one_thread() -> None:
    """Let torch use one CPU thread if there is no GPU; the last bits of a sum depend on the number of threads."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


def pick_dtype(name: str, device: torch.device | None = None) -> torch.dtype:
    """A torch dtype by name.

    Args:
        name: one of DTYPES, or "auto": bfloat16 where it is native, else float16 on GPUs, float32 on CPUs.
        device: the device that will compute in this dtype; None assumes native bfloat16.

    Raises:
        ConfigError: the name is unknown.
    """
    if name == "auto":
        return _fastest(device)
    if name not in DTYPES:
        raise ConfigError([f"dtype {shown(name)} is unknown: use auto, {', '.join(DTYPES)}"])
    return DTYPES[name]


def _fastest(device: torch.device | None) -> torch.dtype:
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
    """Whether the CPU multiplies bfloat16 in hardware; emulated products are slower than float32 products."""
    return bool(torch.cpu._is_avx512_bf16_supported())  # also True on CPUs with AMX
