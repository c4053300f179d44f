"""All random numbers of the package: one stream for each seed, purpose and index, and no two streams meet.

A run has one seed. Seeding a generator with that seed and a bare counter would give the third iteration of training the
very noise of the test set, if both happened to count to 3. A stream is therefore named by its purpose first, as the
spawn key of NumPy's SeedSequence. No other module of the package seeds a generator.

A request for a picture holds plain whole numbers (`noise_seed`, `action_seed`) that were drawn here; whoever serves it
needs no more than those.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, unique
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

SEED_BOUND = 2**62  # of the seeds in requests: they fit NumPy, torch and a Parquet column of signed integers


@unique
class Purpose(IntEnum):
    """What random numbers are for. Results follow from these values: add new ones, never change or reuse one."""

    TRAINING = 1
    """Prompts, noise seeds and action seeds of an iteration; the index is the iteration."""
    STAGE_ONE = 2
    VALIDATION = 3
    TEST = 4
    POLICY_WEIGHTS = 5
    MINIBATCHES = 6
    """Order of an iteration's images in the update; the index is the iteration."""
    SCENES = 7
    """Prompts of the embedded model's world."""
    TABLE = 8
    """A policy's table; the seed is a request's action seed."""
    SWEEP = 9
    SWEEP_CHECK = 10
    """Values that a sweep's space is checked with."""
    SEARCH_ROUNDS = 11
    """Prompts and noise seeds of a search without gradients."""
    CMA_TABLES = 12
    RANDOM_TABLES = 13
    BLIND_PAGE = 14
    BOOTSTRAP = 15
    RENDERING = 16
    """Places and sizes of the things in scenes that are drawn without the model."""


def stream(purpose: Purpose, seed: int, index: int = 0) -> np.random.Generator:
    """The numbers for a purpose.

    Args:
        purpose: what they are for.
        seed: of the run, or of what the purpose says; at least 0.
        index: 0 to 2**32 - 1; which of the purpose's repetitions.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, index)))


def request_seeds(rng: np.random.Generator, shape: int | tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Noise or action seeds, drawn from a stream."""
    return rng.integers(SEED_BOUND, size=shape)


def noise_seeds(purpose: Purpose, seed: int, count: int) -> list[int]:
    """The first `count` noise seeds of a fixed set of pictures; a larger set begins with a smaller one."""
    seeds: list[int] = request_seeds(stream(purpose, seed), count).tolist()
    return seeds


def plain_seed(purpose: Purpose, seed: int) -> int:
    """One whole number below 2**62, for libraries that take a seed of their own."""
    return noise_seeds(purpose, seed, 1)[0]


def torch_generator(seed: int) -> "torch.Generator":
    """A CPU generator for a plain seed: as diffusers' users seed a pipeline, so that they draw the same picture."""
    import torch  # here: pages and statistics do without it

    return torch.Generator().manual_seed(seed)


@contextmanager
def seeded_construction(seed: int) -> Iterator[None]:
    """Constructors of networks draw from torch's global state: it starts from `seed` inside and is restored after."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
