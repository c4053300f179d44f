"""A suite's work as tasks of the rollout actors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from epd_ray.actors.tasks import Task
from epd_ray.drawing.sampler import Sampler
from epd_ray.evaluation.suites.pictures import Pictures


@dataclass(frozen=True)
class Job:
    """A sampler's shard, and the task that draws and scores it."""

    sampler: str
    shard: int
    task: Task


def jobs(pictures: Pictures, samplers: Sequence[Sampler], scored: bool) -> Iterator[Job]:
    """All of them: shard by shard, the samplers taking turns, so that whatever slows the machine slows them all.

    Whoever comes first in a shard encodes its prompts: another sampler each time.

    Args:
        pictures: what is drawn.
        samplers: with distinct keys.
        scored: whether there are heads.
    """
    for shard in pictures.shards:
        turn = shard % len(samplers)
        for sampler in [*samplers[turn:], *samplers[:turn]]:
            yield Job(sampler.key, shard, _task(pictures, sampler, shard, scored))


def _task(pictures: Pictures, sampler: Sampler, shard: int, scored: bool) -> Task:
    members = pictures.shard(shard)
    prompts = tuple(pictures.prompts[pictures.prompt_of(i)] for i in members)
    seeds = tuple(pictures.seeds[i] for i in members)
    ids = tuple(f"{sampler.key}:{i}" for i in members)
    name = f"suite-{sampler.key}-{shard}"
    return Task(name, "sample", (sampler, prompts, seeds), prompts, ids, scored, keep_images=True)
