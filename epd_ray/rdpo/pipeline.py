"""Tasks through generation and scoring, with retries: the images of one task are scored while others are made."""

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from epd_ray.actors import RewardPool, TimedScores, unwrap
from epd_ray.errors import EpdRayError, ModelError
from epd_ray.rdpo.runner import Answer, Task
from epd_ray.types import FloatArray, ImageArray

log = logging.getLogger(__name__)

TAG = "run"
POLL_SECONDS = 0.005
RESTORE_SECONDS = 2.0
PROBE_SECONDS = 1.0  # meanwhile nothing is handed out
MAX_ATTEMPTS = 3
MAX_LOSSES = 10  # a task that takes its actors down with it must not do so for ever
LOST = (
    ray.exceptions.OwnerDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.ActorDiedError,
    ray.exceptions.ActorUnavailableError,
)


@dataclass(frozen=True)
class Outcome:
    """A finished task.

    Attributes:
        value: what the worker returned beside images.
        scores: head -> raw values [B], empty for tasks without scoring.
        images: [B, 3, H, W] uint8 when the task keeps them.
        generate_seconds: in the rollout actor.
        head_seconds: head -> in its actor.
    """

    value: Any
    scores: dict[str, FloatArray]
    images: ImageArray | None
    generate_seconds: float
    head_seconds: dict[str, float]

    @property
    def score_seconds(self) -> float:
        """In the slowest head."""
        return max(self.head_seconds.values(), default=0.0)


@dataclass
class _Pending:
    task: Task
    attempts: int = 0
    losses: int = 0
    runner: int | None = None
    answer: Answer | None = None
    scores: dict[str, "ray.ObjectRef[TimedScores]"] = field(default_factory=dict)


