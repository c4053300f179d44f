"""What dies or breaks its GPU in an actor; light, since every process of it imports this."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from epd_ray.backbones.simulated import SimulatedBackbone
from epd_ray.errors import ModelError
from epd_ray.rewards.simulated import SimulatedHead

HANGS = 600.0  # seconds, longer than any test


class Dying(SimulatedHead):
    """A head that takes its process with it, where `when` says so; "once" leaves a file behind, "never" never loads."""

    def __init__(self, *, when: str, file: str = "") -> None:
        super().__init__()
        self.when = when
        if when == "never":
            time.sleep(HANGS)
        if when == "build" or (when == "once" and not Path(file).exists()):
            Path(file or os.devnull).touch()
            os._exit(1)

    def score(self, images, prompts):  # type: ignore[no-untyped-def]
        if self.when == "score":
            os._exit(1)
        return super().score(images, prompts)


class DyingEncoders:
    """In place of a backbone."""

    def embeddings(self, prompts):  # type: ignore[no-untyped-def]
        os._exit(1)


def dying_encoders(*, parts: str, device: str, offload: str) -> DyingEncoders:
    return DyingEncoders()


class HangingEncoders:
    """In place of a backbone."""

    def embeddings(self, prompts):  # type: ignore[no-untyped-def]
        time.sleep(HANGS)


def hanging_encoders(*, parts: str, device: str, offload: str) -> HangingEncoders:
    return HangingEncoders()


class HangingExtractor:
    """Describes itself and computes nothing."""

    model_id, revision, dimension = "hanging", "1", 1

    def features(self, images):  # type: ignore[no-untyped-def]
        time.sleep(HANGS)


def break_gpu(file: str, times: int) -> None:
    """Fail the first few times as CUDA does, after which a process is of no use; the file tells in which it was."""
    with Path(file).open("a") as processes:
        processes.write(f"{os.getpid()}\n")
    if len(Path(file).read_text().split()) <= times:
        raise torch.AcceleratorError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")


class BreakingHead(SimulatedHead):
    """A head on a GPU that breaks."""

    def __init__(self, *, file: str, times: int) -> None:
        super().__init__()
        self.broken = file, times

    def score(self, images, prompts):  # type: ignore[no-untyped-def]
        break_gpu(*self.broken)
        return super().score(images, prompts)


class BreakingBackbone(SimulatedBackbone):
    """A model on a GPU that breaks."""

    def __init__(self, *, file: str, times: int) -> None:
        super().__init__()
        self.broken = file, times

    def decode(self, x):  # type: ignore[no-untyped-def]
        break_gpu(*self.broken)
        return super().decode(x)


class BreakingEncoders:
    """In place of a backbone."""

    def __init__(self, *, file: str, times: int, parts: str, device: str, offload: str) -> None:
        self.broken = file, times

    def embeddings(self, prompts):  # type: ignore[no-untyped-def]
        break_gpu(*self.broken)
        return [(torch.ones(1),)]


class BreakingExtractor:
    """A feature extractor."""

    model_id, revision, dimension = "breaking", "1", 1

    def __init__(self, *, file: str, times: int) -> None:
        self.broken = file, times

    def features(self, images):  # type: ignore[no-untyped-def]
        break_gpu(*self.broken)
        return np.ones((len(images), 1), np.float32)


class Broken:
    """A head that fails as its options say."""

    model_id = "broken"

    def __init__(self, *, how: str, mark: str = "") -> None:
        self.how, self.mark = how, Path(mark)
        if how == "build":
            raise ModelError("weights\nare missing")

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if self.how == "raise":
            raise RuntimeError("out of\nmemory")
        if self.how == "die once" and not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        while self.how == "wait" and not self.mark.exists():
            time.sleep(0.02)
        return torch.full((len(images) + (self.how == "count"),), float("nan") if self.how == "nan" else 1.0)
