import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from epd_ray.cli import app
from epd_ray.errors import ModelError
from epd_ray.rewards import HEADS, checkpoints
from epd_ray.rewards.checkpoints import companion, convert_module, find_file, read_tensors
from tests.tiny_heads import (
    MpsParts,
    save_aesthetic,
    save_bert,
    save_bpe,
    save_hpsv2,
    save_imagereward,
    save_mps,
    save_processor,
)

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a small red circle", "a star"]


class Bomb:
    """A pickle that would make a directory when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.zeros(2), persistent=False)


def open_mps(directory: Path, **options: Any) -> Any:
    return HEADS.get("mps")(model=str(directory), device="cpu", **options)


def test_plain_files_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    torch.save(tensors, tmp_path / "plain.pt")
    torch.save({"state_dict": tensors, "epoch": 1}, tmp_path / "nested.pth")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "safe.safetensors")
    for path in tmp_path.iterdir():
        read = read_tensors(path)
        assert read.keys() == tensors.keys() and torch.equal(read["a"], tensors["a"])


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": Bomb(path.parent / "made")}))


def write_bomb(path: Path) -> None:
    torch.save({"a": Bomb(path.parent / "made")}, path)


def write_script(path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_pickle, "holds more than tensors and could run code"),
        (write_bomb, "holds more than tensors and could run code"),
        (lambda path: torch.save(Network(), path), "holds more than tensors and could run code"),
        (write_script, "is a TorchScript archive"),
        (lambda path: torch.save({"a": 1}, path), "holds no state dict"),
        (lambda path: torch.save([torch.ones(1)], path), "holds no state dict"),
    ],
)
def test_programs_are_refused(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    write(tmp_path / "weights.pt")
    with pytest.raises(ModelError, match=message) as caught:
        read_tensors(tmp_path / "weights.pt")
    assert "safetensors" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with MPS as it is published: a pickled module of classes that are nowhere to be found."""
    vocabulary = save_bpe(tmp_path)
    save_processor(tmp_path)
    program = ModuleType("trainer")
    program.CLIPModel = type("CLIPModel", (MpsParts,), {"__module__": "trainer"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trainer", program)
    module = program.CLIPModel(vocabulary)
    torch.save(module, tmp_path / "MPS_overall_checkpoint.pth")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    monkeypatch.delitem(sys.modules, "trainer")
    return tmp_path


def test_mps_is_converted_once(published: Path) -> None:
    source, target = published / "MPS_overall_checkpoint.pth", published / "MPS_overall_checkpoint.safetensors"
    with pytest.raises(ModelError, match=f"convert mps {source} {target}"):
        open_mps(published)
    expected = torch.load(published / "state.pt", weights_only=True)
    assert convert_module(source, target) == len(expected)
    converted = load_file(target)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], value) for name, value in expected.items())
    assert "trainer" not in sys.modules and open_mps(published).score(IMAGES, PROMPTS).isfinite().all()


def test_conversion_executes_nothing(tmp_path: Path) -> None:
    torch.save(Network(), tmp_path / "network.pt")
    assert convert_module(tmp_path / "network.pt", tmp_path / "out.safetensors") == 3  # no passing buffer
    network = Network()
    network.bomb = Bomb(tmp_path / "made")  # type: ignore[assignment]
    torch.save(network, tmp_path / "bomb.pt")
    with pytest.raises(ModelError, match="cannot be converted"):  # os and the like are blocked by torch
        convert_module(tmp_path / "bomb.pt", tmp_path / "bomb.safetensors")
    network.bomb = Quiet()  # type: ignore[assignment]
    torch.save(network, tmp_path / "quiet.pt")
    Quiet.called = 0
    assert convert_module(tmp_path / "quiet.pt", tmp_path / "quiet.safetensors") == 3 and Quiet.called == 0
    for wrong in (lambda p: torch.save({"a": torch.ones(1)}, p), write_pickle, write_script, lambda p: None):
        wrong(tmp_path / "wrong.pt")
        with pytest.raises(ModelError, match=r"cannot be converted|holds no module"):
            convert_module(tmp_path / "wrong.pt", tmp_path / "wrong.safetensors")
        (tmp_path / "wrong.pt").unlink(missing_ok=True)
    assert not (tmp_path / "made").exists() and not (tmp_path / "wrong.safetensors").exists()


def write_legacy(path: Path) -> None:
    torch.save(Network(), path, _use_new_zipfile_serialization=False)


