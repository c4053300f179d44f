"""Reads model weights from files. Only tensors are read; no code in a file is ever executed."""

import json
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
from epd_ray.errors import ConfigError, ModelError, shown

Tensors = dict[str, Tensor]

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
PROCESSOR_FILES = ("preprocessor_config.json",)

WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)  # fmt: skip
"""The names that transformers gives to a model's weights, or to the index of their files."""

INDEX = ".index.json"
CONVERT = "save its state dict as safetensors"


def find_file(model: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The path of the first file of `names` that a directory or a hub repository holds; hub files are cached.

    Args:
        model: directory, hub id, or name of an embedded model.
        names: file names in the order of preference.
        revision: branch, tag or commit on the hub; None is the default branch.

    Raises:
        ModelError: none of the files is there.
        LocalEntryNotFoundError: the hub cannot be reached, and none of the files is in its cache.
    """
    location = resolve_model(model)
    if Path(location).is_dir():
        found = next((path for name in names if (path := Path(location, name)).is_file()), None)
        if found is None:
            raise ModelError(f"{shown(model)} is a directory without {' or '.join(names)}: put one of them there")
        return found
    for name in names:
        try:
            return Path(hf_hub_download(location, name, revision=revision))
        except LocalEntryNotFoundError:  # without a network, use whichever of the files is cached
            cached = (try_to_load_from_cache(location, other, revision=revision) for other in names)
            found = next((Path(path) for path in cached if isinstance(path, str)), None)
            if found is None:
                raise
            return found
        except EntryNotFoundError:
            continue
    raise ModelError(
        f"repository {shown(model)} has no {' or '.join(names)}: give a repository or directory that has one"
    )


def companion(model: str, given: str | None, default: str, files: Sequence[str]) -> str:
    """The directory or hub id from which a head loads its tokenizer, image processor or base model.

    Args:
        model: the head's model, whose own directory is used if it holds one of `files` and `given` is None.
        given: what the user asked for, or None.
        default: hub id that is used otherwise.
        files: file names, one of which such a directory holds.

    Raises:
        ModelError: the result is neither a directory nor a hub id.
    """
    own = Path(resolve_model(model))
    return resolve_model(given or (str(own) if any((own / name).is_file() for name in files) else default))


def read_tensors(path: Path, convert: str = CONVERT) -> Tensors:
    """Read a state dict from a .safetensors, .pt or .pth file; in the latter two it may be under the key "state_dict".

    Args:
        path: the file.
        convert: advice in the error message for a file that holds more than tensors.

    Raises:
        ModelError: the file is a pickle, a TorchScript archive or damaged, or holds no tensors.
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
    except Exception as error:  # torch raises many kinds of exceptions for a truncated file
        raise ModelError(
            f"{shown(str(path))} cannot be read ({_first_sentence(error)}): fetch or copy it again"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{path.name} holds no state dict (name -> tensor): {convert}")
    return dict(found)


def read_sharded(model: str, names: Sequence[str], revision: str | None = None) -> Tensors:
    """Read a state dict from one file, or from the files that an index of transformers names.

    Args:
        model: directory, hub id, or name of an embedded model.
        names: file names in the order of preference; one that ends in .index.json says which file has which tensor.
        revision: branch, tag or commit on the hub; None is the default branch.

    Raises:
        ModelError: a file is missing or damaged, or the index is not of that form.
    """
    path = find_file(model, names, revision)
    if not path.name.endswith(INDEX):
        return read_tensors(path)
    try:
        parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        named = all(Path(part).name == part for part in parts)
    except (ValueError, LookupError, AttributeError, TypeError):
        named = False
    if not named:
        raise ModelError(f"{shown(str(path))} names no files of weights: fetch it again")
    return {name: tensor for part in parts for name, tensor in read_tensors(find_file(model, [part], revision)).items()}


def is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def check_loaded(report: Mapping[str, Any], what: str) -> None:
    """Refuse a network for which transformers initialised missing weights at random.

    Args:
        report: the loading info that `from_pretrained` returned.
        what: kind and name of the model, for the error message.

    Raises:
        ModelError: weights are missing from the checkpoint, or have another shape there.
    """
    wrong = sorted(report["missing_keys"]) + sorted(str(m[0]) for m in report["mismatched_keys"])
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(f"{what} lacks {wrong[0]}{others}, or has them in another shape: is it another model's file?")


def part(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names start with a prefix; the prefix is removed from the names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def count_layers(tensors: Tensors, prefix: str) -> int:
    """The number of layers, counted as the distinct indices that follow a prefix such as "encoder.layers."."""
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


def linear_layers(tensors: Tensors, prefix: str) -> nn.Sequential:
    """The linear layers named prefix<number>.weight, in order; dropout between them is inactive when scoring.

    Raises:
        ModelError: the checkpoint has no such layers, or one lacks its weights.
    """
    chain = part(tensors, prefix)
    numbers = sorted({int(key.split(".")[0]) for key in chain})
    if not numbers:
        raise ModelError(f"the checkpoint has no layers {prefix}*: is it another model's file?")
    layers = []
    for number in numbers:
        if f"{number}.weight" not in chain:
            raise ModelError(f"the checkpoint lacks {prefix}{number}.weight: is it another model's file?")
        weight = chain[f"{number}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict(part(chain, f"{number}."))
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)


class Inert:
    """Replaces the classes and functions that a pickle names; it accepts any arguments and state, and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...


def convert_module(source: Path, target: Path) -> int:
    """Write the state dict of a pickled module (torch.save(model)) as safetensors, without executing code of the file.

    Torch's weights-only reader refuses names that it does not trust. Here each of those names is bound to an inert
    class that only stores its attributes; the reader still refuses everything else that a pickle can do.

    Args:
        source: file that torch.save(model) wrote.
        target: path ending in .safetensors that does not exist yet, in an existing directory.

    Returns:
        The number of tensors written.

    Raises:
        ModelError: the source holds no such module.
        ConfigError: the target cannot be written.
    """
    if target.suffix != ".safetensors":
        raise ConfigError([f"target {shown(str(target))} does not end in .safetensors: give it that ending"])
    if os.path.lexists(target):
        raise ConfigError([f"target {shown(str(target))} already exists: remove it, or give another name"])
    if not target.parent.is_dir():
        raise ConfigError(
            [f"target {shown(str(target))} is in no existing directory: create {shown(str(target.parent))} first"]
        )
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        stand_ins: list[Any] = [(type("StandIn", (Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(stand_ins):
            module = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # as in read_tensors
        raise ModelError(f"{shown(str(source))} cannot be converted: {_first_sentence(error)}") from error
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in saved_tensors(module)}
    if not tensors:
        raise ModelError(f"{shown(str(source))} holds no module: give the file that torch.save(model) wrote")
    try:
        save_file(tensors, target)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            target.unlink()  # it may be half written
        raise ConfigError([f"target {shown(str(target))} cannot be written: {_first_sentence(error)}"]) from error
    return len(tensors)


def _first_sentence(error: Exception) -> str:
    sentence = str(error).strip().partition("\n")[0].partition(". ")[0]
    return sentence[:200] or type(error).__name__


def saved_tensors(module: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The names and tensors that the module's state_dict() would return, read from the attributes of its stand-in."""
    if not isinstance(module, Inert):
        return
    state = vars(module)
    not_saved = state.get("_non_persistent_buffers_set") or ()
    buffers = {name: value for name, value in (state.get("_buffers") or {}).items() if name not in not_saved}
    for name, value in {**(state.get("_parameters") or {}), **buffers}.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
    for name, child in (state.get("_modules") or {}).items():
        yield from saved_tensors(child, f"{prefix}{name}.")
