"""The reference's trained tables as solver files: the names that `Solver.from_pretrained` knows."""

from pathlib import Path

NAMES = (
    "flux-rl",
    "sd15-distilled",
    "sd15-rl",
    "sd3-1024-distilled",
    "sd3-1024-rl",
    "sd3-512-distilled",
    "sd3-512-rl",
)

PRESETS = {name: Path(__file__).parent / f"{name}.json" for name in NAMES}
