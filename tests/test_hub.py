"""What goes wrong when a model is opened, and the one line that says so."""

import http.server
import json
import os
import pickle
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from huggingface_hub.utils import hf_raise_for_status, httpx

from epd_ray.actors.beforehand import require_models
from epd_ray.backbones.auto import open_backbone
from epd_ray.backbones.index import FAMILIES
from epd_ray.config.loading import load_config
from epd_ray.errors import HubError, ModelError, TableError
from epd_ray.solvers import Solver
from epd_ray.weights import hub
from epd_ray.weights.hub import opening
from tests.families import edit, folder, load

UNET = "unet/diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def write_index(text: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / "model_index.json").write_text(text)


def without_class(directory: Path) -> None:
    index = json.loads((directory / "model_index.json").read_text())
    del index["_class_name"]
    (directory / "model_index.json").write_text(json.dumps(index))


DAMAGE: list[tuple[str, Callable[[Path], Any], str]] = [
    ("sd", shutil.rmtree, "is no directory: give a pipeline directory, a hub id, or one of shapes"),
    ("sd", lambda d: (d / "model_index.json").unlink(), "has no model_index.json: give the directory of a diffusers"),
    ("sd", write_index("{oops"), "model_index.json is not valid JSON"),
    ("sd", write_index("[1, 2]"), "model_index.json names no pipeline class: it is damaged"),
    ("sd", write_index('{"_class_name": 3}'), "model_index.json names no pipeline class: it is damaged"),
    ("sd", without_class, "model_index.json names no pipeline class: it is damaged"),
    ("sd", lambda d: (d / "model_index.json").write_bytes(b"\xff\xfe{"), "cannot be read: .*UTF-8"),
    ("sd", lambda d: truncate(d / UNET), "damaged weight file"),
    ("flux", lambda d: truncate(d / "transformer/diffusion_pytorch_model.safetensors"), "damaged weight file"),
    ("sd3", lambda d: truncate(d / "text_encoder/model.safetensors"), "damaged weight file"),
    ("ldm", lambda d: (d / "vqvae/diffusion_pytorch_model.safetensors").unlink(), "no file named .*directory .*vqvae"),
    ("sdxl", lambda d: (d / "text_encoder_2/model.safetensors").unlink(), "no file named .*text_encoder_2"),
    ("sd", lambda d: shutil.rmtree(d / "unet"), "no file named .*config.json"),
    ("ddpm", lambda d: edit(d / "unet/config.json", block_out_channels=[8, 32]), "size mismatch|expected shape"),
    ("flux", lambda d: edit(d / "text_encoder/config.json", hidden_size=64), "mismatch|shape"),
    ("sd3", lambda d: shutil.rmtree(d / "tokenizer_2"), "a CLIPTokenizer without words: its files are missing"),
    ("sd", lambda d: shutil.rmtree(d / "scheduler"), "scheduler"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE)
def test_damage_is_named_in_one_line(name: str, damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder(name), copy)
    damage(copy)
    with pytest.raises(ModelError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


@pytest.mark.parametrize("name", ["StableDiffusionInpaintPipeline", "WanImageToVideoPipeline"])
def test_other_pipelines_are_told_what_is_supported(name: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ModelError, match=f"{name}.*DDIMPipeline, .*StableDiffusionXL") as caught:
        load(tmp_path)
    assert all(known in str(caught.value) for known in FAMILIES.names()) and str(tmp_path) in str(caught.value)


# ---- layouts that published models have


def test_a_safety_checker_is_neither_needed_nor_loaded(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder("sd"), copy)
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    edit(
        copy / "model_index.json", safety_checker=checker, feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )  # fmt: skip
    backbone = load(copy)  # there are no files of either
    assert backbone.pipeline.safety_checker is None and backbone.pipeline.feature_extractor is None
    assert torch.equal(backbone.encode(["a"], 1.0).tensors[0], load(folder("sd")).encode(["a"], 1.0).tensors[0])


def test_components_may_lie_beside_the_index(tmp_path: Path) -> None:
    flat = tmp_path / "model"
    shutil.copytree(folder("ddpm"), flat)
    for part in ("unet", "scheduler"):
        for file in (flat / part).iterdir():
            file.rename(flat / file.name)
        (flat / part).rmdir()
    x = load(flat).noise(0)[None]
    sigma, nothing = torch.ones(1), load(flat).encode(["a"], 1.0)
    assert torch.equal(load(flat).drift(x, sigma, nothing), load(folder("ddpm")).drift(x, sigma, nothing))


def test_ddim_pipelines_open_as_ddpm(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder("ddpm"), copy)
    edit(copy / "model_index.json", _class_name="DDIMPipeline")
    assert load(copy).family == "ddpm"


# ---- pickles


class Bomb:
    """Makes a directory when unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.target,)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("part", "safe", "plain"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_pickles_are_refused_and_never_run(part: str, safe: str, plain: str, zipped: bool, tmp_path: Path) -> None:
    copy, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(folder("sd"), copy)
    (copy / part / safe).unlink()
    bomb = {"weight": Bomb(marker)}
    if zipped:
        torch.save(bomb, copy / part / plain)
    else:
        (copy / part / plain).write_bytes(pickle.dumps(bomb))
    with pytest.raises(ModelError, match=r"pickle.*safetensors") as caught:
        load(copy)
    assert not marker.exists() and "\n" not in str(caught.value) and str(copy) in str(caught.value)
    pickle.loads(pickle.dumps(bomb))
    assert marker.exists()  # it would have


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pickles_of_tensors_alone_open(part: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    copy = tmp_path / "model"
    shutil.copytree(folder("sd"), copy)
    safe = next((copy / part).glob("*.safetensors"))
    weights = load_file(safe)
    safe.unlink()
    torch.save(weights, copy / part / ("diffusion_pytorch_model.bin" if part == "unet" else "pytorch_model.bin"))
    ours, theirs = load(copy).encode(["a"], 1.0), load(folder("sd")).encode(["a"], 1.0)
    assert torch.equal(ours.tensors[0], theirs.tensors[0])


# ---- the hub


def answer(status: int, code: str, message: str) -> Exception:
    """The exception that huggingface_hub raises for an answer of the hub."""
    request = httpx.Request("HEAD", "https://huggingface.co/owner/name/resolve/main/model_index.json")
    headers = {"x-error-code": code, "x-error-message": message, "x-request-id": "Root=1-abc"}
    try:
        hf_raise_for_status(httpx.Response(status, headers=headers, request=request))
    except errors.HfHubHTTPError as error:
        return error
    raise AssertionError


def offline() -> Exception:
    error = errors.LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub and so on.")
    error.__cause__ = errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled.")
    return error


NOT_LISTED = "Access to model owner/name is restricted and you are not in the authorized list."
HUB: list[tuple[Callable[[], Exception], type[Exception], list[str]]] = [
    (
        lambda: answer(403, "GatedRepo", NOT_LISTED), errors.GatedRepoError,
        ["Cannot access gated repo for url", NOT_LISTED, "accept its licence on the model's page", "set HF_TOKEN"],
    ),
    (
        lambda: answer(401, "GatedRepo", "You must be authenticated."), errors.GatedRepoError,
        ["You must be authenticated", "accept its licence", "set HF_TOKEN"],
    ),
    (
        lambda: answer(401, "RepoNotFound", "Invalid username or password."), errors.RepositoryNotFoundError,
        ["Repository Not Found for url", "check the name; for a private model, set HF_TOKEN", "cluster.env"],
    ),
    (
        lambda: answer(401, "", "Invalid credentials in Authorization header"), errors.HfHubHTTPError,
        ["401 Unauthorized", "(set HF_TOKEN"],
    ),
    (
        lambda: answer(404, "RevisionNotFound", "Invalid rev id: nope"), errors.RevisionNotFoundError,
        ["Revision Not Found for url", "Invalid rev id: nope", "check the revision: give a branch, a tag or a commit"],
    ),
    (
        lambda: answer(404, "EntryNotFound", "Entry not found"), errors.RemoteEntryNotFoundError,
        ["Entry Not Found for url", "the repository has no such file"],
    ),
    (
        offline,
        errors.LocalEntryNotFoundError,
        ["not in the local cache, and the hub cannot be reached", "epd-ray fetch"],
    ),
    (
        lambda: errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co/x: offline mode is enabled."),
        errors.OfflineModeIsEnabled,
        ["HF_HUB_OFFLINE", "the hub cannot be reached"],
    ),
    (lambda: answer(500, "", ""), errors.HfHubHTTPError, ["500 Internal Server Error"]),
    (lambda: answer(429, "", ""), errors.HfHubHTTPError, ["429 Too Many Requests"]),
    (lambda: httpx.ReadTimeout("The read operation timed out"), httpx.ReadTimeout, ["The read operation timed out"]),
]  # fmt: skip


def refuse(error: Exception) -> Callable[..., Any]:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    return raising


def one_line(caught: pytest.ExceptionInfo[ModelError], expected: list[str]) -> None:
    text = str(caught.value)
    assert "\n" not in text and text.startswith("model 'owner/name' cannot be opened: ")
    assert all(part in text for part in expected), text
    assert "Request ID" not in text or "' for url '" in text


@pytest.mark.parametrize(("make", "kind", "expected"), HUB)
def test_the_hubs_refusals(
    make: Callable[[], Exception], kind: type[Exception], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = make()
    assert type(error) is kind
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse(error))
    with pytest.raises(ModelError) as caught:
        open_backbone(model="owner/name", device="cpu")
    one_line(caught, expected)


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize(
    ("make", "kind", "expected"), [case for case in HUB[:7] if case[1] is not errors.RemoteEntryNotFoundError]
)
def test_the_hubs_refusals_as_the_libraries_wrap_them(
    library: str, make: Callable[[], Exception], kind: type[Exception], expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Each library's own loader of one file, whose download fails.
    error = make()
    where = "diffusers.configuration_utils" if library == "diffusers" else "transformers.utils.hub"
    monkeypatch.setattr(f"{where}.hf_hub_download", refuse(error))
    loader = diffusers.UNet2DModel if library == "diffusers" else transformers.CLIPTextModel
    with pytest.raises(ModelError) as caught, opening("owner/name"):
        loader.from_pretrained("owner/name")
    one_line(caught, expected)


def test_offline_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="the hub cannot be reached") as caught:
        open_backbone(model="owner/name", device="cpu")
    one_line(caught, ["epd-ray fetch"])


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A process that may ask the hub, and forgets the answer after the test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
    return monkeypatch


@pytest.mark.parametrize("listens", [False, True])
def test_a_hub_that_gives_no_answer_is_asked_for_seconds_alone(asking: pytest.MonkeyPatch, listens: bool) -> None:
    """The hub's own client tries for 23 s where nobody listens, and for minutes where nobody answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen(100)
        asking.setattr("huggingface_hub.constants.ENDPOINT", url := f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ModelError, match="the hub cannot be reached") as caught:
            open_backbone(model="owner/name", device="cpu")
        one_line(caught, [url, "epd-ray fetch"])
        with pytest.raises(TableError, match="the hub cannot be reached"):
            Solver.from_pretrained("owner/other")
        assert time.monotonic() - start < 15
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # for the processes that this one starts


HEADS = "rewards={a: {head: pickscore}, b: {head: clip, options: {model: owner/clip}}}"


def test_the_weights_of_all_heads_are_missed_in_one_line_at_one_attempt(asking: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    asking.setattr(hub, "_answers", lambda endpoint: bool(asked.append(endpoint)))
    asking.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(HubError) as caught:
        require_models(load_config(None, [HEADS]))
    assert str(caught.value) == (
        "rewards.a: yuvalkirstain/PickScore_v1, rewards.b: owner/clip: not in the local cache, and the hub cannot be "
        f"reached at {asked[0]}: it does not answer, or HF_HUB_OFFLINE is set (run epd-ray fetch where it can be)"
    )
    assert len(asked) == 1


def test_weights_in_the_cache_need_no_hub(asking: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("yuvalkirstain--PickScore_v1", "owner--clip"):
        (tmp_path / f"models--{name}" / "snapshots" / COMMIT).mkdir(parents=True)
    asking.setattr(hub, "_answers", lambda endpoint: pytest.fail("the hub was asked"))
    asking.delenv("RAY_ADDRESS", raising=False)
    require_models(load_config(None, [HEADS]))
    asking.setenv("RAY_ADDRESS", "127.0.0.1:9")  # the cluster's nodes have caches of their own
    require_models(load_config(None, ["rewards={a: {head: imagereward}}"]))


def test_a_hub_that_answers_anything_is_there(asking: pytest.MonkeyPatch) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # 501 to everything
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asking.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    hub.seek_hub()
    server.shutdown()
    server.server_close()
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "0"


def test_names_that_are_no_hub_ids() -> None:
    with pytest.raises(ModelError, match="'owner/name'") as caught:
        open_backbone(model="owner/na me", device="cpu")
    assert "\n" not in str(caught.value)


def test_the_revision_is_asked_for_and_the_commit_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(folder("sd"), snapshot)
    asked: list[tuple[str, str, Any]] = []
    original = diffusers.StableDiffusionPipeline.from_pretrained

    def download(repo: str, file: str, revision: str | None = None) -> str:
        asked.append((repo, file, revision))
        return str(snapshot / file)

    def from_pretrained(location: str, *, revision: str | None = None, **options: Any) -> Any:
        asked.append((location, "", revision))
        return original(snapshot, **options)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", from_pretrained)
    plain = {"model": "owner/name", "device": "cpu", "dtype": "float32", "resolution": 16}
    backbone = open_backbone(**plain, revision="v1.0")
    assert asked == [("owner/name", "model_index.json", "v1.0"), ("owner/name", "", COMMIT)]
    assert backbone.facts["revision"] == COMMIT and backbone.model_id == "owner/name"
    assert open_backbone(**plain).facts["revision"] == COMMIT and asked[2:] == [
        ("owner/name", "model_index.json", None), ("owner/name", "", COMMIT),
    ]  # fmt: skip


# ---- anything else


def test_only_failures_of_loading_are_explained() -> None:
    with pytest.raises(ZeroDivisionError), opening("m"):
        _ = 1 / 0
    with pytest.raises(ModelError, match=r"^as it was$"), opening("m"):
        raise ModelError("as it was")
    with (
        pytest.raises(ModelError, match=r"'m'.*first: second$"),
        opening("m", "CLIP model"),
    ):
        raise OSError("first:\n  second\nthird")
    with pytest.raises(ModelError, match=r"'m'.*OSError$"), opening("m"):
        raise OSError
    with pytest.raises(ModelError, match=r"cannot be opened: ~/weights$"), opening("m"):
        raise OSError(str(Path.home() / "weights"))
