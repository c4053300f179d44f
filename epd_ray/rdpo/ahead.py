"""Iterations that are drawn before it is their turn to be learned from."""

from collections.abc import Sequence

from epd_ray.actors.pipeline import Outcome, RolloutPipeline
from epd_ray.actors.tasks import rollout_task, task_id
from epd_ray.rdpo.batch import BatchPlan, propose
from epd_ray.rdpo.policy_window import PolicyWindow
from epd_ray.types import RolloutJob


class Ahead:
    """The jobs of the next iterations, proposed once each and submitted to the rollout pipeline.

    Args:
        pipeline: draws and scores the jobs.
        policies: the policies that jobs are drawn with.
        plan: what decides the requests of an iteration.
        prompts: the training prompts.
        staleness: the number of updates that the policy of a rollout may be old; so many iterations lie ahead.
        keep_images: whether the pictures come back to the driver with the rollouts.
    """

    def __init__(
        self,
        pipeline: RolloutPipeline,
        policies: PolicyWindow,
        plan: BatchPlan,
        prompts: Sequence[str],
        staleness: int,
        keep_images: bool,
    ) -> None:
        self._pipeline, self._policies, self._plan, self._prompts = pipeline, policies, plan, prompts
        self._staleness, self._keep_images = staleness, keep_images
        self._next = 0
        self.submitted: dict[int, list[RolloutJob]] = {}
        """Iterations that are submitted and not collected yet, with their jobs."""
        self.last_iteration: int | None = None
        """The number of iterations after which nothing is drawn; None while the end is not known."""

    def jobs(self, iteration: int) -> list[RolloutJob]:
        """Propose an iteration, with the newest policy that the staleness allows at the time."""
        version = max(0, iteration - self._staleness)
        parameters = self._policies.parameters(version)
        requests = propose(self._plan, self._prompts, iteration)
        reuse = self._policies.reuse
        return [RolloutJob((iteration, i), version, parameters, r, reuse) for i, r in enumerate(requests)]

    def fill(self, done: int, needed: int = -1) -> None:
        """Submit iterations up to the staleness bound.

        Args:
            done: the number of updates so far.
            needed: an iteration that is submitted although it lies behind the last one.
        """
        end = done + self._staleness
        if self.last_iteration is not None:
            end = min(end, self.last_iteration - 1)
        while self._next <= max(end, needed):
            jobs = self.submitted[self._next] = self.jobs(self._next)
            self._pipeline.submit(rollout_task(job, self._keep_images) for job in jobs)
            self._next += 1

    def collect(self, iteration: int) -> tuple[list[RolloutJob], list[Outcome]]:
        """Wait for an iteration that was submitted: its jobs, and the outcome of each."""
        jobs = self.submitted[iteration]
        outcomes = self._pipeline.collect([task_id(job) for job in jobs])
        del self.submitted[iteration]
        return jobs, outcomes

    def drop(self, done: int) -> None:
        """Forget everything that is submitted and go on after `done` updates."""
        self._pipeline.discard()
        self.submitted.clear()
        self._next = done
