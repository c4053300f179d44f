"""Opening pipelines: every option, and what is refused."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import diffusers
import pytest
import torch
from torch import Tensor

from epd_ray.backbones import BACKBONES
from epd_ray.backbones.cache import Embedding, EmbeddingCache, Prompt
from epd_ray.backbones.index import read_index
from epd_ray.backbones.variants import pick_variant
from epd_ray.bench.random_models import random_backbone
from epd_ray.drawing.sampler import baseline
from epd_ray.errors import ConfigError, ModelError
from epd_ray.solvers.conditioned import noises
from epd_ray.weights.devices import pick_dtype
from tests.families import (
    FREE,
    MODELS,
    ONE_OF_EACH,
    PROMPTS,
    SEEDS,
    TEXT,
    Calls,
    backbones,
    denoiser,
    edit,
    folder,
    load,
    run,
)
from tests.tiny_models import TOKENS

# ---- embeddings


def test_each_distinct_prompt_is_encoded_once_and_alone() -> None:
    backbone = load(folder("sd3_t5"))
    with Calls(backbone.pipeline.text_encoder) as calls:
        first = backbone.encode([*PROMPTS, PROMPTS[0]], 7.0)
        assert calls.batches == [1] * 3  # two prompts and the empty one
        again = backbone.encode(PROMPTS, 1.0)
        assert len(calls.batches) == 3
    assert torch.equal(again.tensors[0], first.tensors[0][3:5])
    assert torch.equal(first.tensors[0][3], first.tensors[0][5])
    assert not torch.equal(first.tensors[0][3], first.tensors[0][4])


def test_cache_drops_the_least_recently_used_by_bytes() -> None:
    encoded: list[Prompt] = []

    def encode(prompt: Prompt) -> Embedding:
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


@pytest.mark.parametrize("name", TEXT)
def test_text_encoders_and_networks_open_apart(name: str) -> None:
    whole = backbones(name)
    text = load(folder(name), parts="text", resolution=None)
    image = load(folder(name), parts="image")
    loaded = {n for n, p in text.pipeline.components.items() if isinstance(p, torch.nn.Module)}
    drawing = {n for n, p in image.pipeline.components.items() if isinstance(p, torch.nn.Module)}
    assert all(n.startswith("text_encoder") for n in loaded) and not any(n.startswith("text") for n in drawing)
    assert len(loaded) == {"sd": 1, "sdxl": 2, "sd3_t5": 3, "flux": 2}[name] and "vae" in drawing and len(drawing) == 2
    with pytest.raises(ModelError, match=f"'{folder(name)}'.*text encoders"):
        image.encode(PROMPTS, 7.0)
    asked: list[Prompt] = []

    def elsewhere(prompt: Prompt) -> Embedding:
        asked.append(prompt)
        return text.embeddings([prompt])[0]

    image.encode_with(elsewhere)
    for guidance_scale in (1.0, 7.0):
        ours, theirs = image.encode(PROMPTS, guidance_scale), whole.encode(PROMPTS, guidance_scale)
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors, theirs.tensors, strict=True))
    assert len(asked) == len(set(asked)) and set(asked) == (
        {*PROMPTS, None} if name in FREE else {*PROMPTS}
    )  # cached here too
    sampler = baseline("euler", 2)
    assert torch.equal(run(image, sampler, 7.0), run(whole, sampler, 7.0))
    assert image.truncated([*PROMPTS, "red " * 300]) == whole.truncated([*PROMPTS, "red " * 300]) >= 1


def test_truncation_counts_the_encoder_that_reads_most() -> None:
    def words(count: int) -> str:
        return " ".join(["red"] * count)  # one token each; CLIP adds two, T5 one

    for name in ("sd", "sdxl", "sd3"):
        assert backbones(name).truncated([words(10), words(TOKENS - 2), words(TOKENS - 1)]) == 1
    sd = load(folder("sd"))
    sd.pipeline.tokenizer.model_max_length = 77  # as in the published models
    assert sd.truncated([words(75), words(76)]) == 1
    t5 = load(folder("sd3_t5"), max_sequence_length=100)
    assert t5.truncated([words(76), words(99), words(100)]) == 1
    assert load(folder("sd3_t5"), max_sequence_length=None).truncated([words(255), words(256)]) == 1
    assert backbones("flux").truncated([words(TOKENS - 1), words(TOKENS)]) == 1  # CLIP would take both
    assert load(folder("flux"), max_sequence_length=None).truncated([words(511), words(512)]) == 1
    assert backbones("ddpm").truncated([words(1000)]) == 0


# ---- options


@pytest.mark.parametrize(
    ("name", "resolution", "latent", "wrong", "message"),
    [
        ("sd3", 12, (4, 6, 6), 13, "resolution 13 is not a positive multiple of 4: use 12"),
        ("flux", 8, (4, 4, 4), 10, "resolution 10 is not a positive multiple of 4: use 8"),
        ("sd", 24, (4, 12, 12), 20, "resolution 20 is not a positive multiple of 8: use 16"),
        ("sdxl", 8, (4, 4, 4), 4, "resolution 4 is not a positive multiple of 8: use 8"),
        ("ddpm", 12, (3, 12, 12), 15, "resolution 15 is not a positive multiple of 2: use 14"),
        ("ldm", 12, (3, 6, 6), 14, "resolution 14 is not a positive multiple of 4: use 12"),
    ],
)
def test_resolution(name: str, resolution: int, latent: tuple[int, ...], wrong: int, message: str) -> None:
    own = load(folder(name), resolution=None)
    assert own.resolution == own.facts["resolution"] == (256 if name == "flux" else 16)  # FluxPipeline has a constant
    backbone = load(folder(name), resolution=resolution)
    assert backbone.noise(0).shape == latent and backbone.facts["resolution"] == resolution
    assert backbone.decode(run(backbone, baseline("euler", 1), 3.0)).shape == (2, 3, resolution, resolution)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder(name), resolution=wrong)
    assert str(folder(name)) in str(caught.value)


@pytest.mark.parametrize(("name", "sizes"), [("sd", [8, 8]), ("sdxl", [8, 8]), ("ddpm", [16, 16]), ("ldm", [8, 8])])
def test_sizes_may_be_pairs(name: str, sizes: list[int], tmp_path: Path) -> None:
    model = MODELS[name](tmp_path / "m")
    config = edit(model / "unet/config.json", sample_size=sizes)
    assert load(model, resolution=None).resolution == 16
    edit(config, sample_size=[8, 16])
    with pytest.raises(ModelError, match=r"m'.*sample_size \[8, 16\].*resolution"):
        load(model, resolution=None)
    edit(config, sample_size=None)
    with pytest.raises(ModelError, match=r"m'.*sample_size.*resolution"):
        load(model, resolution=None)
    assert load(model, resolution=16).resolution == 16


def test_sd3_ends_where_its_positions_do() -> None:
    backbone = load(folder("sd3"), resolution=32)
    run(backbone, baseline("euler", 1), 1.0)
    with pytest.raises(ModelError, match=r"resolution 36.*\b32"):
        load(folder("sd3"), resolution=36)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": "foo"}, "parts is 'foo', expected one of all, text, image"),
        ({"offload": "disk"}, "offload is 'disk', expected one of none, model, sequential"),
        ({"max_sequence_length": -1}, "max_sequence_length is -1, expected at least 1"),
        ({"max_sequence_length": 0}, "max_sequence_length is 0, expected at least 1"),
        ({"resolution": 0}, "resolution is 0, expected at least 1"),
        ({"embedding_cache_mib": -1}, "embedding_cache_mib is -1, expected at least 0"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(folder("sd3"), **options)


def test_sdxl_is_told_the_size() -> None:
    for size in (16, 24):
        backbone = load(folder("sdxl"), resolution=size)
        told: list[Tensor] = []
        hook = backbone.pipeline.unet.register_forward_pre_hook(
            lambda _, __, kwargs, told=told: told.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
        )
        run(backbone, baseline("euler", 1), 3.0)
        hook.remove()
        assert told[0].tolist() == [[size, size, 0, 0, size, size]] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_embeddings_of_another_dtype_are_taken(dtype: torch.dtype) -> None:
    """As of an encoder actor whose device computes in another one."""
    backbone = random_backbone("sd3", "small", resolution=64, device="cpu", dtype="bfloat16")
    (embedding,) = backbone.embeddings(["a red circle"])
    x = backbone.initial(backbone.noise(0)[None])
    expected = backbone.drift(x, torch.tensor([0.5]), backbone.encode(["a red circle"], 1.0))
    backbone.encode_with(lambda _: tuple(part.to(dtype) for part in embedding))
    found = backbone.drift(x, torch.tensor([0.5]), backbone.encode(["a red circle"], 1.0))
    torch.testing.assert_close(found, expected)


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    model = MODELS["sd3"](tmp_path / "m")
    before = read_index(str(model), None).fingerprint
    assert before == read_index(str(model), None).fingerprint and len(str(before)) == 16
    path = next((Path(model) / "transformer").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read_index(str(model), None).fingerprint != before


def test_facts_say_what_the_model_is() -> None:
    facts = backbones("sd_v").facts
    assert facts["revision"] is None and json.loads(json.dumps(facts)) == facts
    assert facts["scheduler"] == {
        "prediction_type": "v_prediction", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }  # fmt: skip
    assert facts["dtype"] == "float32" and len(str(facts["fingerprint"])) == 16
    flow = {"prediction_type": "flow_prediction", "num_train_timesteps": 1000}
    assert backbones("sd3").facts["scheduler"] == backbones("flux").facts["scheduler"] == flow
    assert [backbones(n).family for n in ONE_OF_EACH] == ["sd", "sd", "sdxl", "sd3", "flux", "ddpm", "ddpm"]
    assert [backbones(n).form for n in ONE_OF_EACH] == ["ve", "ve", "ve", "flow", "flow", "ve", "ve"]


def test_attention_backends() -> None:
    model = folder("flux")
    backbone = load(model, attention="native")
    sampler = baseline("euler", 2)
    assert torch.allclose(run(backbone, sampler, 3.0), run(backbones("flux"), sampler, 3.0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match=f"'{model}'.*'nativ'.*[ ,]native(?!_)"):
        load(model, attention="nativ")


@pytest.mark.parametrize("name", [name for name in TEXT if name != "flux"])
def test_an_attention_backend_that_no_layer_would_use_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="attention='native'"):
        load(folder(name), attention="native")


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "ddpm"])
def test_compile_compiles_the_network_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer's blocks, each by itself; another network whole."""
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    assert compiled == [] and load(folder(name)) and compiled == []
    backbone = load(folder(name), compile=True)
    network = denoiser(backbone)
    blocks = [
        type(block).__name__
        for stack in ("transformer_blocks", "single_transformer_blocks")
        for block in getattr(network, stack, ())
    ]
    assert compiled == (blocks or [type(network).__name__])
    assert len(blocks) >= 2 or name in ("sd", "ddpm")


