"""All random numbers of the package: one independent stream for each seed, purpose and index.

A run has one seed. If a generator were seeded with that seed and a counter alone, iteration 3 of training could get the
same noise as item 3 of the test set. The spawn key of NumPy's SeedSequence therefore also holds the stream's purpose.
No other module of the package seeds a generator.

A rollout request holds integers (`noise_seed`, `action_seed`) that were drawn here; an actor needs no other seed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, unique
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

SEED_BOUND = 2**62  # seeds are smaller, so they fit NumPy, torch and a Parquet column of signed 64-bit integers


@unique
class Purpose(IntEnum):
    """What random numbers are used for. Results depend on these values: add new ones, never change or reuse one."""

    TRAINING = 1
    """Prompts, noise seeds and action seeds of an iteration; the stream's index is the iteration."""
    STAGE_ONE = 2
    VALIDATION = 3
    TEST = 4
    POLICY_WEIGHTS = 5
    MINIBATCHES = 6
    """Order of an iteration's images in the learner update; the stream's index is the iteration."""
    SCENES = 7
    """Scenes of the embedded model, whose captions are prompts."""
    TABLE = 8
    """A solver table sampled from the policy; the stream's seed is the action seed of a request."""
    SWEEP = 9
    SWEEP_CHECK = 10
    """Sample values with which a sweep's search space is validated."""
    SEARCH_ROUNDS = 11
    """Prompts and noise seeds of a gradient-free search."""
    CMA_TABLES = 12
    RANDOM_TABLES = 13
    BLIND_PAGE = 14
    BOOTSTRAP = 15
    RENDERING = 16
    """Positions and sizes of the objects in scenes that are rendered without the model."""


def stream(purpose: Purpose, seed: int, index: int = 0) -> np.random.Generator:
    """A NumPy generator for one purpose.

    Args:
        purpose: what the random numbers are used for.
        seed: seed of the run, unless the purpose names another one; at least 0.
        index: number of the repetition, such as the iteration; 0 to 2**32 - 1.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, index)))


def request_seeds(rng: np.random.Generator, shape: int | tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Noise seeds or action seeds of the given shape, int64 in [0, 2**62), drawn from a stream."""
    return rng.integers(SEED_BOUND, size=shape)


def noise_seeds(purpose: Purpose, seed: int, count: int) -> list[int]:
    """The noise seeds of a fixed set of `count` pictures; a larger set starts with the seeds of a smaller one."""
    seeds: list[int] = request_seeds(stream(purpose, seed), count).tolist()
    return seeds


def plain_seed(purpose: Purpose, seed: int) -> int:
    """One integer in [0, 2**62), for libraries that take a seed instead of a generator."""
    return noise_seeds(purpose, seed, 1)[0]


def torch_generator(seed: int) -> "torch.Generator":
    """A torch generator on the CPU, seeded as users of diffusers seed a pipeline: equal seeds give equal noise."""
    import torch  # imported here because reports and statistics run without torch

    return torch.Generator().manual_seed(seed)


@contextmanager
def seeded_construction(seed: int) -> Iterator[None]:
    """Seed torch's global random state, from which network constructors draw, and restore it when the block ends."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
