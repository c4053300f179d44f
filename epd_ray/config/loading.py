"""Reading a run's configuration: the defaults, changed by a YAML file, changed by overrides such as "rdpo.lr=1e-3"."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from epd_ray.config.documents import dump_yaml, parse
from epd_ray.config.problems import problems_of
from epd_ray.config.run_config import FORMAT, RunConfig
from epd_ray.config.sections import AUTO, OPENED
from epd_ray.errors import SHOWN_CHARS, ConfigError, shown
from epd_ray.prompts.splits import BUILTIN, SHAPES

# What changes when the model is not the embedded one, unless the file or an override says otherwise.
FOR_OTHER_MODELS: dict[str, Any] = {
    "backbone": {"guidance_scale": None, "max_sequence_length": None},
    "solver": {"intervals": 10},
    "prompts": {"train": BUILTIN},
    "rewards": {"hpsv2": {"head": "hpsv2.1"}},
}


RENAMED = {"rdpo.minibatch": "rdpo.minibatch_size", "rdpo.epochs": "rdpo.num_epochs"}
"""Keys that format 1 called otherwise -> what they are called now."""


def load_config(
    path: Path | None, overrides: Sequence[str] = (), assumed: Mapping[str, Any] = MappingProxyType({})
) -> RunConfig:
    """Read a run's configuration: the defaults, changed by a YAML file, changed by overrides.

    Args:
        path: a YAML file with a mapping of sections; None takes the defaults. Paths in it are relative to the working
            directory.
        overrides: changes such as "rdpo.lr=1e-3", whose values are YAML.
        assumed: sections with values for keys that the file leaves out, in place of the defaults.

    Raises:
        ConfigError: the file or an override is wrong; the error has every problem, one line each.
    """
    given = {} if path is None else read_yaml(path)
    _require_format(path, given.get("format", FORMAT))
    given = _renamed(given)
    return resolve(_fill(dict(assumed), given), overrides)


def resolve(given: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Make a configuration of sections as a file holds them, with the defaults for what they leave out.

    Args:
        given: sections by name; a section that is None counts as left out.
        overrides: changes such as "rdpo.lr=1e-3".

    Raises:
        ConfigError: every problem, one line each.
    """
    written = {k: v for k, v in given.items() if v is not None}
    data = _fill(_defaults(written, overrides), written)
    problems = [problem for override in overrides if (problem := apply_override(data, override))]
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        problems += problems_of(error)
    if problems:
        raise ConfigError(problems)
    return config


def to_yaml(config: RunConfig) -> str:
    """Write every key with its value, in the order of the sections, as YAML that `load_config` reads back."""
    return dump_yaml(config.model_dump(mode="json"))


def _defaults(written: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The default of every key, for the model that the file and the overrides name."""
    asked = copy.deepcopy(written)
    for override in overrides:
        apply_override(asked, override)
    backbone = asked.get("backbone")
    backbone = backbone if isinstance(backbone, dict) else {}
    defaults = RunConfig().model_dump(mode="json")
    if backbone.get("family", AUTO) in OPENED and backbone.get("model", SHAPES) != SHAPES:
        defaults = _fill(defaults, FOR_OTHER_MODELS)
        defaults["name"] = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(str(backbone["model"])).name).strip("-") or "run"
    named = set(asked["rewards"]) if isinstance(asked.get("rewards"), dict) else set()
    if named - set(defaults["rewards"]):  # with other heads, the default head stays only if it is named too
        defaults["rewards"] = {name: head for name, head in defaults["rewards"].items() if name in named}
    return defaults


def _fill(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults that the given sections leave out; reward heads that are given replace the default one."""
    merged = dict(defaults)
    for key, value in given.items():
        section = key != "rewards" and isinstance(value, dict) and isinstance(defaults.get(key), dict)
        merged[key] = {**defaults[key], **value} if section else value
    return copy.deepcopy(merged)  # because overrides are written into the result


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file's sections as they are written, without defaults.

    Raises:
        ConfigError: the file cannot be read, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"cannot read the configuration {path}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is not UTF-8 ({error.reason}); save the file as UTF-8"]) from error
    data = parse(text, path)
    if data is not None and not isinstance(data, dict):
        raise ConfigError([f"{path} holds {shown(data)}, expected a mapping of sections (backbone, solver, ...)"])
    return {key if isinstance(key, str) else shown(key): value for key, value in (data or {}).items()}


def _require_format(path: Path | None, found: object) -> None:
    """Refuse a newer format with one line, rather than with a line for each of its keys that are unknown here."""
    if isinstance(found, int) and found > FORMAT:
        raise ConfigError(
            [f"{path} was written by a newer epd_ray (format {found}, this one reads up to {FORMAT}): update epd_ray"]
        )


def _renamed(given: dict[str, Any]) -> dict[str, Any]:
    """Sections of the oldest format under the names of today; sections of today's format stay as they are."""
    if given.get("format") != 1:
        return given
    sections = copy.deepcopy(given) | {"format": FORMAT}
    for before, now in RENAMED.items():
        section, _, key = before.partition(".")
        if isinstance(values := sections.get(section), dict) and key in values:
            values[now.rpartition(".")[2]] = values.pop(key)
    return sections


def apply_override(data: dict[str, Any], override: str) -> str | None:
    """Write an override "a.b=value" into nested mappings.

    Returns:
        What is wrong with the override, in one line; None if nothing is.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        return f"{shown(override)[1:-1]}: expected key=value, such as rdpo.lr=1e-3"
    if len(key) > SHOWN_CHARS or not key.isprintable():
        return f"{shown(key)}: no key is so long, or has such characters"
    try:
        value = parse(text, f"{key}: {shown(text)}")
    except ConfigError as error:
        return str(error)
    *parents, last = key.split(".")
    node: Any = data
    for depth, part in enumerate(parents, start=1):
        node[part] = {} if node.get(part) is None else node[part]  # a section that is off by default is null
        node = node[part]
        if not isinstance(node, dict):
            return f"{key}: {'.'.join(parents[:depth])} is {shown(node)}, which has no keys"
    node[last] = value
    return None