@pytest.mark.parametrize(
    "name", [pytest.param("ddpm", marks=pytest.mark.nightly), pytest.param("sd3", marks=pytest.mark.slow)]
)
def test_a_compiled_network_gives_the_same(name: str) -> None:
    plain = backbones(name)
    x, sigma, nothing = noises(plain, SEEDS), torch.tensor([0.5, 0.2]), plain.encode(PROMPTS, 1.0)
    with torch.no_grad():
        compiled = load(folder(name), compile=True).drift(x, sigma, nothing)
        assert torch.allclose(compiled, plain.drift(x, sigma, nothing), rtol=1e-4, atol=1e-4)


def test_vae_options() -> None:
    plain, both = load(folder("sd")), load(folder("sd"), vae_slicing=True, vae_tiling=True)
    assert (plain.pipeline.vae.use_slicing, plain.pipeline.vae.use_tiling) == (False, False)
    assert (both.pipeline.vae.use_slicing, both.pipeline.vae.use_tiling) == (True, True)
    latents = noises(plain, SEEDS)
    sliced = load(folder("sd"), vae_slicing=True)
    assert torch.allclose(sliced.decode(latents), plain.decode(latents), atol=1e-5)


@pytest.mark.parametrize("option", ["vae_slicing", "vae_tiling"])
@pytest.mark.parametrize("name", ["ddpm", "ldm"])
def test_vae_options_are_refused_where_they_would_do_nothing(name: str, option: str) -> None:
    with pytest.raises(ModelError, match=f"{option}.*false"):
        load(folder(name), **{option: True})
    assert load(folder("sd"), parts="text", **{option: True}).pipeline.vae is None  # where there is none to decode