class RolloutPipeline:
    """Hands tasks to idle rollout actors and their images to the reward actors.

    Args:
        runners: RLlib's group of SolverEnvRunners, remote or local.
        rewards: the heads' actors.
    """

    def __init__(self, runners: EnvRunnerGroup, rewards: RewardPool) -> None:
        self._runners, self._rewards = runners, rewards
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._done: dict[str, Outcome] = {}
        self._next_restore = 0.0
        self.retries = 0

    def submit(self, tasks: Iterable[Task]) -> None:
        """Queue tasks, first come first served."""
        for task in tasks:
            self._pending[task.task_id] = _Pending(task)

    def discard(self) -> None:
        """Forget all tasks, once the actors have finished those that they are at."""
        self._pending.clear()
        self._done.clear()
        while self._runners.num_remote_env_runners() and self._runners.num_in_flight_async_reqs(TAG):
            self._runners.fetch_ready_async_reqs(tags=TAG, timeout_seconds=0.1)

    def collect(self, task_ids: Iterable[str]) -> list[Outcome]:
        """Block until these tasks are done; their outcomes in the order asked.

        Raises:
            EpdRayError: a wrong reward, a model that cannot be used, or a task whose actors die over and over.
            RuntimeError: the error of a task that failed three times, on different actors where there are several.
        """
        wanted = list(task_ids)
        while not all(i in self._done for i in wanted):
            self.poll()
        return [self._done.pop(i) for i in wanted]

    def poll(self) -> None:
        """One round: start what can be started, take in what is ready."""
        self._start()
        self._take_answers()
        self._take_scores()
        if time.monotonic() > self._next_restore:
            self._runners.probe_unhealthy_env_runners(timeout_seconds=PROBE_SECONDS)
            self._next_restore = time.monotonic() + RESTORE_SECONDS

    def _start(self) -> None:
        waiting = [p for p in self._pending.values() if p.runner is None and p.answer is None]
        if not waiting:
            return
        if self._runners.num_remote_env_runners() == 0:
            pending = waiting[0]
            pending.runner = 0
            self._on_answer(self._runners.local_env_runner.run(pending.task))
            return
        healthy = self._runners.healthy_env_runner_ids()
        busy = {p.runner for p in self._pending.values()}
        for runner in (r for r in healthy if r not in busy):
            if not waiting:
                return
            pending = waiting.pop(0)
            # One call an actor: RLlib misaligns lists of arguments when one is busy, and drops what is over its limit.
            sent = self._runners.foreach_env_runner_async(
                "run", tag=TAG, kwargs={"task": pending.task}, remote_worker_ids=[runner]
            )
            pending.runner = runner if sent else None

    def _take_answers(self) -> None:
        if not self._runners.num_remote_env_runners():
            return
        working = [p for p in self._pending.values() if p.runner is not None]
        scoring = any(p.scores for p in self._pending.values())
        if not working:
            if self._pending and not scoring:
                time.sleep(POLL_SECONDS)  # all actors are lost and on their way back
            return
        wait = 0.0 if scoring else POLL_SECONDS
        for _, answer in self._runners.fetch_ready_async_reqs(tags=TAG, timeout_seconds=wait):
            self._on_answer(answer)
        # Fetching is what finds an actor dead; look now, before it is restored and seems never to have been away.
        healthy = self._runners.healthy_env_runner_ids()
        for pending in working:
            if pending.runner is not None and pending.runner not in healthy:
                self._requeue(pending, f"rollout actor {pending.runner} was lost")

    def _on_answer(self, answer: Answer) -> None:
        pending = self._pending.get(answer.task_id)
        if pending is None or pending.answer is not None:
            return  # a late duplicate
        if answer.error is not None:
            if isinstance(answer.error, EpdRayError):
                raise answer.error
            self._requeue(pending, f"{type(answer.error).__name__}: {answer.error}", answer.error)
            return
        pending.runner, pending.answer = None, answer
        if pending.task.score:
            assert answer.images is not None
            pending.scores = self._rewards.score(answer.images, pending.task.prompts, pending.task.rollout_ids)
        else:
            self._finish(pending, {})

    def _take_scores(self) -> None:
        references = [r for p in self._pending.values() for r in p.scores.values()]
        if not references:
            return
        ready, _ = ray.wait(references, num_returns=len(references), timeout=POLL_SECONDS, fetch_local=False)
        done = set(ready)
        for pending in [p for p in self._pending.values() if p.scores and done.issuperset(p.scores.values())]:
            scores, head = {}, ""
            try:
                for head, reference in pending.scores.items():
                    scores[head] = ray.get(reference)
                self._finish(pending, scores)
            except LOST as error:
                self._rewards.replace_dead()
                self._requeue(pending, f"the scores of reward head {head!r}, or images, lost ({type(error).__name__})")
            except ray.exceptions.RayTaskError as error:
                cause = unwrap(error)
                if isinstance(cause, LOST):  # the argument was lost before the head opened it
                    self._requeue(pending, "its images were lost")
                    continue
                raise cause from None

    def _finish(self, pending: _Pending, scores: dict[str, TimedScores]) -> None:
        answer = pending.answer
        assert answer is not None
        images = ray.get(answer.images) if pending.task.keep_images and answer.images is not None else None
        self._done[pending.task.task_id] = Outcome(
            answer.value,
            {name: s.values for name, s in scores.items()},
            images,
            answer.seconds,
            {name: s.seconds for name, s in scores.items()},
        )
        del self._pending[pending.task.task_id]

    def _requeue(self, pending: _Pending, why: str, error: BaseException | None = None) -> None:
        """Back to the queue, unless its own errors or the actors lost with it are too many."""
        pending.runner, pending.answer, pending.scores = None, None, {}
        self.retries += 1
        pending.attempts += int(error is not None)
        pending.losses += int(error is None)
        times = pending.attempts + pending.losses
        if pending.attempts >= MAX_ATTEMPTS:
            raise RuntimeError(f"task {pending.task.task_id} failed {times} times, last with {why}") from error
        if pending.losses >= MAX_LOSSES:
            raise ModelError(f"task {pending.task.task_id} failed {times} times, last with {why}: out of memory?")
        log.warning("task %s runs again: %s", pending.task.task_id, why)
