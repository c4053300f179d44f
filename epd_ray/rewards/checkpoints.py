"""Weights from files: tensors alone are read, nothing in a file is ever executed."""

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from epd_ray.embedded.models import resolve_model
from epd_ray.errors import ModelError

Tensors = dict[str, Tensor]

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
PROCESSOR_FILES = ("preprocessor_config.json",)

CONVERT = "save its state dict as safetensors"


def find_file(model: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The first of `names` that a directory or a hub repository has; from the hub, by way of its cache.

    Raises:
        ModelError: none of them is there.
    """
    location = resolve_model(model)
    if Path(location).is_dir():
        found = next((path for name in names if (path := Path(location, name)).is_file()), None)
        if found is None:
            raise ModelError(f"{model!r} is a directory without {' or '.join(names)}: put one of them there")
        return found
    for name in names:
        try:
            return Path(hf_hub_download(location, name, revision=revision))
        except LocalEntryNotFoundError:  # no network: what is in the cache must do
            cached = (try_to_load_from_cache(location, other, revision=revision) for other in names)
            found = next((Path(path) for path in cached if isinstance(path, str)), None)
            if found is None:
                raise
            return found
        except EntryNotFoundError:
            continue
    raise ModelError(f"repository {model!r} has no {' or '.join(names)}: give one that does, or a directory")


def companion(model: str, given: str | None, default: str, files: Sequence[str]) -> str:
    """Where a head's tokenizer, image processor or base model comes from.

    What was asked for, else the model's own directory where it has such files, else the named repository.
    """
    own = Path(resolve_model(model))
    return resolve_model(given or (str(own) if any((own / name).is_file() for name in files) else default))


def read_tensors(path: Path, convert: str = CONVERT) -> Tensors:
    """The state dict of a .safetensors file, or of a .pt or .pth file, there on its own or under "state_dict".

    Args:
        convert: what to do about a file that holds more than tensors, for the message.

    Raises:
        ModelError: a pickle, a TorchScript archive, a damaged file, or one without tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        archive = zipfile.is_zipfile(path)
        if archive and is_torchscript(path):
            raise ModelError(f"{path.name} is a TorchScript archive, which runs code: {convert}")
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except UnpicklingError as error:
        raise ModelError(f"{path.name} holds more than tensors and could run code when opened: {convert}") from error
    except ModelError:
        raise
    except Exception as error:  # a file that is cut short makes torch raise half a dozen kinds
        raise ModelError(f"{str(path)!r} cannot be read ({_short(error)}): is it whole?") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{path.name} holds no state dict (name -> tensor): {convert}")
    return dict(found)


def is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def check_loaded(report: Mapping[str, Any], what: str) -> None:
    """Refuse a network that transformers filled up with random weights.

    Raises:
        ModelError: the checkpoint lacks weights, or has some of another shape.
    """
    wrong = sorted(report["missing_keys"]) + sorted(str(m[0]) for m in report["mismatched_keys"])
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(f"{what} lacks {wrong[0]}{others}, or has them in another shape: is it another model's file?")


def part(tensors: Tensors, prefix: str) -> Tensors:
    """What stands under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def count_layers(tensors: Tensors, prefix: str) -> int:
    """How many numbers follow a prefix ("encoder.layers." has 24)."""
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


def linear_layers(tensors: Tensors, prefix: str) -> nn.Sequential:
    """The linear layers at prefix<number>.weight, in order; the dropout between them does nothing here.

    Raises:
        ModelError: there are none.
    """
    chain = part(tensors, prefix)
    numbers = sorted({int(key.split(".")[0]) for key in chain})
    if not numbers:
        raise ModelError(f"the checkpoint has no layers {prefix}*: is it another model's file?")
    layers = []
    for number in numbers:
        weight = chain[f"{number}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict(part(chain, f"{number}."))
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)


class Inert:
    """What stands for a pickle's classes and functions: takes any arguments and any state, and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...


def convert_module(source: Path, target: Path) -> int:
    """Write the state dict of a pickled module (torch.save(model)) as safetensors, executing nothing of the file.

    Every name in the pickle that torch's weights-only reader does not trust stands for an inert class, which only
    remembers its attributes; the reader refuses whatever else a pickle can do.

    Args:
        target: a .safetensors that is not there yet, in a directory that is.

    Returns:
        The number of tensors.

    Raises:
        ModelError: not such a file, or a target that cannot be written.
    """
    if target.suffix != ".safetensors":
        raise ModelError(f"target {str(target)!r} is no .safetensors: give it that ending")
    if os.path.lexists(target):
        raise ModelError(f"target {str(target)!r} is there already: remove it, or give another name")
    if not target.parent.is_dir():
        raise ModelError(f"target {str(target)!r} is in no directory: make {str(target.parent)!r} first")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        stand_ins: list[Any] = [(type("StandIn", (Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            module = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # as in read_tensors
        raise ModelError(f"{str(source)!r} cannot be converted: {_short(error)}") from error
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in saved_tensors(module)}
    if not tensors:
        raise ModelError(f"{str(source)!r} holds no module: give the file that torch.save(model) wrote")
    try:
        save_file(tensors, target)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            target.unlink()  # half a file
        raise ModelError(f"target {str(target)!r} cannot be written: {_short(error)}") from error
    return len(tensors)


def _short(error: Exception) -> str:
    """The first sentence of what it says."""
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    return sentence[:200] or type(error).__name__


def saved_tensors(module: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The names and tensors that state_dict() would give, from a stand-in's attributes."""
    if not isinstance(module, Inert):
        return
    state = vars(module)
    passing = state.get("_non_persistent_buffers_set") or ()
    buffers = {name: value for name, value in (state.get("_buffers") or {}).items() if name not in passing}
    for name, value in {**(state.get("_parameters") or {}), **buffers}.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
    for name, child in (state.get("_modules") or {}).items():
        yield from saved_tensors(child, f"{prefix}{name}.")