@pytest.mark.parametrize("name", ["ddpm", "ldm"])
def test_text_parts_of_what_has_none(name: str, warned: pytest.LogCaptureFixture) -> None:
    backbone = load(folder(name), parts="text", resolution=None)
    assert not any(isinstance(part, torch.nn.Module) for part in backbone.pipeline.components.values())
    assert "not expected" not in warned.text


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What diffusers logs, which does not propagate."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("name", TEXT)
def test_cut_prompts_are_not_quoted(name: str, warned: pytest.LogCaptureFixture) -> None:
    backbone = load(folder(name))
    loggers = [
        logging.getLogger(n) for n in (type(backbone.pipeline).__module__, "transformers.tokenization_utils_base")
    ]
    before = [list(logger.filters) for logger in loggers]
    backbone.encode(["red " * 300], 7.0)
    assert not warned.records and [logger.filters for logger in loggers] == before
    backbone._family.embed("red " * 300, backbone.device)
    assert "red red" in warned.text  # it would have been
    with pytest.raises((TypeError, ValueError, AttributeError)):
        backbone.encode([3], 7.0)  # type: ignore[list-item]
    assert [logger.filters for logger in loggers] == before


def test_what_does_not_fit_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(diffusers.DDPMPipeline, "to", full)
    with pytest.raises(ModelError, match=r"cpu in float32.*offload='none'") as caught:
        load(folder("ddpm"))
    assert str(folder("ddpm")) in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_placed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.is_accelerate_available", lambda: True)
    monkeypatch.setattr("epd_ray.backbones.loading.pick_device", lambda _: torch.device("meta"))
    monkeypatch.setattr(diffusers.LDMPipeline, "from_pretrained", without("low_cpu_mem_usage", diffusers.LDMPipeline))
    with pytest.raises(ModelError, match=r"offload='model'.*LDMPipeline.*sequential"):
        load(folder("ldm"), offload="model")
    for error, message in (
        (ValueError("no"), "model '.*' cannot be opened: no"),
        (ImportError("old"), "'sequential': old"),
    ):
        monkeypatch.setattr(diffusers.LDMPipeline, "enable_sequential_cpu_offload", Mock(side_effect=error))
        with pytest.raises(ModelError, match=message):
            load(folder("ldm"), offload="sequential")


