import base64
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
import ray
import torch
from PIL import Image
from torch import Tensor

from epd_ray.actors import cluster
from epd_ray.actors.serving import BadRequestError, Limits, Service, _run, read_request, served
from epd_ray.errors import ConfigError, ModelError, PlacementError, RewardError, UnknownNameError
from epd_ray.rewards.http import HttpHead
from epd_ray.rewards.simulated import SimulatedHead

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 4), np.uint8)
PROMPTS = ["a", "b", "c"]


def base(content: bytes) -> str:
    return base64.b64encode(content).decode()


def png(image: np.ndarray, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    (picture.convert(mode) if mode else picture).save(file, "PNG")
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def body(**changes: Any) -> bytes:
    files = [base(png(image)) for image in PIXELS]
    return json.dumps({"images": files, "format": "png", "prompts": PROMPTS, **changes}).encode()


def bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("form", ["png", "npy"])
def test_what_is_sent_is_read(form: str) -> None:
    files = PIXELS.astype(np.float32) / 255
    encoded = [base(png(i)) for i in PIXELS] if form == "png" else [base(npy(i)) for i in files]
    read = read_request(body(images=encoded, format=form), Limits())
    assert torch.equal(read.images, torch.from_numpy(PIXELS).float() / 255) and read.prompts == PROMPTS


FLOATS = PIXELS.astype(np.float32) / 255
WRONG = [
    (b"\xff", "the body is not JSON"),
    (b"[" * 100_000, "the body is not JSON"),
    (b"[]", "expected an object with exactly images, format and prompts"),
    (b'{"images": []}', "expected an object with exactly"),
    (body(more=1), "expected an object with exactly"),
    (body(format="jpeg"), "format is neither png nor npy"),
    (body(format=["png"]), "format is neither png nor npy"),
    (body(images="abc"), "images is not a list of 1 to 4"),
    (body(images=[], prompts=[]), "images is not a list of 1 to 4"),
    (body(images=["x"] * 5, prompts=["x"] * 5), "images is not a list of 1 to 4"),
    (body(prompts=["a", "b"]), "prompts is not a list of 3"),
    (body(prompts="abc"), "prompts is not a list of 3"),
    (body(prompts=["a", "b", 3]), r"prompts\[2\] is not a text"),
    (body(prompts=["a", "b" * 101, "c"]), r"prompts\[1\] is not a text of at most 100"),
    (body(images=[base(png(PIXELS[0])), 5, "x"]), r"images\[1\]: "),
    (body(images=[base(png(PIXELS[0])), "ä!", "x"]), r"images\[1\]: "),
    (body(images=[base(b"nothing")] * 3), r"images\[0\]: PNG that cannot be read"),
    (body(images=[base(png(PIXELS[0])[:-30])] * 3), r"images\[0\]: PNG that cannot be read"),
    (body(images=[base(png(PIXELS[0], "L"))] * 3), r"images\[0\]: PNG of mode L, expected RGB"),
    (body(images=[base(bomb(17))] * 3), r"images\[0\]: 17 x 17 pixels, expected sides of 1 to 16"),
    (body(images=[base(bomb(60_000))] * 3), r"images\[0\]: PNG that cannot be read \(DecompressionBombError\)"),
    (body(images=[base(png(PIXELS[0])), base(png(PIXELS[0, :, :5])), "x"]), r"images\[1\] has shape"),
    (body(images=[base(png(np.zeros((3, 16, 16), np.uint8)))] * 3), "more than 512 pixels together"),
    (body(format="npy"), r"images\[0\]: NPY header that cannot be read"),
    (body(format="npy", images=[base(npy(FLOATS[0]).replace(b"}", b" "))] * 3), "NPY header that cannot be read"),
    (body(format="npy", images=[base(npy(FLOATS[0]).replace(b"'descr", b"09,descr"))] * 3), "NPY header that cannot"),
    (body(format="npy", images=[base(npy(np.array([{}], object)))] * 3), r"images\[0\]: NPY that is not float32"),
    (body(format="npy", images=[base(npy(FLOATS[0].astype(np.float64)))] * 3), r"images\[0\]: NPY that is not float32"),
    (body(format="npy", images=[base(npy(FLOATS[0, 0]))] * 3), r"images\[0\]: NPY that is not float32 \[3, H, W\]"),
    (body(format="npy", images=[base(npy_header((3, 10**9, 10**9)))] * 3), "expected sides of 1 to 16"),
    (body(format="npy", images=[base(npy_header((3, 8, -4)))] * 3), "expected sides of 1 to 16"),
    (body(format="npy", images=[base(npy_header((3, 8, 4)))] * 3), "NPY with 0 bytes for shape"),
    (body(format="npy", images=[base(npy(FLOATS[0] * 2))] * 3), r"values outside \[0, 1\]"),
    (body(format="npy", images=[base(npy(FLOATS[0] * np.float32("nan")))] * 3), r"values outside \[0, 1\]"),
]


@pytest.mark.parametrize(("content", "problem"), WRONG)
def test_wrong_requests_are_named(content: bytes, problem: str) -> None:
    with pytest.raises(BadRequestError, match=problem) as caught:
        read_request(content, Limits(images=4, side=16, pixels=512, prompt_chars=100))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


class Broken:
    """A head that fails as its options say."""

    model_id = "broken"

    def __init__(self, *, how: str) -> None:
        self.how = how
        if how == "build":
            raise ModelError("weights\nare missing")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.how == "raise":
            raise RuntimeError("out of\nmemory")
        return torch.full((len(images) + (self.how == "count"),), float("nan") if self.how == "nan" else 1.0)


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("raise", "reward head 'tests.test_serve:Broken' failed with RuntimeError: out of memory"),
        ("nan", "gave values of shape (3,) for 3 images, or infinite ones"),
        ("count", "gave values of shape (4,) for 3 images"),
    ],
)
def test_a_failing_head_is_a_500(how: str, problem: str) -> None:
    answer = Service("tests.test_serve:Broken", {"how": how}, Limits()).answer(body())
    error = json.loads(bytes(answer.body))["error"]
    assert answer.status_code == 500 and problem in error and "\n" not in error


