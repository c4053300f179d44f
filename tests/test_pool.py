"""Pools that follow their load, lose actors, and give way."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from epd_ray.actors import pool as module
from epd_ray.actors.pool import Bounds, Call, Ended, Pool
from epd_ray.errors import ModelError

SIM = "rewards={sim: {head: simulated, replicas: 1, max_replicas: 3, options: {latency: 0.4}}}"


class Worker:
    """Sleeps and answers; a late one cannot load."""

    def __init__(self, number: int, refuse: bool = False) -> None:
        self.number, self.refuse = number, refuse

    def ready(self) -> None:
        if self.refuse:
            raise ModelError("no weights on this node")

    def work(self, seconds: float) -> int:
        time.sleep(seconds)
        return self.number

    def pid(self) -> int:
        return os.getpid()


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

    def build(low: int, high: int, **factory: Any) -> Pool:
        workers = Factory(**factory)
        start = [workers() for _ in range(low)]
        pools.append(Pool("workers", start, workers, lambda a: a.ready.remote(), Bounds(low, high)))
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
    assert "no more actors are added, one could not load: no weights on this node" in caplog.text
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
    algo.train()
    assert algo.last.metrics["actors/reward/sim"] == 1
    while algo.last.metrics["actors/reward/sim"] == 1:
        algo.train()
    algo.train()  # with more than one at work
    fixed = build("rdpo.staleness=1")
    while fixed.policy_version < algo.policy_version:
        fixed.train()
    assert fixed.checksum() == algo.checksum()
