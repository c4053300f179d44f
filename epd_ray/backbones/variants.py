"""Which of several kinds of weight files a pipeline's directory has: plain ones, or those of a variant such as fp16."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from epd_ray.errors import ModelError, shown

log = logging.getLogger(__name__)

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?"
    r"\.(?:safetensors|bin)"
)


def pick_variant(folder: Path, components: Iterable[str], model: str) -> str | None:
    """The variant to open a directory with; it is logged, because its weights may be rounded.

    Args:
        folder: the directory of the pipeline.
        components: names of the components that are opened.
        model: the model as the user named it, for messages.

    Returns:
        None where each component has plain weights, or has none at all; otherwise the one variant that every component
        without plain weights has.

    Raises:
        ModelError: several variants are possible, or none is.
    """
    found = {name: _variants(folder / name) for name in components}
    lacking = {name: kinds for name, kinds in found.items() if kinds and None not in kinds}
    if not lacking:
        return None
    shared = set.intersection(*({kind for kind in kinds if kind is not None} for kinds in lacking.values()))
    if len(shared) == 1:
        variant = shared.pop()
        log.warning(
            "model %s: %s has weights of the variant %s alone, which is opened", shown(model), _list(lacking), variant
        )
        return variant
    kinds = "; ".join(f"{name}: {_list(map(str, kinds))}" for name, kinds in sorted(lacking.items()))
    raise ModelError(
        f"model {shown(model)} has no plain weights, and not one variant alone that all its parts have ({kinds}): "
        "remove the weight files of all variants but one"
    )


def _variants(folder: Path) -> set[str | None]:
    """The kinds of weights in a component's folder; None stands for plain ones."""
    matches = (_WEIGHTS.fullmatch(path.name) for path in folder.glob("*"))
    return {match["variant"] for match in matches if match is not None}


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