def test_a_wrong_request_is_a_400() -> None:
    answer = Service("simulated", {}, Limits()).answer(body(format="gif"))
    assert answer.status_code == 400 and json.loads(bytes(answer.body)) == {"error": "format is neither png nor npy"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_its_error_comes_through_serve_which_then_ends(no_ray: None) -> None:
    for _ in range(2):
        with (
            pytest.raises(ModelError, match="weights\nare missing"),
            served("tests.test_serve:Broken", {"how": "build"}, port=free_port()),
        ):
            pass
        assert not ray.is_initialized()


@pytest.fixture(scope="module")
def url(small_ray: None) -> Iterator[str]:
    limits = Limits(body_bytes=1 << 20)
    with served("simulated", {"target": 0.25}, port=free_port(), limits=limits) as url:
        yield url
    assert ray.is_initialized()  # joined, so left as it was


@pytest.mark.parametrize("form", ["png", "npy"])
def test_a_round_trip_changes_no_score(url: str, form: Any) -> None:
    images = torch.from_numpy(PIXELS).float() / 255
    if form == "npy":
        images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = [f"prompt {i}" for i in range(len(images))]
    here = SimulatedHead(target=0.25).score(images, prompts)
    there = HttpHead(url=url, format=form, batch_size=len(images)).score(images, prompts)
    assert torch.equal(here, there)
    parts = HttpHead(url=url, format=form, batch_size=2, concurrency=2).score(images, prompts)
    assert torch.allclose(here, parts, atol=1e-6)


def test_routes(url: str) -> None:
    root = url.removesuffix("/score")
    assert root.startswith("http://127.0.0.1:")
    health = httpx2.get(f"{root}/health")
    assert health.json() == {"status": "ok", "head": "simulated", "model": "simulated"}
    assert httpx2.get(url).status_code == 404 and httpx2.post(f"{root}/other").status_code == 404
    assert httpx2.post(url, content=b"x").json() == {"error": "the body is not JSON"}
    large = httpx2.post(url, content=b" " * (1 << 20) + b"x")
    assert large.status_code == 413 and large.json() == {"error": "the body has more than 1048576 bytes"}


def test_our_head_shows_the_servers_words(url: str) -> None:
    with pytest.raises(RewardError, match=r"400 .*images\[0\].*3000 x 1"):
        HttpHead(url=url).score(torch.zeros(1, 3, 3000, 1), ["x"])


def test_a_taken_port_is_named(url: str) -> None:
    port = int(url.split(":")[2].split("/")[0])
    with (
        pytest.raises(ConfigError, match=f"127.0.0.1:{port} "),
        served("simulated", {}, port=port),
    ):
        pass


def test_one_ray_serves_one_head(url: str) -> None:
    with (
        pytest.raises(ConfigError, match="Ray Serve runs on this Ray already"),
        served("simulated", {}, port=free_port()),
    ):
        pass
    assert httpx2.get(url.replace("/score", "/health")).status_code == 200


def test_no_room_is_said(small_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cluster.require_room
    monkeypatch.setattr("epd_ray.actors.serving.require_room", lambda bundles: real(bundles, timeout_s=0.5))
    monkeypatch.setattr("epd_ray.actors.serving.serve.status", lambda: SimpleNamespace(proxies={}))
    with (
        pytest.raises(PlacementError, match=r"GPU: 8000 asked, .*2 x 1 CPU, 4000 GPU"),
        served("simulated", {}, port=free_port(), replicas=2, num_gpus=4000),
    ):
        pass


def test_gpus_that_a_server_does_not_ask_for_are_mentioned(
    small_ray: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(bundles: object) -> None:
        raise PlacementError("no room")

    monkeypatch.setattr("epd_ray.actors.serving.require_room", full)
    monkeypatch.setattr("epd_ray.actors.serving.serve.status", lambda: SimpleNamespace(proxies={}))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0})
    for head, num_gpus in (("tests.test_serve:Broken", 0.0), ("tests.test_serve:Broken", 0.5), ("simulated", 0.0)):
        with pytest.raises(PlacementError), served(head, {}, port=free_port(), num_gpus=num_gpus):
            pass
    assert caplog.messages == ["the cluster has 2 GPUs, but actors that ask for none run on CPU cores: set --num-gpus"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError("Deploying application\nepd-ray failed"), "Deploying application epd-ray failed"),
     (TimeoutError(), "not ready after 600 s")],
)  # fmt: skip
def test_a_failed_deployment_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("epd_ray.actors.serving.serve.run", fail)
    with pytest.raises(ModelError) as caught:
        _run(None, "mine")  # type: ignore[arg-type]
    assert str(caught.value) == f"reward head 'mine' cannot be served: {said}"


def test_a_misspelt_head_is_named_before_anything_starts() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'simulated'"), served("simulatd", {}):
        pass


def test_a_head_that_cannot_be_built_gives_its_own_error() -> None:
    with pytest.raises(ModelError, match="weights\nare missing"):
        Service("tests.test_serve:Broken", {"how": "build"}, Limits()).ready()
    with pytest.raises(ConfigError, match="options given: wrong"):
        Service("simulated", {"wrong": 1}, Limits()).ready()
