import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from epd_ray.backbones.cache import Embedding, EmbeddingCache
from epd_ray.backbones.sd3 import SD3Backbone
from epd_ray.errors import ModelError
from epd_ray.sampling import Sampler, baseline, noises
from epd_ray.solvers import SolverTable
from tests.tiny_models import TOKENS, save_sd3

PROMPTS = ["a small red circle in the center on a white background", "a large blue star at the top"]
SEEDS = [3, 4]


@dataclass
class Calls:
    """What a module was called with: batch size and dtype of its first input."""

    batches: list[int] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)

    def watch(self, module: nn.Module) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()))
            self.batches.append(len(first))
            self.dtypes.append(first.dtype)

        return module.register_forward_pre_hook(note, with_kwargs=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sd3(tmp_path_factory.mktemp("sd3_t5"), t5=True)


def load(folder: Path, dtype: str = "float32", **options: Any) -> SD3Backbone:
    return SD3Backbone(model=str(folder), device="cpu", dtype=dtype, max_sequence_length=TOKENS, **options)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> SD3Backbone:
    return load(folder)


def run(backbone: SD3Backbone, sampler: Sampler, guidance_scale: float) -> Tensor:
    return sampler.run(backbone, backbone.encode(PROMPTS, guidance_scale), noises(backbone, SEEDS))


def diffusers_run(backbone: SD3Backbone, steps: int, guidance_scale: float, output: str) -> Tensor:
    images: Tensor = backbone.pipeline(
        PROMPTS, latents=noises(backbone, SEEDS), num_inference_steps=steps, guidance_scale=guidance_scale,
        max_sequence_length=TOKENS, output_type=output,
    ).images  # fmt: skip
    return images


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
@pytest.mark.parametrize("t5", [False, True])
def test_euler_is_the_diffusers_pipeline(t5: bool, guidance_scale: float, request: pytest.FixtureRequest) -> None:
    backbone = load(request.getfixturevalue("t5_folder" if t5 else "folder"))
    assert (backbone.pipeline.text_encoder_3 is not None) == t5
    ours = run(backbone, baseline("euler", 4), guidance_scale)
    theirs = diffusers_run(backbone, 4, guidance_scale, "latent")
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert (ours - noises(backbone, SEEDS)).abs().max() > 0.5  # the networks do something
    pictures = diffusers_run(backbone, 4, guidance_scale, "pt")
    assert torch.allclose(backbone.decode(ours), pictures, atol=2e-5)
    other = baseline("euler", 4).run(backbone, backbone.encode(PROMPTS[::-1], guidance_scale), noises(backbone, SEEDS))
    assert (ours - other).abs().max() > 1e-3  # the prompts matter


def test_guidance_changes_the_picture(backbone: SD3Backbone) -> None:
    plain, guided = (run(backbone, baseline("euler", 2), g) for g in (1.0, 7.0))
    assert (plain - guided).abs().max() > 1e-2


@pytest.mark.parametrize("count", [1, 4, 10])
def test_sigmas_are_the_schedulers_own(backbone: SD3Backbone, count: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(count + 1)
    assert torch.equal(backbone.sigmas(count), scheduler.sigmas[:-1].double())
    scheduler.set_timesteps(count)
    assert torch.equal(backbone.sigmas(count, final_zero=True), scheduler.sigmas.double())
    assert backbone.sigmas(count, final_zero=True)[-1] == 0


def test_sigmas_of_sd3(folder: Path) -> None:
    backbone = load(folder)
    backbone.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = backbone.sigmas(10)
    assert sigmas[[0, 1, 9, 10]].tolist() == pytest.approx([1.0, 0.96440, 0.25559, 0.008929], abs=1e-5)


def test_repeat_keeps_each_half_together(backbone: SD3Backbone) -> None:
    single, repeated = backbone.encode(PROMPTS, 7.0), backbone.encode(PROMPTS, 7.0).repeat(2)
    assert (len(single), len(repeated)) == (2, 4)
    assert torch.equal(repeated.embeds, single.embeds[[0, 0, 1, 1, 2, 2, 3, 3]])
    x, sigma = noises(backbone, SEEDS), torch.tensor([0.9, 0.4])
    rows = backbone.drift(x.repeat_interleave(2, 0), sigma.repeat_interleave(2), repeated)
    assert torch.allclose(rows, backbone.drift(x, sigma, single).repeat_interleave(2, 0), atol=1e-5)
    assert (rows[0] - rows[2]).abs().max() > 1e-2


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_two_forwards_an_interval(backbone: SD3Backbone, guidance_scale: float) -> None:
    table = SolverTable(torch.tensor([[0.3, 0.8]] * 3), torch.full((3, 2), 0.5))
    calls = Calls()
    hook = calls.watch(backbone.pipeline.transformer)
    run(backbone, Sampler("epd", 3, "epd", "EPD", table), guidance_scale)
    hook.remove()
    halves = 2 if guidance_scale > 1 else 1
    assert calls.batches == [2 * halves, 4 * halves] * 3


def test_half_precision_stops_at_the_networks_door(folder: Path) -> None:
    backbone = load(folder, dtype="bfloat16")
    calls = Calls()
    calls.watch(backbone.pipeline.transformer)
    x = run(backbone, baseline("dpm2", 4), 7.0)
    assert set(calls.dtypes) == {torch.bfloat16}
    d = backbone.drift(noises(backbone, SEEDS), torch.full((2,), 0.9), backbone.encode(PROMPTS, 7.0))
    assert d.dtype == torch.float32 and not torch.equal(d, d.bfloat16().float())  # guided in float32
    assert x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float())
    assert backbone.decode(x).dtype == torch.float32


def test_each_distinct_prompt_is_encoded_once(folder: Path) -> None:
    backbone = load(folder)
    calls = Calls()
    calls.watch(backbone.pipeline.text_encoder)
    first = backbone.encode([*PROMPTS, PROMPTS[0]], 7.0)
    assert calls.batches == [1] * 3  # two prompts and the empty one, each alone
    assert torch.equal(backbone.encode(PROMPTS, 1.0).embeds, first.embeds[3:5])
    assert len(calls.batches) == 3
    assert torch.equal(first.embeds[3], first.embeds[5]) and not torch.equal(first.embeds[3], first.embeds[4])


def test_cache_drops_the_least_recently_used_by_bytes() -> None:
    encoded: list[str] = []

    def encode(prompt: str) -> Embedding:
        encoded.append(prompt)
        return torch.full((3,), float(len(encoded))), torch.zeros(2, dtype=torch.bfloat16)  # 12 + 4 bytes

    cache = EmbeddingCache(encode, max_bytes=40)  # room for two
    first = cache(["a", "b"])
    assert cache.num_bytes == 32 and cache(["a"])[0] is first[0]
    cache(["c"])  # drops b, not a
    assert cache.num_bytes == 32 and cache(["a", "c"])[0] is first[0] and encoded == ["a", "b", "c"]
    cache(["b"])
    assert encoded == ["a", "b", "c", "b"]
    assert len(EmbeddingCache(encode, max_bytes=15)(["a", "a"])) == 2 and encoded[-2:] == ["a", "a"]  # fits none


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def edit_index(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "is no directory: give a pipeline directory, a hub id, or one of shapes"),
        (
            lambda d: truncate(d / "transformer/diffusion_pytorch_model.safetensors"),
            "transformer/diffusion_pytorch_model",
        ),
        (lambda d: truncate(d / "text_encoder/model.safetensors"), "damaged weight file"),
        (lambda d: (d / "vae/diffusion_pytorch_model.safetensors").unlink(), "no file named .* in directory .*vae"),
        (lambda d: (d / "model_index.json").write_text("{oops"), "model_index.json' is not a valid JSON file"),
        (lambda d: (d / "model_index.json").unlink(), "no file named model_index.json"),
        (lambda d: edit_index(d / "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline, not a Stable"),
        (lambda d: edit_index(d / "transformer/config.json", num_attention_heads=4), "size mismatch for pos_embed"),
        (lambda d: shutil.rmtree(d / "tokenizer_2"), "a CLIPTokenizer without words: its files are missing"),
    ],
)
def test_damage_is_named_in_one_line(folder: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(ModelError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_resolution(folder: Path) -> None:
    assert load(folder).noise(0).shape == (4, 8, 8)
    assert load(folder, resolution=12).noise(0).shape == (4, 6, 6)
    with pytest.raises(ModelError, match="resolution 13 is not a multiple of 4: use 12"):
        load(folder, resolution=13)
