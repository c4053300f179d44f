"""`epd-ray rewards serve`: a reward head behind HTTP, on Ray Serve, with the protocol of HttpHead."""

import asyncio
import base64
import io
import json
import logging
import math
import signal
import socket
import threading
import tokenize
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image
from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from torch import Tensor

from epd_ray.actors.cluster import require_room, resources, start_ray, warn_of_idle_gpus
from epd_ray.actors.reward_pool import unwrap, wants_gpu
from epd_ray.errors import ConfigError, EpdRayError, ModelError, is_own_bug
from epd_ray.rewards import HEADS
from epd_ray.types import FloatArray, RewardHead

READY_SECONDS = 600.0
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """The largest request that the server accepts.

    Attributes:
        body_bytes: the bytes of the JSON.
        images: the number of images.
        side: the pixels of the longer side of an image.
        pixels: the pixels of all images together; 2**25 are 32 images of 1024 x 1024, or 384 MiB as float32.
        prompt_chars: the characters of one prompt.
    """

    body_bytes: int = 64 << 20
    images: int = 64
    side: int = 2048
    pixels: int = 1 << 25
    prompt_chars: int = 10_000


class BadRequestError(Exception):
    """A request that the sender has to correct; the message is one line."""


@dataclass(frozen=True)
class ScoreRequest:
    """Images, [B, 3, H, W], float32 in [0, 1], and one prompt per image."""

    images: Tensor
    prompts: list[str]