@pytest.mark.parametrize(
    ("device", "has", "dtype"),
    [
        ("cuda:0", True, torch.bfloat16), ("cuda:0", False, torch.float16), ("mps", False, torch.float16),
        ("cpu", True, torch.bfloat16), ("cpu", False, torch.float32),
    ],
)  # fmt: skip
def test_auto_is_what_the_device_computes_in(
    device: str, has: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device", nullcontext)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has or including_emulation)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has)
    assert pick_dtype("auto", torch.device(device)) == dtype
    assert pick_dtype("float16", torch.device(device)) == torch.float16


def test_auto_is_float32_for_unconditional_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    used = {name: denoiser(load(folder(name), dtype="auto")).dtype for name in ("ddpm", "ldm", "sd3")}
    assert used == {"ddpm": torch.float32, "ldm": torch.float32, "sd3": torch.bfloat16}


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offload_is_refused_where_it_cannot_be(offload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def available(answer: bool) -> None:
        monkeypatch.setattr("diffusers.utils.is_accelerate_available", lambda: answer)

    available(False)
    with pytest.raises(ModelError, match=f"offload='{offload}'.*accelerate"):
        load(folder("ddpm"), offload=offload)
    monkeypatch.setattr(diffusers.DDPMPipeline, "from_pretrained", without("low_cpu_mem_usage"))
    available(True)
    with pytest.raises(ModelError, match=r"cpu.*offload to none"):
        load(folder("ddpm"), offload=offload)


def without(name: str, pipeline: Any = diffusers.DDPMPipeline) -> Callable[..., Any]:
    """The pipeline's from_pretrained that passes everything on but one option."""
    original = pipeline.from_pretrained

    def from_pretrained(location: str, **options: Any) -> Any:
        options.pop(name)
        return original(location, low_cpu_mem_usage=False, **options)

    return from_pretrained


def test_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'auto'.*'modle'"):
        BACKBONES.build("auto", {"model": str(folder("ddpm")), "modle": "m"})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "cuda:99"}, "device 'cuda:99' is not available"), ({"dtype": "int8"}, "dtype 'int8' is unknown")],
)
def test_devices_and_dtypes_that_are_not_there(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(folder("ddpm"), **options)


def test_compile_asks_for_a_c_compiler_before_the_first_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ModelError, match=r"gcc.*compile=false"):
        load(folder("flux"), compile=True)


