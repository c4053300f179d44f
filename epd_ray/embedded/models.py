"""Directories of the embedded models: `shapes` (text to image) and `shapes-clip` (its CLIP model)."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from epd_ray.errors import ModelError, shown

EMBEDDED = {name: Path(__file__).parent / name for name in ("shapes", "shapes-clip")}


def resolve_model(model: str) -> str:
    """The directory of an embedded model; any other directory or hub id ("owner/name") is returned unchanged.

    Raises:
        ModelError: `model` is not a directory and cannot be a hub id.
    """
    if model in EMBEDDED:
        return str(EMBEDDED[model])
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path and not Path(model).expanduser().is_dir():
        names = ", ".join(EMBEDDED)
        raise ModelError(
            f"model {shown(model)} is no directory: give a pipeline directory, a hub id, or one of {names}"
            f"{nearby(model)}"
        )
    return str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model


def nearby(model: str) -> str:
    """The end of a message about a directory that does not exist, such as "; did you mean './models/sd15'?".

    It is empty where neither a folder beside it nor an embedded model has a similar name.
    """
    folder, _, name = model.rstrip("/").rpartition("/")
    parent = Path(folder or ("/" if model.startswith("/") else ".")).expanduser()
    try:
        known = {*(entry.name for entry in parent.iterdir() if entry.is_dir()), *(() if folder else EMBEDDED)}
    except OSError:
        return f"; there is no folder {shown(str(parent))} either"
    similar = difflib.get_close_matches(name, sorted(known), n=1)
    start = model.rstrip("/").removesuffix(name)
    return f"; did you mean {shown(start + similar[0])}?" if similar else ""


def require_vocabulary(model: str, tokenizers: Iterable[Any]) -> None:
    """Refuse tokenizers without a vocabulary, which transformers silently creates when files are missing.

    Args:
        model: name of the model, for the message.
        tokenizers: tokenizers of transformers.

    Raises:
        ModelError: a tokenizer has no other tokens than its special tokens.
    """
    for tokenizer in tokenizers:
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            kind = type(tokenizer).__name__
            raise ModelError(
                f"model {shown(model)} has a {kind} without words: its files are missing, fetch them again"
            )
