"""`epd-ray rewards serve`: a reward head behind HTTP, with the protocol of HttpHead, in front of a pool of actors."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from itertools import count
from typing import Any

import ray
from ray.actor import ActorHandle

from epd_ray.actors.cluster import end_if_broken, ray_session, require_room, resources, warn_of_idle_gpus
from epd_ray.actors.pool import Bounds, Call, Ended, Pool
from epd_ray.actors.reward_pool import CALLS_PER_ACTOR, RewardActor, insist, unwrap, wants_gpu
from epd_ray.config.services import ClusterConfig
from epd_ray.errors import EpdRayError, RewardError
from epd_ray.report.web import Answer, Asked, Rules, answer_json, answering, bound, problem
from epd_ray.rewards import HEADS
from epd_ray.rewards.client import read_token
from epd_ray.rewards.needs import missing, needed_by
from epd_ray.rewards.requests import BadRequestError, Limits, read_request
from epd_ray.rewards.scoring import Scorer

TOKEN = "EPD_RAY_REWARD_TOKEN"
TOKEN_FIX = f"put a long random word into the environment variable {TOKEN}, and name it in token_env of the head `http`"
WAITING = 64  # requests that may wait for an actor; above, the answer is 503, after which HttpHead tries again
TICK_SECONDS = 0.3
CLUSTER = ClusterConfig()  # how long actors may wait for room and take for an answer
log = logging.getLogger(__name__)


class ServedHead(RewardActor):
    """A reward actor that is given requests as they came. It reads a second one while the head works.

    Args:
        head: the name of the head in the registry, or "module:Class".
        options: the keyword arguments of the head.
        limits: the largest request.
    """

    def __init__(self, head: str, options: Mapping[str, Any], limits: Limits) -> None:
        super().__init__(head, head, options)
        self._limits, self._turn = limits, threading.RLock()  # a head is used by one thread at a time

    def _built(self) -> Scorer:
        with self._turn:
            return super()._built()

    def answer(self, body: bytes) -> list[float]:
        """The scores of a request.

        Raises:
            BadRequestError: the request is not valid.
            EpdRayError: the head failed, or gave something else than one finite score for each image.
        """
        asked = read_request(body, self._limits)
        names = [f"images[{i}]" for i in range(len(asked.prompts))]
        with self._turn, end_if_broken():
            scorer = self._built()
            if problem := missing(needed_by(scorer.head), asked.rows, len(names)):
                raise BadRequestError(f"head {problem}, or name it in the option columns of the head http")
            scores: list[float] = scorer.score_pictures(asked.images, asked.prompts, names, asked.rows).tolist()
        return scores


class Front:
    """Answers requests through a pool of ServedHead actors; all its methods run in one event loop.

    Args:
        head: the name of the head.
        model: the model_id of the head.
        pool: the actors.

    Attributes:
        failure: ends with the error after which no actor can answer any more.
    """

    def __init__(self, head: str, model: str, pool: Pool) -> None:
        self._head, self._model, self._pool = head, model, pool
        self._asked: dict[str, asyncio.Future[Ended]] = {}
        self._watched: set[ray.ObjectRef[Any]] = set()
        self._numbers = count()
        self.failure: Future[None] = Future()

    async def __call__(self, asked: Asked) -> Answer:
        route = (asked.method, asked.path.rstrip("/"))
        if route == ("GET", "/health"):
            return answer_json({"status": "ok", "head": self._head, "model": self._model})
        if route != ("POST", "/score"):
            return problem(HTTPStatus.NOT_FOUND, "expected POST /score or GET /health")
        if len(self._asked) >= WAITING:
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, f"{WAITING} requests wait already: try again")
        try:
            return self._answer(await self._score(asked.body))
        except EpdRayError as error:  # the end of the pool, and of this server
            return problem(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def _answer(self, ended: Ended) -> Answer:
        if ended.lost:
            text = f"the actor of reward head {self._head!r} {ended.how_lost} while it scored: try again"
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, text)
        error = unwrap(ended.error) if isinstance(ended.error, ray.exceptions.RayTaskError) else ended.error
        if error is None:
            return answer_json({"scores": ended.value})
        if isinstance(error, BadRequestError):
            return problem(HTTPStatus.BAD_REQUEST, str(error))
        log.error("reward head %r failed", self._head, exc_info=ended.error)
        said = error.problem if isinstance(error, RewardError) else f"failed with {type(error).__name__}: {error}"
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, f"reward head {self._head!r}: {said}")

    async def _score(self, body: bytes) -> Ended:
        key = str(next(self._numbers))
        answer: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._asked[key] = answer
        try:
            self._pool.submit(Call(key, lambda actor: actor.answer.remote(body)))
            self._watch()
            while not answer.done():
                await asyncio.wait([answer], timeout=TICK_SECONDS)
                self._pool.tick()  # which looks for actors that died or do not answer
                self._watch()
        finally:
            del self._asked[key]
        return answer.result()

    def _watch(self) -> None:
        """Have `_take` called in this event loop for each answer of the pool that is still to come."""
        loop = asyncio.get_running_loop()
        for reference in set(self._pool.references()) - self._watched:
            self._watched.add(reference)
            take = partial(loop.call_soon_threadsafe, self._take, reference)
            reference.future().add_done_callback(lambda _, take=take: take())

    def _take(self, reference: "ray.ObjectRef[Any]") -> None:
        self._watched.discard(reference)
        try:
            for ended in self._pool.take({reference}):
                answer = self._asked.get(ended.call.key)
                if answer is not None and not answer.done():
                    answer.set_result(ended)
        except Exception as error:  # no actor can load the head any more
            if not self.failure.done():
                self.failure.set_exception(error)
            for answer in self._asked.values():
                if not answer.done():
                    answer.set_exception(error)
        self._watch()


@dataclass(frozen=True)
class Serving:
    """A head that is served.

    Attributes:
        url: the URL for HttpHead.
        failure: ends with the error after which the head cannot be served any more.
    """

    url: str
    failure: "Future[None]"


@contextmanager
def served(
    head: str,
    options: Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    num_gpus: float = 0.0,
    limits: Limits | None = None,
) -> Iterator[Serving]:
    """Serve a head over HTTP until the end of the block.

    The actors run on the Ray that this process has joined, else on the cluster in RAY_ADDRESS, else on a new local Ray.
    This process alone listens for requests. They need the token in the environment variable TOKEN where that is set.

    Args:
        head: a name in the registry, or "module:Class".
        options: the keyword arguments of the head.
        host: the address to listen on. One that others can reach is refused without a token.
        port: the port to listen on; 0 takes any free one.
        replicas: the number of actors with a copy of the head.
        num_gpus: the GPUs of each replica, also a share of one.
        limits: the largest request; None for the default.

    Raises:
        ConfigError: the port is in use, the token is no token, or there is none on an address that others can reach.
        PlacementError: the cluster has no room for the replicas.
        EpdRayError: the head cannot be built.
    """
    HEADS.get(head)  # raises for a misspelt name, before anything starts
    limits = limits or Limits()
    rules = Rules(limits.body_bytes, read_token(TOKEN, "rewards serve") if TOKEN in os.environ else "")
    with bound(host, port, rules.token, TOKEN_FIX) as listener, ray_session(None):
        if wants_gpu(head, options):
            warn_of_idle_gpus({"--num-gpus": num_gpus})
        require_room({"replicas": [resources(1.0, num_gpus, {})] * replicas}, CLUSTER.placement_timeout_s)
        numbers, what = count(), f"reward head {head!r}"

        def make() -> tuple[int, ActorHandle[ServedHead]]:
            return next(numbers), _start(head, options, limits, num_gpus)

        start, bounds = [make() for _ in range(replicas)], Bounds(replicas, replicas)
        pool = Pool(
            what, start, make, lambda actor: actor.ready.remote(), bounds, CALLS_PER_ACTOR, CLUSTER.task_timeout_s
        )
        try:
            for actor in pool.actors:
                actor.ready.remote().future()  # all load at once; with a future Ray does not log unfetched errors
            models = [insist(actor, what, "loading", actor.model_id.remote) for actor in pool.actors]
            front = Front(head, models[0], pool)
            with answering(listener, host, front, rules) as root:
                yield Serving(f"{root}/score", front.failure)
        finally:
            pool.stop()


def serve_head(
    head: str,
    options: Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    num_gpus: float = 0.0,
    say: Callable[[str], None] = log.info,
) -> None:
    """Serve a head until Ctrl-C or SIGTERM. `say` receives a line with the URL; `served` explains the others."""
    with served(head, options, host=host, port=port, replicas=replicas, num_gpus=num_gpus) as serving:
        ended = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
        serving.failure.add_done_callback(lambda _: ended.set())
        say(f"serving {head} at {serving.url} (Ctrl-C to stop)")
        try:
            ended.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
        if serving.failure.done():
            serving.failure.result()


def _start(head: str, options: Mapping[str, Any], limits: Limits, num_gpus: float) -> ActorHandle[ServedHead]:
    actor = ray.remote(ServedHead).options(
        num_cpus=1.0,
        num_gpus=num_gpus,
        max_concurrency=CALLS_PER_ACTOR,
        max_restarts=-1,
        max_task_retries=0,  # a call whose process died may kill the next one too
    )
    return actor.remote(head, dict(options), limits)
