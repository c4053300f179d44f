"""The work of a run's actors beside training: drawing and scoring pictures for evaluations, and stage 1."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from epd_ray.actors.pipeline import TASKS_AHEAD, Outcome, RolloutPipeline
from epd_ray.actors.tasks import Method, Task
from epd_ray.drawing.sampler import Sampler
from epd_ray.rewards.mixing import Mixer
from epd_ray.types import OnImages, Sampled


class SideWork:
    """Hands work beside training to the actors of a pipeline.

    Args:
        pipeline: the pipeline of the rollout and reward actors.
        images_per_job: the number of pictures in one task.
        heads: the names of the reward heads that score the pictures; without any, pictures are only drawn.
        mixer: combines the scores of the heads into a reward.
    """

    def __init__(self, pipeline: RolloutPipeline, images_per_job: int, heads: Sequence[str], mixer: Mixer) -> None:
        self._pipeline, self._size, self._heads, self._mixer = pipeline, images_per_job, tuple(heads), mixer
        self._calls = 0

    @property
    def images_at_once(self) -> int:
        """The largest number of pictures that are drawn, scored or sent to the driver at the same time."""
        return TASKS_AHEAD * max(1, len(self._pipeline.runners)) * self._size

    def sample_scored(
        self, sampler: Sampler, prompts: Sequence[str], noise_seeds: Sequence[int], on_images: OnImages | None
    ) -> Sampled:
        """See RDPO.sample_scored."""
        return self._sampled([(sampler, prompts, noise_seeds)], on_images)[0]

    def sample_each(self, drawings: Sequence[tuple[Sampler, Sequence[str], Sequence[int]]]) -> list[Sampled]:
        """See RDPO.sample_each."""
        return self._sampled(drawings, None)

    def _sampled(
        self, drawings: Sequence[tuple[Sampler, Sequence[str], Sequence[int]]], on_images: OnImages | None
    ) -> list[Sampled]:
        self._calls += 1
        places = {
            f"sample-{self._calls}-{number}-{first}": (number, first)
            for number, (_, prompts, _) in enumerate(drawings)
            for first in range(0, len(prompts), self._size)
        }

        def task(name: str, number: int, first: int) -> Task:
            sampler, prompts, noise_seeds = drawings[number]
            end = min(first + self._size, len(prompts))
            part, seeds = tuple(prompts[first:end]), tuple(noise_seeds[first:end])
            ids = tuple(f"{sampler.key}:{j}" for j in range(first, end))
            asked = (sampler.rows(first, end), part, seeds)
            return Task(name, "sample", asked, part, ids, bool(self._heads), on_images is not None)

        found: dict[tuple[int, int], Outcome] = {}
        for done, outcome in self._pipeline.stream(task(name, *place) for name, place in places.items()):
            place = places[done.task_id]
            if on_images is not None:
                assert outcome.images is not None
                on_images(place[1], outcome.images)
            found[place] = replace(outcome, images=None)
        return [
            self._joined([found[place] for place in places.values() if place[0] == number], prompts)
            for number, (_, prompts, _) in enumerate(drawings)
        ]

    def _joined(self, parts: Sequence[Outcome], prompts: Sequence[str]) -> Sampled:
        scores = {head: np.concatenate([part.scores[head] for part in parts]) for head in self._heads}
        reward = self._mixer.held_out(scores, prompts) if scores else np.full(len(prompts), np.nan, np.float32)
        return Sampled(scores, reward, sum(part.generate_seconds for part in parts))

    def work(self, method: Method, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See RDPO.work."""
        self._calls += 1
        tasks = [Task(f"{method}-{self._calls}-{i}", method, given) for i, given in enumerate(arguments)]
        return [outcome.value for outcome in self.run(tasks)]

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Do a few tasks, and return their outcomes in the same order."""
        self._pipeline.submit(tasks)
        return self._pipeline.collect([task.task_id for task in tasks])
