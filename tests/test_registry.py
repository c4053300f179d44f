import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epd_ray.backbones import BACKBONES
from epd_ray.backbones.index import FAMILIES
from epd_ray.errors import UnknownNameError
from epd_ray.registry import Registry, did_you_mean
from epd_ray.rewards import HEADS
from epd_ray.solvers.schedule_names import SCHEDULES
from epd_ray.solvers.schedules import check_sigmas
from epd_ray.types import Backbone, RewardHead
from tests import tiny_heads, tiny_models, tiny_pipelines, tiny_vlms
from tests.families import edit
from tests.test_http import Server, decoded, scores, send
from tests.test_judge import chat, question
from tests.tiny_models import TOKENS, save_clip

PROMPTS = ["a small red circle", "a large blue star"]
AUTO = {"device": "cpu", "dtype": "float32", "resolution": 16, "max_sequence_length": TOKENS}
MODELS: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {  # entries that need files: builder, more options
    "aesthetic": (tiny_heads.save_aesthetic, {"device": "cpu"}),
    "clip": (save_clip, {"device": "cpu"}),
    "deqa": (tiny_vlms.save_deqa, {"device": "cpu"}),
    "geneval2": (tiny_vlms.save_geneval2, {"device": "cpu"}),
    "hpsv2.1": (tiny_heads.save_hpsv2, {"device": "cpu"}),
    "hpsv3": (tiny_vlms.save_hpsv3, {"device": "cpu", "pixels": tiny_vlms.PIXELS}),
    "imagereward": (tiny_heads.save_imagereward, {"device": "cpu"}),
    "mps": (tiny_heads.save_mps, {"device": "cpu"}),
    "ocr": (tiny_vlms.save_got, {"device": "cpu", "max_new_tokens": 8}),
    "pickscore": (save_clip, {"device": "cpu"}),
    "pipeline": (partial(tiny_pipelines.save, "z_image"), AUTO),
    "unifiedreward": (tiny_vlms.save_unifiedreward, {"device": "cpu", "max_new_tokens": 8}),
    "vqascore": (tiny_vlms.save_vqascore, {"device": "cpu"}),
}
ROWS = [
    {"vqa_list": [["How many circles are there?", "two"]], "target_text": "Daily"},
    {"vqa_list": [["Is there a star?", "Yes"]], "target_text": "zz"},
]


def save_ddim(folder: Path) -> Path:
    edit(tiny_models.save_ddpm(folder) / "model_index.json", _class_name="DDIMPipeline")
    return folder


PIPELINES: dict[str, Callable[[Path], Path]] = {  # of the backbone "auto"
    "DDIMPipeline": save_ddim,
    "DDPMPipeline": tiny_models.save_ddpm,
    "FluxPipeline": tiny_models.save_flux,
    "LDMPipeline": tiny_models.save_ldm,
    "StableDiffusion3Pipeline": tiny_models.save_sd3,
    "StableDiffusionPipeline": tiny_models.save_sd,
    "StableDiffusionXLPipeline": tiny_models.save_sdxl,
}
UNCONDITIONAL = {"DDIMPipeline", "DDPMPipeline", "LDMPipeline"}


@pytest.fixture(scope="session")
def make_entry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Registry[Any], str], Any]]:
    """Makes any registry entry, with a tiny model of its own where it needs one."""
    folders: dict[str, Path] = {}
    servers: list[Server] = []

    def make(registry: Registry[Any], name: str) -> Any:
        if name == "http":
            servers.append(Server(brightness))
            threading.Thread(target=servers[-1].http.serve_forever, daemon=True).start()
            return registry.get(name)(url=servers[-1].url)
        if name == "judge":
            servers.append(Server(marks))
            threading.Thread(target=servers[-1].http.serve_forever, daemon=True).start()
            return registry.get(name)(url=servers[-1].url, model="vlm")
        if name not in {*MODELS, *PIPELINES}:
            return registry.get(name)()
        save, options = (PIPELINES[name], AUTO) if name in PIPELINES else MODELS[name]
        if name not in folders:
            folders[name] = save(tmp_path_factory.mktemp(name))
        return registry.get("auto" if name in PIPELINES else name)(model=str(folders[name]), **options)

    yield make
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def brightness(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    """What a scoring server does: the mean of each picture."""
    send(handler, scores([float(image.mean()) for image in decoded(asked)]))


def marks(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    """What a judge does: the mean of the picture, as a mark from 0 to 10."""
    pixels, _ = question(asked)
    send(handler, chat(f"{10 * pixels.mean() / 255:.6f}"))


def shelf() -> Registry[Any]:
    return Registry("shelf", {"path": "pathlib:Path", "queue": "collections:deque", "broken": "no_such_module:Thing"})


def test_names_resolve_to_what_they_stand_for() -> None:
    registry = shelf()
    assert registry.names() == ["broken", "path", "queue"]
    assert registry.get("path") is Path
    registry.register("counter", "collections:Counter")
    assert registry.get("counter")("aab")["a"] == 2
    assert "counter" not in shelf().names()


@pytest.mark.parametrize(("name", "target"), [("path", "os:PathLike"), ("new", "os.PathLike"), ("new", "a:b:c")])
def test_register_refuses(name: str, target: str) -> None:
    with pytest.raises(ValueError, match="already registered" if name == "path" else "is not of the form"):
        shelf().register(name, target)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quee", r"unknown shelf 'quee'; did you mean 'queue'\?"),
        ("zzz", "unknown shelf 'zzz'; known: broken, path, queue"),
        ("broken", "shelf 'broken' cannot be imported: No module named 'no_such_module'"),
        ("pathlib:Pth", "cannot be imported: module 'pathlib' has no attribute 'Pth'"),
        ("a:b:c", "cannot be imported"),
        (":Path", "cannot be imported"),
    ],
)
def test_unknown_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        shelf().get(name)


