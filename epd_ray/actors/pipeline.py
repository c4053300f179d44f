"""The way of tasks through generation and scoring, with retries. The images of one task are scored while the next ones
are drawn."""

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle

from epd_ray.actors.cluster import BrokenGpuError
from epd_ray.actors.pool import Call, Ended, Pool
from epd_ray.actors.reward_pool import RewardPool, TimedScores, unwrap
from epd_ray.actors.tasks import Answer, Task
from epd_ray.actors.waiting import Silence
from epd_ray.errors import EpdRayError, ModelError, TaskError
from epd_ray.telemetry.memory import Memory
from epd_ray.types import FloatArray, ImageArray

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.25  # to wait for an answer before the pools check their actors
TASKS_AHEAD = 3  # of a stream, per rollout actor: enough that none waits, and few enough for the object store
MAX_ATTEMPTS = 3
MAX_LOSSES = 10  # a task that kills its actors must not do so for ever
LOST_IMAGES = ray.exceptions.ObjectLostError  # also raised where the owner of the images died


class LocalRunner(Protocol):
    """Does tasks in the driver, where there are no rollout actors."""

    def run(self, task: Task) -> Answer: ...


@dataclass(frozen=True)
class Outcome:
    """A finished task.

    Attributes:
        value: what the method of the worker returned beside images.
        scores: the name of each head -> its raw scores, [B]; empty for tasks without scoring.
        images: [B, 3, H, W], uint8; None unless the task keeps its images.
        generate_seconds: the seconds of the task in the rollout actor.
        head_seconds: the name of each head -> the seconds that it took to score.
    """

    value: Any
    scores: dict[str, FloatArray]
    images: ImageArray | None
    generate_seconds: float
    head_seconds: dict[str, float]

    @property
    def score_seconds(self) -> float:
        """The seconds of the slowest head."""
        return max(self.head_seconds.values(), default=0.0)


@dataclass
class _Pending:
    task: Task
    call: Call
    attempts: int = 0
    losses: int = 0
    lost_at: float | None = None
    answer: Answer | None = None
    maker: int | None = None
    scoring: dict[str, Call] = field(default_factory=dict)
    scores: dict[str, TimedScores] = field(default_factory=dict)


