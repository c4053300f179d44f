"""Heads that misbehave, and a backbone whose pictures show nothing but the table; light, since actors import this."""

import os

import numpy as np
import torch

from epd_ray.backbones.simulated import SimulatedBackbone
from epd_ray.errors import MetricError


class NanHead:
    model_id = "nan"

    def score(self, images, prompts):
        scores = torch.zeros(len(prompts))
        scores[0] = float("nan")
        return scores


class LateNanHead(NanHead):
    """Sound for the first 3 batches."""

    def __init__(self):
        self.calls = 0

    def score(self, images, prompts):
        self.calls += 1
        return torch.zeros(len(prompts)) if self.calls <= 3 else super().score(images, prompts)


class LevelHead:
    """Scores by the column `level` of a row, and remembers what it was given."""

    model_id, needs = "level", ("level",)

    def __init__(self):
        self.seen = []

    def score(self, images, prompts, *, rows=None):
        self.seen.append((list(prompts), rows))
        return torch.tensor([float(row["level"]) for row in rows])


class ShortHead:
    model_id = "short"

    def score(self, images, prompts):
        return torch.zeros(len(prompts) - 1)


class FlatHead:
    """Its scores follow the prompt alone."""

    model_id = "flat"

    def score(self, images, prompts):
        return torch.tensor([len(prompt) / 100 for prompt in prompts])


class BrightHead(FlatHead):
    """Rewards brightness alone."""

    def score(self, images, prompts):
        return super().score(images, prompts) + images.mean((1, 2, 3))


class DarkHead(FlatHead):
    """What gets lost when brightness alone is rewarded."""

    def score(self, images, prompts):
        return super().score(images, prompts) - images.mean((1, 2, 3))


class TableBackbone(SimulatedBackbone):
    """dx/dsigma = sigma from x = 0, whatever the prompt: brightness is 1 + sum_i (b - a) * sum_k w_k s_k."""

    def initial(self, noise):
        return torch.zeros_like(noise)

    def drift(self, x, sigma, conditioning):
        return sigma.view(-1, 1, 1, 1).expand_as(x)

    def decode(self, x):
        return (1 + x).clamp(0, 1)


class Moody:
    """Brightness; refuses a batch in which a prompt says so, and gives NaN where one says that."""

    model_id = "moody-1"

    def score(self, images, prompts):
        if any("refuse" in prompt for prompt in prompts):
            raise ValueError("no\nmood")
        scores = images.mean(dim=(1, 2, 3))
        return torch.where(torch.tensor(["nan" in prompt for prompt in prompts]), torch.nan, scores)


class DyingHead(Moody):
    """Takes its process with it."""

    def score(self, images, prompts):
        os._exit(1)


class Colours:
    """Mean red, green and blue; counts what it looks at."""

    model_id = "colours"
    revision = "1"
    dimension = 3

    def __init__(self, fail: str = "") -> None:
        self.looked_at: list[int] = []
        if fail:
            raise RuntimeError(fail)

    def features(self, images: np.ndarray) -> np.ndarray:
        self.looked_at.append(len(images))
        if images.max(initial=0) == 0:
            raise MetricError("nothing but black")
        return images.mean(axis=(2, 3)).astype(np.float32)


def drawn(algo, sampler, prompts, seeds):
    """What sample_scored gives, and all of its pictures in the order of the prompts."""
    parts = {}
    sampled = algo.sample_scored(sampler, prompts, seeds, parts.__setitem__)
    return sampled, np.concatenate([images for _, images in sorted(parts.items())])


class Quiet:
    """An observer that counts, and that can press Ctrl-C."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.steps, self.interrupt_after = 0, interrupt_after
        self.stages: list[str] = []
        self.items: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append(name)

    def item(self, name: str) -> None:
        self.items.append(name)

    def advance(self, steps: int = 1, /, **numbers: float) -> None:
        if self.stages[-1] == "fine-tuning" and numbers:
            self.steps += steps
            if self.steps == self.interrupt_after:
                raise KeyboardInterrupt

    def note(self, text: str) -> None: ...

    def done(self) -> None: ...