def test_ones_own_class_needs_no_registration() -> None:
    assert shelf().get("collections:OrderedDict")([("a", 1)])["a"] == 1


def test_entries_load_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazily_loaded.py").write_text("class Thing: ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry[Any]("shelf", {"thing": "lazily_loaded:Thing"})
    assert registry.names() == ["thing"] and "lazily_loaded" not in sys.modules
    assert registry.get("thing").__name__ == "Thing" and "lazily_loaded" in sys.modules
    del sys.modules["lazily_loaded"]


def test_suggestions() -> None:
    assert did_you_mean("gausian", ["gaussian", "sd3"]) == "; did you mean 'gaussian'?"
    assert did_you_mean("x", ["b", "a"]) == "; known: a, b"


@pytest.mark.parametrize("name", [name for name in BACKBONES.names() if name != "auto"] + FAMILIES.names())
def test_backbones_keep_their_contract(name: str, make_entry: Callable[[Registry[Any], str], Any]) -> None:
    backbone, twin = make_entry(BACKBONES, name), make_entry(BACKBONES, name)
    assert isinstance(backbone.family, str) and backbone.model_id and backbone.form in ("ve", "flow")
    assert SCHEDULES[backbone.schedule] == backbone.form
    for count in (1, 5):
        for final_zero in (False, True):
            sigmas = backbone.sigmas(count, final_zero=final_zero)
            assert sigmas.shape == (count + 1,) and sigmas.dtype == torch.float64
            check_sigmas(sigmas, allow_zero=final_zero)
            assert (sigmas[-1] == 0) == final_zero
            assert backbone.form == "ve" or sigmas[0] <= 1
    check_noise(backbone, twin)
    conditioning = backbone.encode(PROMPTS, 3.0)
    assert len(conditioning) == 2 and len(conditioning.repeat(3)) == 6 and len(backbone.encode(PROMPTS, 1.0)) == 2
    noise = torch.stack([backbone.noise(0), backbone.noise(1)])
    x, sigma = backbone.initial(noise), torch.full((2,), float(backbone.sigmas(4)[1]))
    assert len(x) == 2 and x.numel() == noise.numel() and torch.equal(x, backbone.initial(noise))
    d = backbone.drift(x, sigma, conditioning)
    assert d.shape == x.shape and d.dtype == torch.float32 and d.isfinite().all()
    assert torch.equal(d, twin.drift(x, sigma, twin.encode(PROMPTS, 3.0)))
    rows = backbone.drift(x.repeat_interleave(2, 0), sigma.repeat_interleave(2), conditioning.repeat(2))
    assert torch.allclose(rows, d.repeat_interleave(2, 0), atol=1e-5)
    swapped = backbone.drift(x, sigma, backbone.encode(PROMPTS[::-1], 3.0))
    assert ((d - swapped).abs().max() > 1e-3) == (name not in UNCONDITIONAL)
    assert backbone.default_guidance >= 1 and backbone.truncated([""]) == 0
    images = backbone.decode(5 * x)
    assert images.ndim == 4 and images.shape[:2] == (2, 3) and images.dtype == torch.float32
    assert images.device.type == "cpu" and 0 <= images.min() < images.max() <= 1
    assert torch.equal(images, twin.decode(5 * x))


def check_noise(backbone: Backbone, twin: Backbone) -> None:
    noise = backbone.noise(7)
    torch.rand(3)
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert torch.equal(noise, twin.noise(7)) and not torch.equal(noise, backbone.noise(8))
    many = torch.stack([backbone.noise(seed) for seed in range(40)])
    assert abs(many.mean()) < 0.1 and abs(many.std() - 1) < 0.1


@pytest.mark.parametrize("name", HEADS.names())
def test_heads_keep_their_contract(name: str, make_entry: Callable[[Registry[Any], str], Any]) -> None:
    head: RewardHead = make_entry(HEADS, name)
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    needs = getattr(head, "needs", ())
    assert set(needs) <= set(ROWS[0])

    def score(pictures: Tensor, prompts: list[str], rows: list[dict[str, Any]] = ROWS) -> Tensor:
        return head.score(pictures, prompts, rows=rows) if needs else head.score(pictures, prompts)  # type: ignore[call-arg]

    scores = score(images, PROMPTS)
    assert scores.shape == (2,) and scores.dtype == torch.float32 and scores.isfinite().all()
    assert torch.equal(images, before) and isinstance(head.model_id, str)
    assert torch.allclose(score(images.flip(0), PROMPTS[::-1], ROWS[::-1]), scores.flip(0), atol=1e-5)
    assert scores[0] != scores[1]
    extremes = score(torch.stack([torch.zeros(3, 48, 48), torch.ones(3, 48, 48)]), ["", "x " * 500])
    assert extremes.isfinite().all()