class RolloutPipeline:
    """Hands tasks to free rollout actors and their images to the reward actors.

    Args:
        runners: the pool of rollout actors, which have the methods of TaskRunner.
        rewards: the pools of the reward heads.
        local: does the tasks in the driver where there are no rollout actors; else None.
    """

    def __init__(self, runners: Pool, rewards: RewardPool, local: LocalRunner | None = None) -> None:
        self._runners, self._local = runners, local
        runners.holds = self._holds
        self._rewards = rewards.pools
        self._heads = rewards
        self._pending: OrderedDict[str, _Pending] = OrderedDict()
        self._done: dict[str, Outcome] = {}
        self._breaks: Counter[str] = Counter()
        self._costs: Counter[str] = Counter()
        self._next_tick = 0.0
        self._silent, self._silence = 0.0, Silence()
        self.retries = self.recoveries = 0
        self._recover_seconds = self._for_rollouts = self._for_rewards = self._for_validation = 0.0
        self.memory: dict[str, Memory] = {}
        """"rollout" or "reward <head>" -> the peak memory of the actor of this kind that answered last."""

    def submit(self, tasks: Iterable[Task]) -> None:
        """Add tasks to the end of the queue."""
        for task in tasks:
            call = Call(task.task_id, _runs(task))
            self._pending[task.task_id] = _Pending(task, call)
            self._hand_out(call)

    def _hand_out(self, call: Call) -> None:
        if self._local is None:
            self._runners.submit(call)

    def discard(self) -> None:
        """Drop all tasks. Actors finish the calls that they have begun, but the answers are ignored."""
        self._pending.clear()
        self._done.clear()
        for pool in (self._runners, *self._rewards.values()):
            pool.forget()

    @property
    def runners(self) -> list[ActorHandle[Any]]:
        """The handles of all rollout actors."""
        return self._runners.actors

    def stop(self) -> None:
        """End all rollout actors at once, also those that still wait for room."""
        self._runners.stop()

    def collect(self, task_ids: Iterable[str]) -> list[Outcome]:
        """Block until some tasks are done.

        Args:
            task_ids: the ids of submitted tasks.

        Returns:
            The outcomes, in the order of `task_ids`.

        Raises:
            EpdRayError: a reward is not valid, a model cannot be used, or the actors of a task died MAX_LOSSES times.
            TaskError: a task failed MAX_ATTEMPTS times, on different actors where there are several, or the processes
                of an actor had that many CUDA errors in a row. The cause is the last error.
        """
        wanted = list(task_ids)
        while missing := [i for i in wanted if i not in self._done]:
            begin = time.perf_counter()
            making = any(self._pending[i].answer is None for i in missing)
            self.poll(0.0 if self._run_here() else WAIT_SECONDS)
            if making:
                self._for_rollouts += time.perf_counter() - begin
            else:
                self._for_rewards += time.perf_counter() - begin
        return [self._done.pop(i) for i in wanted]

    def stream(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Do any number of tasks, TASKS_AHEAD per rollout actor at a time.

        Args:
            tasks: the tasks, which are taken from the iterable when there is room for them.

        Yields:
            Each task with its outcome as soon as it is done, in any order.

        Raises:
            EpdRayError: see `collect`.
        """
        source, waiting = iter(tasks), dict[str, Task]()
        while True:
            room = TASKS_AHEAD * max(1, len(self.runners)) - len(waiting)
            more = list(islice(source, max(0, room)))
            self.submit(more)
            waiting |= {task.task_id: task for task in more}
            if not waiting:
                return
            begin = time.perf_counter()
            self.poll(0.0 if self._run_here() else WAIT_SECONDS)
            self._for_validation += time.perf_counter() - begin
            for task_id in [i for i in waiting if i in self._done]:
                yield waiting.pop(task_id), self._done.pop(task_id)

    def _run_here(self) -> bool:
        """Do one task in the driver, where there are no rollout actors. Returns whether there was a task to do."""
        waiting = next((p for p in self._pending.values() if p.answer is None), None)
        if self._local is None or waiting is None:
            return False
        self._on_answer(Ended(waiting.call, 0, self._local.run(waiting.task)))
        return True

    def _holds(self, number: int) -> bool:
        """Whether images of a rollout actor are not scored yet: they would be lost if the actor ended."""
        return any(p.maker == number and p.answer is not None for p in self._pending.values())

    def poll(self, wait: float) -> None:
        """Handle the answers that are ready, and hand out waiting tasks.

        Args:
            wait: the largest number of seconds to wait for the first answer.
        """
        pools = [self._runners, *self._rewards.values()]
        begin, answers = time.monotonic(), 0
        references = [reference for pool in pools for reference in pool.references()]
        if references:
            ray.wait(references, timeout=wait)
            ready = set(ray.wait(references, num_returns=len(references), timeout=0)[0])
            for ended in self._runners.take(ready):
                self._on_answer(ended)
                answers += not ended.lost
            for head, pool in self._rewards.items():
                for ended in pool.take(ready):
                    self._on_score(head, ended)
                    answers += not ended.lost
        elif self._local is None:
            time.sleep(min(wait, 0.05))  # all actors are lost and restart
        if time.monotonic() > self._next_tick:
            self._next_tick = time.monotonic() + WAIT_SECONDS
            for pool in pools:
                pool.tick()
        self._silent = 0.0 if answers else self._silent + time.monotonic() - begin
        self._silence.count(self._silent, lambda: "; ".join(said for pool in pools if (said := pool.busy())))

    def _on_answer(self, ended: Ended) -> None:
        pending = self._pending.get(ended.call.key)
        if pending is None or pending.call is not ended.call:
            return  # the task was discarded
        if ended.lost:
            self._requeue(pending, f"rollout actor {ended.number} {ended.how_lost}", late=ended.late)
            return
        answer: Answer = ended.value
        error = ended.error or answer.error
        if error is not None:
            if isinstance(error, BrokenGpuError) and self._local is None:
                self._count_break(f"rollout actor {ended.number}", error)
            elif isinstance(error, EpdRayError):
                raise error
            ended.call.avoid.add(ended.number)
            self._requeue(pending, " ".join(f"{type(error).__name__}: {error}".split()), error)
            return
        self._breaks.pop(f"rollout actor {ended.number}", None)
        pending.answer, pending.maker = answer, ended.number
        if answer.memory is not None:
            self.memory["rollout"] = answer.memory
        if pending.task.score:
            self._begin_scoring(pending, answer.images)
        else:
            self._finish(pending)

    def _begin_scoring(self, pending: _Pending, images: "ray.ObjectRef[Any] | None") -> None:
        """Score with the heads in the driver, then hand the images to the reward actors."""
        assert images is not None
        task = pending.task
        try:
            pending.scores = self._heads.score_here(images, task.prompts, task.rollout_ids)
        except LOST_IMAGES:
            self._requeue(pending, "the images for the heads in the driver were lost")
            return
        self.memory |= {f"reward {head}": found.memory for head, found in pending.scores.items()}
        for head, found in pending.scores.items():
            self._count_costs(head, found)
        pending.scoring = self._heads.score(task.task_id, images, task.prompts, task.rollout_ids)
        self._finish_scored(pending)

    def _finish_scored(self, pending: _Pending) -> None:
        if len(pending.scores) == len(self._heads.specs):
            self._finish(pending)

    def _on_score(self, head: str, ended: Ended) -> None:
        pending = self._pending.get(ended.call.key)
        if pending is None or pending.scoring.get(head) is not ended.call:
            return
        if ended.lost:
            what = f"actor {ended.number} of reward head {head!r}"
            self._lose(pending, f"{what} {ended.how_lost} over its scores", ended.late)
            ended.call.avoid.add(ended.number)
            self._rewards[head].submit(ended.call)  # the images are still there
        elif ended.error is not None:
            cause = unwrap(ended.error) if isinstance(ended.error, ray.exceptions.RayTaskError) else ended.error
            if isinstance(cause, BrokenGpuError):
                self._count_break(f"actor {ended.number} of reward head {head!r}", cause)
                self._rescore(pending, head, ended, cause)
            elif isinstance(cause, LOST_IMAGES):
                self._requeue(pending, f"the images for reward head {head!r} were lost")
            else:
                raise cause from None
        else:
            self._breaks.pop(f"actor {ended.number} of reward head {head!r}", None)
            pending.scores[head] = ended.value
            self.memory[f"reward {head}"] = ended.value.memory
            self._count_costs(head, ended.value)
            self._finish_scored(pending)

    def _count_costs(self, head: str, found: TimedScores) -> None:
        self._costs.update({f"cost/{head}/{name}": count for name, count in found.costs.items()})

    def _count_break(self, actor: str, error: BrokenGpuError) -> None:
        """Count a CUDA error of an actor, and raise TaskError after MAX_ATTEMPTS of its processes in a row."""
        self._breaks[actor] += 1
        if self._breaks[actor] >= MAX_ATTEMPTS:
            raise TaskError(f"{actor} failed in {MAX_ATTEMPTS} processes in a row, last with {error}") from error

    def _rescore(self, pending: _Pending, head: str, ended: Ended, error: BrokenGpuError) -> None:
        """Score again with another actor of the head or a new process of this one, unless a task failed too often."""
        self.retries += 1
        pending.attempts += 1
        if pending.attempts >= MAX_ATTEMPTS:
            raise error from None
        log.warning("task %s is scored again: %s", pending.task.task_id, error)
        ended.call.avoid.add(ended.number)
        self._rewards[head].submit(ended.call)

    def _finish(self, pending: _Pending) -> None:
        answer = pending.answer
        assert answer is not None
        images = None
        if pending.task.keep_images and answer.images is not None:
            try:
                images = ray.get(answer.images)
            except LOST_IMAGES:
                self._requeue(pending, "its images were lost")
                return
        scored = {name: pending.scores[name] for name in self._heads.specs if name in pending.scores}
        self._done[pending.task.task_id] = Outcome(
            answer.value,
            {name: found.values for name, found in scored.items()},
            images,
            answer.seconds,
            {name: found.seconds for name, found in scored.items()},
        )
        del self._pending[pending.task.task_id]
        if pending.lost_at is not None:
            self.recovered(time.monotonic() - pending.lost_at)

    def recovered(self, seconds: float) -> None:
        """Count lost work that is done again, and the seconds since it was lost."""
        self.recoveries += 1
        self._recover_seconds += seconds

    def _requeue(self, pending: _Pending, why: str, error: BaseException | None = None, *, late: bool = False) -> None:
        """Draw the images of a task again, unless it failed or lost its actors too often."""
        pending.answer, pending.scoring, pending.scores = None, {}, {}
        if error is None:
            self._lose(pending, why, late)
        else:
            self.retries += 1
            pending.attempts += 1
            if pending.attempts >= MAX_ATTEMPTS:
                actors = ", ".join(map(str, sorted(pending.call.avoid)))
                where = "in the driver" if self._local is not None else f"on rollout actors {actors}"
                message = f"task {pending.task.task_id} failed {pending.attempts} times, {where}, last with {why}"
                raise TaskError(message) from error
            log.warning("task %s runs again: %s", pending.task.task_id, why)
        self._hand_out(pending.call)

    def _lose(self, pending: _Pending, why: str, late: bool = False) -> None:
        self.retries += 1
        pending.losses += 1
        pending.lost_at = pending.lost_at or time.monotonic()
        if pending.losses >= MAX_LOSSES:
            guess = "does it hang, or is cluster.task_timeout_s too short?" if late else "out of memory?"
            raise ModelError(f"task {pending.task.task_id} failed {pending.losses} times, last with {why}: {guess}")
        self.give_way()
        log.warning("task %s runs again: %s", pending.task.task_id, why)

    def give_way(self) -> None:
        """Add no actors for a while, so that the lost ones have room to restart."""
        for pool in (self._runners, *self._rewards.values()):
            pool.give_way()

    def take_metrics(self) -> dict[str, float]:
        """The present queues and actors, and the waits and recovery seconds since the last call, as metrics by name.

        So is what the scores cost since the last call, where a head counts that.
        """
        found = {
            "queue/waiting": self._runners.waiting,
            "queue/generating": self._runners.working,
            "queue/scoring": max((p.waiting + p.working for p in self._rewards.values()), default=0),
            "actors/rollout": self._runners.present,
            **{f"actors/reward/{head}": pool.present for head, pool in self._rewards.items()},
            "wait/learner_for_rollouts": self._for_rollouts,
            "wait/learner_for_rewards": self._for_rewards,
            "wait/learner_for_validation": self._for_validation,
            "wait/rollouts_for_learner": self._runners.idle_seconds,
            **{f"wait/{head}_for_rollouts": pool.idle_seconds for head, pool in self._rewards.items()},
            "retries": self.retries,
            "recoveries": self.recoveries,
            "time/recover": self._recover_seconds,
            **self._costs,
        }
        self._costs = Counter(dict.fromkeys(self._costs, 0))
        for pool in (self._runners, *self._rewards.values()):
            pool.idle_seconds = 0.0
        self._recover_seconds = self._for_rollouts = self._for_rewards = self._for_validation = 0.0
        return {name: float(value) for name, value in found.items()}


def _runs(task: Task) -> Any:
    def send(actor: ActorHandle[Any]) -> "ray.ObjectRef[Answer]":
        reference: ray.ObjectRef[Answer] = actor.run.options(name=task.method).remote(task)
        return reference

    return send