def cut(write: Callable[[Path], object], share: float) -> Callable[[Path], object]:
    def shortened(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return shortened


@pytest.mark.parametrize("share", [0.0, 0.002, 0.05, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_named_in_one_short_line(tmp_path: Path, share: float) -> None:
    tensors = {"a": torch.ones(200), "b": torch.ones(3)}
    writers: dict[str, Callable[[Path], object]] = {
        "new.pt": lambda path: torch.save(tensors, path),
        "old.pt": lambda path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
        "safe.safetensors": lambda path: save_file(tensors, path),
        "module.pt": lambda path: torch.save(Network(), path),
        "legacy.pt": write_legacy,
    }
    for name, write in writers.items():
        cut(write, share)(tmp_path / name)
        for read in (read_tensors, lambda path: convert_module(path, tmp_path / "out.safetensors")):
            with pytest.raises(ModelError, match=name) as caught:
                read(tmp_path / name)
            problem = str(caught.value).replace(str(tmp_path), "")
            assert "\n" not in problem and len(problem) < 160, problem
    assert not (tmp_path / "out.safetensors").exists()


def test_conversion_overwrites_nothing(tmp_path: Path) -> None:
    source = tmp_path / "network.pt"
    torch.save(Network(), source)
    before = source.read_bytes()
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "elsewhere.safetensors").symlink_to(source)
    for target, problem in {
        "network.pt": "does not end in .safetensors",
        "out": "does not end in .safetensors",
        "mine.safetensors": "already exists",
        "dangling.safetensors": "already exists",
        "elsewhere.safetensors": "already exists",
        "none/out.safetensors": "is in no existing directory: create '.*none' first",
        f"{'x' * 300}.safetensors": "cannot be written",
    }.items():
        result = CliRunner().invoke(app, ["rewards", "convert", "mps", str(source), str(tmp_path / target)])
        assert result.exit_code == 2, result.output
        assert re.fullmatch(f"error: target .*{problem}.*\n", result.stderr), result.stderr
    assert source.read_bytes() == before and (tmp_path / "mine.safetensors").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 4


class Quiet:
    """A pickle that calls a function of this very module."""

    called = 0

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return count, ()


def count() -> int:
    Quiet.called += 1
    return Quiet.called


def test_names_as_in_the_default_repository(tmp_path: Path) -> None:
    path = save_mps(tmp_path) / "MPS_overall_checkpoint.safetensors"
    before = open_mps(tmp_path).score(IMAGES, PROMPTS)
    tensors = {f"mps.{name}": value for name, value in load_file(path).items()}
    tensors["mps.model.text_model.embeddings.position_ids"] = torch.arange(24)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    path.unlink()
    assert torch.equal(open_mps(tmp_path).score(IMAGES, PROMPTS), before)


def drop(name: str, key: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / name
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        tensors = found.get("state_dict", found)
        del tensors[key]
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)

    return damage


def other(name: str) -> Callable[[Path], None]:
    return lambda directory: torch.save({"weight": torch.ones(2)}, directory / name)


def set_med(**values: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        med = json.loads((directory / "med_config.json").read_text())
        (directory / "med_config.json").write_text(json.dumps({**med, **values}))

    return change


HPS, IR = "HPS_v2.1_compressed.pt", "ImageReward.pt"
AESTHETIC, MPS = "sac+logos+ava1-l14-linearMSE.pth", "MPS_overall_checkpoint.safetensors"


@pytest.mark.parametrize(
    ("name", "save", "damage", "message"),
    [
        ("hpsv2.1", save_hpsv2, lambda d: (d / HPS).unlink(), "is a directory without HPS_v2.1_compressed.safetensors"),
        ("hpsv2.1", save_hpsv2, other(HPS), "a weight 'weight', which no open_clip ViT has"),
        ("hpsv2.1", save_hpsv2, drop(HPS, "logit_scale"), "lacks logit_scale"),
        ("hpsv2.1", save_hpsv2, drop(HPS, "visual.conv1.weight"), "lacks vision_model.embeddings.patch_embedding"),
        (
            "hpsv2.1",
            save_hpsv2,
            lambda d: (d / HPS).write_bytes(b"PK\x03\x04 cut short"),
            "compressed.pt' cannot be read",
        ),
        ("hpsv2.1", save_hpsv2, shutil.rmtree, "is no directory"),
        ("imagereward", save_imagereward, drop(IR, "blip.visual_encoder.norm.bias"), "lacks post_layernorm.bias"),
        ("imagereward", save_imagereward, drop(IR, "mlp.layers.2.bias"), "cannot be opened"),
        ("imagereward", save_imagereward, set_med(hidden_size=32), "or has them in another shape"),
        ("imagereward", save_imagereward, lambda d: (d / "med_config.json").write_text("{}"), "hidden_size: Field req"),
        ("imagereward", save_imagereward, set_med(hidden_act=["gelu"]), "hidden_act: .*fetch the published file"),
        ("imagereward", save_imagereward, set_med(num_hidden_layers="2"), "num_hidden_layers: .*given: '2'"),
        (
            "imagereward",
            save_imagereward,
            lambda d: (d / "med_config.json").write_text("[" * 5000),
            "nested too deeply",
        ),
        ("imagereward", save_imagereward, lambda d: (d / "med_config.json").unlink(), "without med_config.json"),
        ("aesthetic", save_aesthetic, other(AESTHETIC), "no layers layers"),
        ("aesthetic", save_aesthetic, lambda d: (d / "model.safetensors").unlink(), "CLIP model"),
        ("mps", save_mps, drop(MPS, "cross_model.layers.1.0.fn.to_q.weight"), "does not fit: Missing key"),
        ("mps", save_mps, drop(MPS, "cross_model.layers.0.1.fn.rotary_emb.inv_freq"), "lacks layers.0.1.fn.rotary_emb"),
        ("mps", save_mps, drop(MPS, "model.text_projection.weight"), "lacks text_projection.weight"),
    ],
)
def test_damage_is_a_model_error(
    tmp_path: Path, name: str, save: Callable[[Path], Path], damage: Callable[[Path], object], message: str
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    damage(save(directory))
    with pytest.raises(ModelError, match=message) as caught:
        HEADS.get(name)(model=str(directory), device="cpu")
    assert "\n" not in str(caught.value)


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    for name in ("small", "words", "aesthetic", "clip"):
        (tmp_path / name).mkdir()
    save_imagereward(tmp_path / "small")
    words = {f"[w{i}]": i + 5 for i in range(300)} | {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])}
    save_bert(tmp_path / "words")
    spec = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    spec["model"]["vocab"] |= {word: i + 100 for i, word in enumerate(words) if word.startswith("[w")}
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ModelError, match=r"\b43\b"):
        HEADS.get("imagereward")(model=str(tmp_path / "small"), tokenizer=str(tmp_path / "words"), device="cpu")
    save_aesthetic(tmp_path / "aesthetic")
    tensors = torch.load(tmp_path / "aesthetic" / AESTHETIC, weights_only=True)
    tensors["layers.0.weight"] = tensors["layers.0.weight"][:, :16].clone()
    torch.save(tensors, tmp_path / "aesthetic" / AESTHETIC)
    with pytest.raises(ModelError, match=r"\b16 .*\b32\b"):
        HEADS.get("aesthetic")(model=str(tmp_path / "aesthetic"), device="cpu")


def test_companions(tmp_path: Path) -> None:
    assert companion("owner/name", None, "other/words", ["tokenizer.json"]) == "other/words"
    assert companion(str(tmp_path), None, "other/words", ["tokenizer.json"]) == "other/words"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert companion(str(tmp_path), None, "other/words", ["tokenizer.json"]) == str(tmp_path)
    assert companion(str(tmp_path), "third/words", "other/words", ["tokenizer.json"]) == "third/words"
    with pytest.raises(ModelError, match="is no directory"):
        companion(str(tmp_path), str(tmp_path / "none"), "other/words", ["tokenizer.json"])


def test_files_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, cached = {"b.pt": tmp_path / "b.pt"}, {}
    asked = []

    def download(repository: str, name: str, revision: str | None) -> str:
        asked.append((repository, name, revision))
        if name == "unreachable":
            raise LocalEntryNotFoundError("no connection")
        if name not in there:
            response = httpx2.Response(404, request=httpx2.Request("GET", "http://hub.invalid"))
            raise RemoteEntryNotFoundError("404", response=response)
        return str(there[name])

    monkeypatch.setattr(checkpoints, "hf_hub_download", download)
    monkeypatch.setattr(checkpoints, "try_to_load_from_cache", lambda _, name, revision: cached.get(name))
    assert find_file("owner/name", ["a.pt", "b.pt"], "v1") == tmp_path / "b.pt"
    assert asked == [("owner/name", "a.pt", "v1"), ("owner/name", "b.pt", "v1")]
    with pytest.raises(ModelError, match=r"'owner/name'.*a\.pt or c\.pt"):
        find_file("owner/name", ["a.pt", "c.pt"])
    with pytest.raises(LocalEntryNotFoundError):
        find_file("owner/name", ["unreachable", "a.pt"])
    cached["c.pt"] = str(tmp_path / "c.pt")
    assert find_file("owner/name", ["unreachable", "c.pt"]) == tmp_path / "c.pt"
