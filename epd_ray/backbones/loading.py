"""Open a diffusers pipeline by the name of a model: its files, dtype, device, and options for memory and speed.

Diffusers and the hub's client are imported inside the functions, because that takes seconds.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from epd_ray.backbones.index import Index
from epd_ray.backbones.variants import pick_variant
from epd_ray.embedded.models import require_vocabulary
from epd_ray.errors import ModelError, shown
from epd_ray.weights.devices import pick_device, pick_dtype
from epd_ray.weights.hub import opening

Parts = Literal["all", "text", "image"]
Offload = Literal["none", "model", "sequential"]
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components that the ODE does not need


@dataclass(frozen=True)
class PipelineOptions:
    """How a pipeline is opened; the same for every family.

    Attributes:
        model: a pipeline directory, a hub id, or the name of an embedded model.
        revision: branch, tag or commit of a hub repository.
        device: a torch device, or "auto": cuda, else mps, else cpu.
        dtype: dtype of the networks: "float32", "bfloat16", "float16", or "auto", see `pick_dtype`; for unconditional
            models "auto" is float32.
        resolution: pixels per side; None means the model's own.
        max_sequence_length: number of T5 tokens, in families that have T5; None means the pipeline's default.
        offload: "model" or "sequential" moves parts to the device only while they are used; needs accelerate.
        vae_slicing: whether the VAE decodes one image at a time.
        vae_tiling: whether the VAE decodes images in tiles.
        compile: whether the denoising network is compiled by torch.compile, see `speed_up`.
        attention: a diffusers attention backend, such as "native" or "flash"; None keeps the network's own.
        embedding_cache_mib: bound on the cached prompt embeddings, in MiB.
        parts: which components are loaded: "all", only the "text" encoders, or "image": everything else.

    Raises:
        ModelError: a value outside its range.
    """

    model: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    resolution: int | None = None
    max_sequence_length: int | None = None
    offload: Offload = "none"
    vae_slicing: bool = False
    vae_tiling: bool = False
    compile: bool = False
    attention: str | None = None
    embedding_cache_mib: int = 1024
    parts: Parts = "all"

    def __post_init__(self) -> None:
        for name, known in (("offload", get_args(Offload)), ("parts", get_args(Parts))):
            if getattr(self, name) not in known:
                raise ModelError(f"{name} is {shown(getattr(self, name))}, expected one of {', '.join(known)}")
        for name, least in (("resolution", 1), ("max_sequence_length", 1), ("embedding_cache_mib", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ModelError(f"{name} is {value}, expected at least {least}")


def open_pipeline(index: Index, options: PipelineOptions, denoiser: str) -> Any:  # diffusers ships no types
    """Open the pipeline on its device, frozen.

    Args:
        index: the model's index, see `read_index`.
        options: how the pipeline is opened.
        denoiser: name of the denoising network's component, "unet" or "transformer".

    Returns:
        The pipeline; no parameter requires a gradient.

    Raises:
        ModelError: the model cannot be opened, or an option does not fit it; the message says what to do.
        ConfigError: the device or dtype is not available.
    """
    import diffusers
    from diffusers.utils import is_accelerate_available

    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    absent: dict[str, None] = {name: None for name in _left_out(index, options.parts, denoiser)}
    local = Path(index.location).is_dir()
    variant = pick_variant(Path(index.location), index.components.keys() - absent, options.model) if local else None
    with opening(options.model):
        try:
            pipeline = getattr(diffusers, index.class_name).from_pretrained(
                index.location,
                revision=index.commit or options.revision,
                dtype=dtype,
                variant=variant,
                low_cpu_mem_usage=is_accelerate_available(),
                **absent,
            )
        except ValueError as error:
            if "keep_in_fp32_modules" not in str(error):
                raise
            raise ModelError(
                f"model {shown(options.model)} keeps some weights in float32, for which diffusers needs the accelerate "
                "package: pip install accelerate"
            ) from error
    tokenizers = [p for name, p in pipeline.components.items() if name.startswith("tokenizer") and p is not None]
    require_vocabulary(options.model, tokenizers)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            if all(p.dtype != dtype for p in part.parameters()):
                part.to(dtype=dtype)  # without accelerate, diffusers may leave a network in its file's dtype
            part.requires_grad_(False)
    vae = getattr(pipeline, "vae", None)
    if vae is not None and dtype == torch.float16 and vae.config.get("force_upcast"):
        vae.to(dtype=torch.float32)  # its activations overflow float16, as its config says
    if options.parts != "text":
        _cut_up(vae, options)
        if isinstance(vae, torch.nn.Module):
            lay_out(vae, device)
    network = getattr(pipeline, denoiser, None)
    if network is not None:
        speed_up(network, options)
    with opening(options.model):
        try:
            return _place(pipeline, device, options)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"model {shown(options.model)} does not fit on {device} in {str(dtype).removeprefix('torch.')} "
                f"with offload={shown(options.offload)}: use offload=model or sequential, or a smaller dtype"
            ) from error
        except ImportError as error:  # accelerate is too old
            raise ModelError(f"model {shown(options.model)} with offload={shown(options.offload)}: {error}") from error


def _left_out(index: Index, parts: Parts, denoiser: str) -> list[str]:
    """Names of the components that are not loaded: diffusers wants None for those, also if the model lacks them."""
    lacking = [name for name, there in index.components.items() if not there or name in UNUSED]
    encoders = [name for name in index.components if name.startswith("text_encoder")]
    if parts == "text":
        return sorted({*lacking, *({denoiser, "vae", "vqvae"} & index.components.keys())})
    return sorted({*lacking, *encoders}) if parts == "image" else lacking


def _cut_up(vae: Any, options: PipelineOptions) -> None:
    for option, attribute in (("vae_slicing", "use_slicing"), ("vae_tiling", "use_tiling")):
        if getattr(options, option):
            if not hasattr(vae, attribute):
                raise ModelError(f"model {shown(options.model)} has no VAE that can do {option}: set it to false")
            setattr(vae, attribute, True)


def lay_out(network: Any, device: torch.device) -> None:  # torch types `to` without memory_format
    """Use the channels-last memory format on CPUs, where convolutions were measured to be 1.15 to 1.2 times as fast."""
    if device.type == "cpu" and all(p.ndim < 5 for p in network.parameters()):  # those of videos have no such format
        network.to(memory_format=torch.channels_last)


def speed_up(network: Any, options: PipelineOptions) -> None:
    """Set the attention backend and torch.compile of a network as `options` say.

    In a transformer each block is compiled, equal blocks only once. On an H200 this made SD3 Medium 1.24 times as fast
    after 24 seconds of compiling; compiling it as a whole took 50 seconds for the first batch size alone. Any other
    network is compiled as a whole.

    Raises:
        ModelError: the attention backend is not available, no layer of the network would use it, or there is no C
            compiler.
    """
    if options.attention is not None:
        _attend(network, options)
    if options.compile:
        _require_compiler(options.model)
        stacks = [child for name, child in network.named_children() if name.endswith("transformer_blocks")]
        for part in [block for stack in stacks for block in stack] or [network]:
            part.compile()


def _require_compiler(model: str) -> None:
    """Refuse now if there is no C compiler: torch.compile would only fail at the first picture."""
    names = [os.environ[name] for name in ("CC", "CXX") if os.environ.get(name)] or ["gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in names):
        raise ModelError(
            f"model {shown(model)} with compile=true: torch.compile needs a C compiler, and there is no "
            f"{' or '.join(names)} here: install gcc, or set compile=false"
        )


def _attend(network: Any, options: PipelineOptions) -> None:
    processors = [getattr(layer, "processor", None) for layer in network.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ModelError(
            f"model {shown(options.model)}: no layer of its {type(network).__name__} takes an attention backend: "
            f"leave attention={shown(options.attention)} out"
        )
    try:
        network.set_attention_backend(options.attention)
    except (ValueError, RuntimeError, ImportError) as error:
        why = str(error).splitlines()[0]
        raise ModelError(f"model {shown(options.model)}: attention {shown(options.attention)}: {why}") from error


def _place(pipeline: Any, device: torch.device, options: PipelineOptions) -> Any:
    if options.offload == "none":
        return pipeline.to(device)
    from diffusers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise ModelError(f"offload={shown(options.offload)} needs the accelerate package: pip install accelerate")
    if device.type == "cpu":
        raise ModelError(
            f"offload={shown(options.offload)} needs an accelerator, the device is cpu: set offload to none"
        )
    if options.offload == "model" and pipeline.model_cpu_offload_seq is None:
        raise ModelError(f"offload='model' is nothing that a {type(pipeline).__name__} can: use sequential or none")
    move = pipeline.enable_model_cpu_offload if options.offload == "model" else pipeline.enable_sequential_cpu_offload
    move(device=device)
    return pipeline


def square_size(size: int | Sequence[int] | None, model: str) -> int:
    """The side of the square that a network works on, from the sample_size of its configuration.

    Raises:
        ModelError: the configuration has no sample_size, or one that is not a square.
    """
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        said = "no sample_size" if size is None else f"sample_size {list(size)}, which is no square"  # type: ignore[arg-type]
        raise ModelError(f"model {shown(model)} has {said}: set the resolution")
    return sides.pop()
