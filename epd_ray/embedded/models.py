"""The embedded models: `shapes` (text to image) and `shapes-clip` (its preference model)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from epd_ray.errors import ModelError

EMBEDDED = {name: Path(__file__).parent / name for name in ("shapes", "shapes-clip")}


def resolve_model(model: str) -> str:
    """An embedded model's name -> its directory; a directory or a hub id ("owner/name") stays what it is.

    Raises:
        ModelError: neither a directory nor anything that could be a hub id.
    """
    if model in EMBEDDED:
        return str(EMBEDDED[model])
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path and not Path(model).expanduser().is_dir():
        names = ", ".join(EMBEDDED)
        raise ModelError(f"model {model!r} is no directory: give a pipeline directory, a hub id, or one of {names}")
    return str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model


def require_vocabulary(model: str, tokenizers: Iterable[Any]) -> None:
    """Refuse tokenizers without words: transformers makes such a one up, silently, where its files are missing.

    Raises:
        ModelError: a tokenizer that knows its special tokens alone.
    """
    for tokenizer in tokenizers:
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ModelError(f"model {model!r} has a {type(tokenizer).__name__} without words: its files are missing")
