"""Pools that follow their load, lose actors, and give way."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from epd_ray.actors import pipeline
from epd_ray.actors import pool as module
from epd_ray.actors.pool import Bounds, Call, Ended, Pool
from epd_ray.actors.tasks import Task
from epd_ray.config.loading import load_config
from epd_ray.config.services import ClusterConfig
from epd_ray.errors import ModelError
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.rdpo.session import rdpo_config
from tests.light_actors import Worker

SIM = "rewards={sim: {head: simulated, replicas: 1, max_replicas: 3, options: {latency: 0.4}}}"


class Factory:
    """Makes workers with 0.01 CPU, or with what is asked; those after the first may be unable to load."""

    def __init__(self, refuse: bool = False, num_cpus: float = 0.01) -> None:
        self.made, self.refuse, self.num_cpus = 0, refuse, num_cpus

    def __call__(self) -> tuple[int, Any]:
        self.made += 1
        cpus = self.num_cpus if self.made > 1 else 0.01
        options = {"num_cpus": cpus, "max_restarts": -1, "max_task_retries": 0}
        actor = ray.remote(Worker).options(**options).remote(self.made, self.refuse and self.made > 1)
        return self.made, actor


@pytest.fixture
def make(small_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Pool]]:
    monkeypatch.setattr(module, "LOOK_BACK_SECONDS", 0.5)
    monkeypatch.setattr(module, "SHRINK_SECONDS", 0.5)
    pools = []

    def build(low: int, high: int, timeout_s: float | None = None, **factory: Any) -> Pool:
        workers = Factory(**factory)
        start = [workers() for _ in range(low)]
        bounds = Bounds(low, high)
        pools.append(Pool("workers", start, workers, lambda a: a.ready.remote(), bounds, timeout_s=timeout_s))
        return pools[-1]

    yield build
    for pool in pools:
        pool.stop()


def until(pool: Pool, done: Callable[[list[Ended]], bool], seconds: float = 90) -> list[Ended]:
    """Turn the pool until `done` says so."""
    ended: list[Ended] = []
    end = time.monotonic() + seconds
    while not done(ended):
        assert time.monotonic() < end, f"{pool.present} there, {pool.waiting} waiting, {pool.working} working"
        references = pool.references()
        if references:
            ray.wait(references, timeout=0.05)
        ready = set(ray.wait(references, num_returns=len(references), timeout=0)[0]) if references else set()
        ended += pool.take(ready)
        pool.tick()
        time.sleep(0.01)
    return ended


def calls(count: int, seconds: float) -> list[Call]:
    return [Call(f"call {i}", lambda actor: actor.work.remote(seconds)) for i in range(count)]


def test_it_grows_with_the_load_and_shrinks_after_it(make: Callable[..., Pool]) -> None:
    pool, sent = make(1, 3), calls(8, 0.2)
    for call in sent:
        pool.submit(call)
    assert (pool.present, pool.working, pool.waiting) == (1, 1, 7)

    def busy(ended: list[Ended]) -> bool:
        if pool.waiting < 8:
            sent.extend(calls(1, 0.2))
            pool.submit(sent[-1])
        return {e.value for e in ended} == {1, 2, 3}

    ended = until(pool, busy)
    ended += until(pool, lambda e: len(ended) + len(e) == len(sent))
    assert [e.call.key for e in ended if e.error] == []
    assert {id(e.call) for e in ended} == {id(call) for call in sent}
    until(pool, lambda e: len(pool.actors) == 1)
    assert pool.idle_seconds > 0


def test_without_bounds_apart_it_keeps_its_size(make: Callable[..., Pool]) -> None:
    pool = make(1, 1)
    for call in calls(10, 0.1):
        pool.submit(call)
    until(pool, lambda e: len(e) == 10)
    assert len(pool.actors) == 1


def test_a_lost_actor_comes_back_and_its_call_is_told_of(make: Callable[..., Pool]) -> None:
    pool = make(2, 2)
    victim = ray.get(pool.actors[0].pid.remote())
    for call in calls(2, 1.0):
        pool.submit(call)
    os.kill(victim, signal.SIGKILL)
    ended = until(pool, lambda e: len(e) == 2)
    lost = [e for e in ended if e.lost]
    assert len(lost) == 1 and lost[0].number == 1
    until(pool, lambda e: pool.present == 2)
    pool.submit(lost[0].call)
    assert until(pool, lambda e: len(e) == 1)[0].error is None


def test_an_actor_that_is_stopped_counts_as_lost_after_a_while(
    make: Callable[..., Pool], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST", 100)
    pool = make(1, 1, timeout_s=0.5)
    victim = ray.get(pool.actors[0].pid.remote())
    first, second = calls(2, 0.0)
    pool.submit(first)
    assert until(pool, lambda e: bool(e))[0].value == 1
    os.kill(victim, signal.SIGSTOP)
    pool.submit(second)
    (ended,) = until(pool, lambda e: bool(e))
    assert ended.lost and ended.late and ended.how_lost == "gave no answer in time"
    assert "workers: actor 1 has not answered for 1 s: its process is ended" in caplog.messages
    pool.submit(second)
    assert until(pool, lambda e: bool(e))[0].value == 1 and pool.present == 1


class Silent:
    """Stands for ray, and for the clock: nothing is ever ready but what `answers` says."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.now, self.killed, self.answers = 0.0, [], {}

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def kill(self, actor: Any, no_restart: bool = True) -> None:
        self.killed.append((actor, no_restart))

    def get(self, reference: Any) -> Any:
        answer = self.answers[reference]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait(self, references: list[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        self.now += timeout
        return [r for r in references if r in self.answers], []


class Asked:
    """An actor as far as a pool asks for one."""

    def __init__(self) -> None:
        self.__ray_ready__ = self
        self.asked = 0

    def remote(self) -> str:
        self.asked += 1
        return f"ready {self.asked}"


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Silent:
    made = Silent()
    for part in (module, pipeline):
        monkeypatch.setattr(part, "ray", made)
        monkeypatch.setattr(part, "time", made)
    return made


def alone(actor: Any, timeout_s: float | None) -> Pool:
    def make() -> tuple[int, Any]:
        raise AssertionError

    return Pool("workers", [(7, actor)], make, lambda a: "loaded", Bounds(1, 1), 2, timeout_s)


def named(*keys: str) -> list[Call]:
    return [Call(key, lambda actor, key=key: key) for key in keys]  # type: ignore[misc]


def test_the_first_answer_of_a_process_may_take_longer(silent: Silent) -> None:
    actor = Asked()
    pool = alone(actor, 100.0)
    first, second, third = named("a", "b", "c")
    silent.now = 1000.0  # nothing to do is no silence
    pool.tick()
    pool.submit(first)
    pool.submit(second)
    silent.now += 100.0 * module.FIRST
    pool.tick()
    assert silent.killed == []
    silent.answers["a"] = 1
    assert [ended.value for ended in pool.take({"a"})] == [1]  # type: ignore[arg-type]
    silent.now += 100.0
    pool.tick()
    assert silent.killed == [] and pool.busy() == "workers: actor 7 (task b)"
    silent.now += 1.0
    pool.tick()
    pool.tick()
    assert silent.killed == [(actor, False)] and pool.present == 0
    silent.answers["b"] = ray.exceptions.ActorUnavailableError("restarted", None)
    (ended,) = pool.take({"b"})  # type: ignore[arg-type]
    assert ended.lost and ended.late
    silent.now += module.CHECK_SECONDS
    pool.tick()
    silent.answers |= {"ready 1": None, "loaded": None}
    pool.take({"ready 1"})  # type: ignore[arg-type]
    assert pool.busy() == "workers: actor 7 (loading)"
    pool.take({"loaded"})  # type: ignore[arg-type]
    pool.submit(third)
    silent.now += 100.0 * module.FIRST  # as for every new process
    pool.tick()
    assert len(silent.killed) == 1 and pool.present == 1
    silent.now += 1.0
    pool.tick()
    assert len(silent.killed) == 2


def test_idle_seconds_are_those_without_a_call(silent: Silent) -> None:
    pool = alone(Asked(), None)
    silent.now = 10.0
    pool.submit(named("a")[0])
    pool.tick()
    assert pool.idle_seconds == 10.0
    silent.now, silent.answers["a"] = 14.0, 1
    pool.take({"a"})  # type: ignore[arg-type]
    assert pool.idle_seconds == 10.0
    silent.now = 17.0
    pool.tick()
    assert pool.idle_seconds == 13.0


def test_one_that_is_away_is_asked_every_half_second(silent: Silent) -> None:
    actor = Asked()
    pool = alone(actor, None)
    pool.submit(named("a")[0])
    silent.answers["a"] = ray.exceptions.ActorUnavailableError("restarts", None)
    pool.take({"a"})  # type: ignore[arg-type]
    asked = []
    for number in range(1, 4):
        silent.answers[f"ready {number}"] = ray.exceptions.ActorUnavailableError("restarts", None)
        while actor.asked < number:
            silent.now += 0.0625
            pool.tick()
        asked.append(silent.now)
        pool.take({f"ready {number}"})  # type: ignore[arg-type]
    assert asked == [0.5, 1.0, 1.5]


def test_one_default_and_a_way_to_set_it() -> None:
    assert ClusterConfig().task_timeout_s == RDPOConfig().task_timeout_s
    for text, seconds in (("7", 7.0), ("null", None)):
        config = load_config(None, [f"cluster.task_timeout_s={text}"])
        assert rdpo_config(config, ["a"]).task_timeout_s == seconds


def test_without_a_bound_it_waits_for_ever(silent: Silent) -> None:
    pool = alone(Asked(), None)
    pool.submit(named("a")[0])
    silent.now = 1e9
    pool.tick()
    assert silent.killed == [] and pool.present == 1


class Heads:
    """No reward actors."""

    pools: dict[str, Pool] = {}  # noqa: RUF012

    def score(self, *_: Any) -> dict[str, Call]:
        return {}


class Runner(Asked):
    """A rollout actor that is asked and never answers."""

    run = property(lambda self: self)

    def options(self, **_: Any) -> "Runner":
        return self

    def remote(self, *task: Any) -> str:
        return f"{super().remote()} {'task' if task else ''}"


def test_it_is_said_who_is_waited_for(silent: Silent, caplog: pytest.LogCaptureFixture) -> None:
    line = pipeline.RolloutPipeline(alone(Runner(), None), Heads())  # type: ignore[arg-type]
    silent.now = 500.0  # the driver was busy: that is no waiting
    line.submit([Task("rollout-3-1", "generate", ())])
    while silent.now < 500.0 + 250.0:
        line.poll(0.25)
    who = "for workers: actor 7 (task rollout-3-1)"
    assert caplog.messages == [f"waiting {seconds} s {who}" for seconds in (30, 60, 120, 240)]


def test_a_run_ends_when_nobody_ever_answers(silent: Silent, caplog: pytest.LogCaptureFixture) -> None:
    line = pipeline.RolloutPipeline(alone(Runner(), 100.0), Heads())  # type: ignore[arg-type]

    def wait(references: list[Any], num_returns: int = 1, timeout: float = 0) -> tuple[list[Any], list[Any]]:
        """Processes come back and load; their tasks end with them alone."""
        silent.now += timeout
        for reference in references:
            if "task" not in reference or len(silent.killed) > tasks.setdefault(reference, len(silent.killed)):
                lost = ray.exceptions.ActorUnavailableError("restarted", None)
                silent.answers[reference] = lost if "task" in reference else None
        return [r for r in references if r in silent.answers], []

    tasks: dict[Any, int] = {}
    silent.wait = wait  # type: ignore[method-assign]
    line.submit([Task("rollout-3-1", "generate", ())])
    said = "task rollout-3-1 failed 10 times, last with rollout actor 7 gave no answer in time: does it hang, or is "
    with pytest.raises(ModelError, match=said):
        line.collect(["rollout-3-1"])
    assert len(silent.killed) == pipeline.MAX_LOSSES and silent.now > 10 * 400


def test_one_that_is_gone_for_good_is_replaced(make: Callable[..., Pool]) -> None:
    pool = make(1, 1)
    ray.kill(pool.actors[0], no_restart=True)
    (call,) = calls(1, 0.0)
    pool.submit(call)
    assert until(pool, lambda e: bool(e))[0].lost
    until(pool, lambda e: pool.present == 1 and pool.actors != [])
    pool.submit(call)
    assert until(pool, lambda e: bool(e))[0].value == 2


def test_a_call_avoids_the_actor_that_it_failed_on(make: Callable[..., Pool]) -> None:
    pool = make(2, 2)
    avoiding = calls(4, 0.05)
    for call in avoiding:
        call.avoid.add(1)
        pool.submit(call)
    assert {e.value for e in until(pool, lambda e: len(e) == 4)} == {2}
    alone = make(1, 1)
    avoiding[0].avoid.add(1)
    alone.submit(avoiding[0])
    assert until(alone, lambda e: bool(e))[0].value == 1


def test_an_added_actor_that_cannot_load_is_given_up(
    make: Callable[..., Pool], caplog: pytest.LogCaptureFixture
) -> None:
    pool = make(1, 3, refuse=True)

    def given_up(ended: list[Ended]) -> bool:
        if pool.waiting < 5:
            pool.submit(calls(1, 0.1)[0])
        return pool.bounds.high == 1 and bool(ended)

    assert {e.value for e in until(pool, given_up)} == {1}
    assert "the pool adds no more actors, because one could not load: no weights on this node" in caplog.text
    assert pool.bounds.high == 1


def test_what_waits_for_room_gives_way(make: Callable[..., Pool]) -> None:
    pool = make(1, 2, num_cpus=1000)
    for call in calls(40, 0.1):
        pool.submit(call)
    until(pool, lambda e: len(pool.actors) == 2)
    assert pool.present == 1
    pool.give_way()
    assert len(pool.actors) == 1
    until(pool, lambda e: pool.waiting + pool.working == 0)
    assert len(pool.actors) == 1  # calm for a while


@pytest.mark.timeout(200)
def test_heads_follow_their_queue_and_nothing_changes(build, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "LOOK_BACK_SECONDS", 0.5)
    algo = build(SIM, "rdpo.staleness=1")
    assert len(algo._rewards.actors) == 1
    algo.train()
    while algo.last.metrics["actors/reward/sim"] == 1:
        algo.train()
    algo.train()  # with more than one at work
    fixed = build("rdpo.staleness=1")
    while fixed.policy_version < algo.policy_version:
        fixed.train()
    assert fixed.checksum() == algo.checksum()
