"""Kinds of values that several keys share: amounts, names, and the rules that keep secrets out of a configuration."""

import re
from typing import Annotated, Any
from urllib.parse import parse_qsl

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from epd_ray.errors import ConfigError, UnknownNameError, shown
from epd_ray.registry import Registry, did_you_mean
from epd_ray.solvers.rival import Rival
from epd_ray.solvers.zoo import SOLVERS, split

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
TOKEN = re.compile(r"hf_|[0-9a-f]{40}")  # tokens of Hugging Face and Weights & Biases, which VARIABLE matches too
SECRET = re.compile("key|token|secret|password", re.IGNORECASE)  # in the names of keys


def _gpus(amount: float) -> float:
    if amount > 1 and amount != int(amount):
        raise ValueError(f"is {amount:g}, a share of one GPU (below 1) or a whole number is possible")
    return amount


def _custom(resources: dict[str, float]) -> dict[str, float]:
    taken = sorted({"CPU", "GPU"} & set(resources))
    if taken:
        raise ValueError(f"{taken[0]} is no custom resource: set the key for {taken[0]}s beside it")
    return resources


def _solver(name: str) -> str:
    try:
        method, _ = split(name)
        Rival.parse(name)
    except UnknownNameError as error:
        raise ValueError(str(error)) from None
    except ConfigError as error:
        raise ValueError(error.problems[0].partition(": ")[2]) from None
    registered(SOLVERS, method)
    return name


Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Gpus = Annotated[float, Field(ge=0), AfterValidator(_gpus)]
CustomResources = Annotated[dict[str, Amount], AfterValidator(_custom)]
NAME_PATTERN = r"^[A-Za-z0-9_-]+$"  # safe in paths, columns and metrics
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
SolverName = Annotated[str, AfterValidator(_solver)]


def registered(registry: Registry[Any], name: str) -> str:
    """The name itself, if it is registered or has the form module:Class.

    Raises:
        ValueError: the registry does not know the name; the message has the nearest known one.
    """
    if ":" not in name and name not in registry.names():
        raise ValueError(f"unknown {registry.kind} {shown(name)}{did_you_mean(name, registry.names())}")
    return name


def holds_secret(url: str) -> bool:
    """Whether a URL has a login, or a query key such as token."""
    address, _, query = url.partition("?")
    return "@" in address or any(SECRET.search(name) for name, _ in parse_qsl(query, keep_blank_values=True))


def names_variable(name: Any) -> bool:
    """Whether this is the name of an environment variable, and does not look like a token."""
    return isinstance(name, str) and VARIABLE.fullmatch(name) is not None and not TOKEN.match(name)


def without_secret_keys(section: Any, variable: str) -> Any:
    """A tracker's section as it is written.

    Args:
        section: what the file or the override gives; anything but a mapping is refused later.
        variable: the environment variable that holds the tracker's secret.

    Raises:
        ValueError: a key that would hold a secret; its value is not shown.
    """
    secret = [key for key in section if SECRET.search(str(key))] if isinstance(section, dict) else []
    if secret:  # a run keeps its configuration
        raise ValueError(f"{secret[0]} is no setting: its value comes from the environment alone (set {variable})")
    return section


class Section(BaseModel):
    # strict: "8" and true are no integers. validate_default: the validators below also judge what was left out.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)