# ---- variants of weights


def as_variants(model: Path, *variants: str, parts: tuple[str, ...] = ("unet", "vae", "text_encoder")) -> Path:
    """Only these variants' weight files, in place of the plain ones."""
    for part in parts:
        for path in (model / part).glob("*.safetensors"):
            for variant in variants:
                shutil.copy(path, path.with_suffix(f".{variant}.safetensors"))
            path.unlink()
    return model


def test_weights_of_a_variant_alone_are_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = as_variants(MODELS["sd"](tmp_path / "m"), "fp16")
    expected = run(backbones("sd"), baseline("euler", 2), 5.0)
    with caplog.at_level(logging.WARNING, logger="epd_ray"):
        assert torch.equal(run(load(model), baseline("euler", 2), 5.0), expected)
    assert "variant fp16" in caplog.text and "text_encoder, unet, vae" in caplog.text
    mixed = as_variants(MODELS["sd"](tmp_path / "mixed"), "ema", parts=("unet",))
    assert torch.equal(run(load(mixed), baseline("euler", 2), 5.0), expected)


def test_plain_weights_come_before_a_variants(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS["sd"](tmp_path / "m")
    (model / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"never read")
    with caplog.at_level(logging.WARNING, logger="epd_ray"):
        load(model)
    assert "variant" not in caplog.text


def test_ambiguous_variants_are_named(tmp_path: Path) -> None:
    two = as_variants(MODELS["sd"](tmp_path / "two"), "fp16", "ema")
    with pytest.raises(ModelError, match=r"unet: ema, fp16.*variants but one"):
        load(two)
    apart = as_variants(as_variants(MODELS["sd"](tmp_path / "apart"), "fp16", parts=("unet",)), "ema", parts=("vae",))
    with pytest.raises(ModelError, match=r"unet: fp16; vae: ema"):
        load(apart)


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", None), ("model-00001-of-00002.safetensors", None),
        ("pytorch_model.bin", None), ("model.fp16.safetensors", "fp16"), ("pytorch_model.non_ema.bin", "non_ema"),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("model-00001-of-00002.fp16.safetensors", "fp16"),
    ],
)  # fmt: skip
def test_names_of_weight_files(file: str, variant: str | None, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / file).touch()
    (tmp_path / "unet" / f"{file}.index.json").touch()
    assert pick_variant(tmp_path, ["unet", "scheduler"], "m") == variant