def read_request(body: bytes, limits: Limits) -> ScoreRequest:
    """Check and decode a request. It reads no pickle, and decompresses no image before it has checked the size.

    Args:
        body: the bytes of the request.
        limits: the largest request.

    Raises:
        BadRequestError: the request is not valid; the message names the first problem.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequestError("the body is not JSON") from None
    if not isinstance(asked, dict) or set(asked) != {"images", "format", "prompts"}:
        raise BadRequestError("expected an object with exactly images, format and prompts")
    files, form, prompts = asked["images"], asked["format"], asked["prompts"]
    if form not in ("png", "npy"):
        raise BadRequestError("format is neither png nor npy")
    if not isinstance(files, list) or not 1 <= len(files) <= limits.images:
        raise BadRequestError(f"images is not a list of 1 to {limits.images}")
    if not isinstance(prompts, list) or len(prompts) != len(files):
        raise BadRequestError(f"prompts is not a list of {len(files)}, as many as images")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or len(prompt) > limits.prompt_chars:
            raise BadRequestError(f"prompts[{i}] is not a text of at most {limits.prompt_chars} characters")
    read = _read_png if form == "png" else _read_npy
    images: list[FloatArray] = []
    for i, file in enumerate(files):
        try:
            images.append(read(_decode(file), limits.side))
        except BadRequestError as error:
            raise BadRequestError(f"images[{i}]: {error}") from None
        if images[i].shape != images[0].shape:
            raise BadRequestError(f"images[{i}] has shape {images[i].shape}, images[0] {images[0].shape}")
        if sum(image[0].size for image in images) > limits.pixels:
            raise BadRequestError(f"the images have more than {limits.pixels} pixels together")
    return ScoreRequest(torch.from_numpy(np.stack(images)), prompts)


def _decode(file: object) -> bytes:
    if not isinstance(file, str):
        raise BadRequestError(f"is a {type(file).__name__}, expected a text in base64")
    try:
        return base64.b64decode(file, validate=True)
    except ValueError as error:
        raise BadRequestError(str(error)) from None


def _read_png(file: bytes, side: int) -> FloatArray:
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as picture:  # this reads only the header
            _check_size(picture.height, picture.width, side)
            if picture.mode != "RGB":
                raise BadRequestError(f"PNG of mode {picture.mode}, expected RGB of 8 bits")
            pixels = np.array(picture)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadRequestError(f"PNG that cannot be read ({type(error).__name__})") from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32) / np.float32(255)


def _read_npy(file: bytes, side: int) -> FloatArray:
    stream = io.BytesIO(file)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise BadRequestError("NPY of a version other than 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (
        ValueError,
        SyntaxError,
        tokenize.TokenError,
        RecursionError,
        MemoryError,
    ):  # the header is a Python literal
        raise BadRequestError("NPY header that cannot be read") from None
    if dtype != np.float32 or fortran or len(shape) != 3 or shape[0] != 3:
        raise BadRequestError("NPY that is not float32 [3, H, W] in C order")
    _check_size(shape[1], shape[2], side)
    data = stream.read()
    if len(data) != 4 * math.prod(shape):
        raise BadRequestError(f"NPY with {len(data)} bytes for shape {shape}")
    image = np.frombuffer(data, np.float32).reshape(shape)  # [3, H, W]
    if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        raise BadRequestError("NPY with values outside [0, 1]")
    return image


def _check_size(height: int, width: int, side: int) -> None:
    if not (1 <= height <= side and 1 <= width <= side):
        raise BadRequestError(f"{height} x {width} pixels, expected sides of 1 to {side}")


class Service:
    """A head behind POST /score and GET /health.

    Its constructor keeps the error of a head that cannot be built, and `ready` raises it.

    Args:
        name: the name of the head in the registry, or "module:Class".
        options: the keyword arguments of the head.
        limits: the largest request.
    """

    def __init__(self, name: str, options: Mapping[str, Any], limits: Limits) -> None:
        self._name, self._limits, self._turn = name, limits, threading.Lock()
        self._error: EpdRayError | None = None
        try:
            self._head: RewardHead = HEADS.build(name, options)
        except EpdRayError as error:
            self._error = error
        except Exception as error:  # a class of the user may raise anything, and the user sees its message
            if is_own_bug(error):
                raise
            self._error = ModelError(f"reward head {name!r} cannot be built: {type(error).__name__}: {error}")

    def ready(self) -> str:
        """The model_id of the head.

        Raises:
            EpdRayError: the head could not be built.
        """
        if self._error is not None:
            raise self._error
        return self._head.model_id

    async def __call__(self, request: Request) -> JSONResponse:
        route = request.url.path.rstrip("/")
        if route == "/health" and request.method == "GET":
            return JSONResponse({"status": "ok", "head": self._name, "model": self._head.model_id})
        if route != "/score" or request.method != "POST":
            return _failed(404, "expected POST /score or GET /health")
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > self._limits.body_bytes:
                    return _failed(413, f"the body has more than {self._limits.body_bytes} bytes")
        except ClientDisconnect:
            return _failed(400, "the sender went away")
        return await asyncio.to_thread(self.answer, bytes(body))

    def answer(self, body: bytes) -> JSONResponse:
        """The scores of a request, or one line about a problem of the request (400) or of the head (500)."""
        try:
            asked = read_request(body, self._limits)
        except BadRequestError as error:
            return _failed(400, str(error))
        try:
            with self._turn:  # a head is used by one thread at a time
                scores = torch.as_tensor(self._head.score(asked.images, asked.prompts)).detach().float().cpu()
        except Exception as error:  # whatever it is, the server answers with it and goes on
            log.exception("reward head %r failed", self._name)
            return _failed(500, f"reward head {self._name!r} failed with {type(error).__name__}: {error}")
        if scores.shape != (len(asked.prompts),) or not bool(torch.isfinite(scores).all()):
            wrong = f"gave values of shape {tuple(scores.shape)} for {len(asked.prompts)} images, or infinite ones"
            return _failed(500, f"reward head {self._name!r} {wrong}")
        return JSONResponse({"scores": scores.tolist()})


def _failed(status: int, problem: str) -> JSONResponse:
    return JSONResponse({"error": " ".join(problem.split())[:500]}, status_code=status)


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
) -> Iterator[str]:
    """Serve a head over HTTP until the end of the block; yields the URL for HttpHead.

    The server uses the Ray that this process has joined, else the cluster in RAY_ADDRESS, else a new local Ray. It ends
    what it has started.

    Args:
        head: a name in the registry, or "module:Class".
        options: the keyword arguments of the head.
        host: the address to listen on. The server does not authenticate: put a proxy in front of a public address.
        port: the port to listen on.
        replicas: the number of copies of the head, which take requests in turn.
        num_gpus: the GPUs of each replica, also a share of one.
        limits: the largest request; None for the default.

    Raises:
        ConfigError: the port is in use, or Ray Serve runs already.
        PlacementError: the cluster has no room for the replicas.
        EpdRayError: the head cannot be built.
    """
    HEADS.get(head)  # raises for a misspelt name, before anything starts
    _require_free(host, port)
    began_ray = not ray.is_initialized()
    if began_ray:
        start_ray()
    try:
        if serve.status().proxies:
            raise ConfigError(["Ray Serve runs on this Ray already: end it, or unset RAY_ADDRESS to start another Ray"])
        if wants_gpu(head, options):
            warn_of_idle_gpus({"--num-gpus": num_gpus})
        require_room({"replicas": [resources(1.0, num_gpus, {})] * replicas})  # Ray Serve would wait without end
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
            deployment = serve.deployment(
                Service,
                name="reward",
                num_replicas=replicas,
                max_ongoing_requests=4,  # further requests are decoded while the head works
                max_queued_requests=64,  # above, the answer is 503, after which HttpHead tries again
                ray_actor_options={"num_cpus": 1.0, "num_gpus": num_gpus},
            )
            app = deployment.bind(head, dict(options), limits or Limits())
            _run(app, head)
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}/score"
        finally:
            with redirect_stdout(io.StringIO()):  # Ray prints the calls that its shutdown interrupts
                serve.shutdown()
    finally:
        if began_ray:
            ray.shutdown()


def serve_head(
    head: str,
    options: Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int = 1,
    num_gpus: float = 0.0,
    limits: Limits | None = None,
    say: Callable[[str], None] = log.info,
) -> None:
    """Serve a head until Ctrl-C or SIGTERM. `say` receives a line with the URL; `served` explains the others."""
    with served(head, options, host=host, port=port, replicas=replicas, num_gpus=num_gpus, limits=limits) as url:
        ended = threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
        say(f"serving {head} at {url} (Ctrl-C to stop)")
        try:
            ended.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def _run(app: serve.Application, head: str) -> None:
    try:
        serve.run(app, name="epd-ray", route_prefix="/").ready.remote().result(timeout_s=READY_SECONDS)
    except ray.exceptions.RayTaskError as error:
        raise unwrap(error) from None
    except (RuntimeError, TimeoutError) as error:  # a replica did not start, mostly because its process died
        said = " ".join(str(error).split())[:300] or f"not ready after {READY_SECONDS:.0f} s"
        raise ModelError(f"reward head {head!r} cannot be served: {said}") from None


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError([f"cannot listen on {host}:{port} ({error}): choose another --host or --port"]) from None
