"""What is known of a run before torch and Ray are imported, which takes seconds.

That is its Ray, whether its models exist, and what its reward heads read of each prompt's row.
"""

import inspect
import os
from collections.abc import Mapping
from typing import Any

from epd_ray.actors.modules import importable
from epd_ray.backbones.index import supported_index
from epd_ray.config.run_config import RunConfig
from epd_ray.config.sections import OPENED
from epd_ray.config.services import RewardConfig
from epd_ray.embedded.models import EMBEDDED
from epd_ray.errors import HubError, ModelError, RewardError
from epd_ray.prompts.panel import Panel
from epd_ray.rewards import HEADS, SERVERS
from epd_ray.rewards.needs import needs_of
from epd_ray.types import Metadata
from epd_ray.weights.hub import lacking, no_hub

SETTING, VARIABLE = "cluster.address", "RAY_ADDRESS"


def named_cluster(address: str | None) -> tuple[str | None, str]:
    """The address of the cluster that a run joins, None where it starts a Ray of its own, and what says so.

    Args:
        address: the setting `cluster.address`; None and "auto" give way to the variable RAY_ADDRESS.
    """
    told = os.environ.get(VARIABLE)
    source = VARIABLE if told and address in (None, "auto") else SETTING
    asked = told if source == VARIABLE else address
    return (None if not asked or asked == "local" else asked), source


def panel_of(config: RunConfig) -> Panel:
    """The heads of a configuration as the rows of its prompts see them.

    Raises:
        ConfigError: a module of `cluster.py_modules`, which may hold a head, is not there.
    """
    importable(config.cluster.py_modules)
    native = {name: reward for name, reward in config.rewards.items() if reward.backend == "native"}
    return Panel(
        {name: reward.weight for name, reward in config.rewards.items()},
        {name: needs_of(reward.head, reward.options) for name, reward in native.items()},
        config.prompts.heads,
    )


def require_models(config: RunConfig, rows: Mapping[str, Metadata] | None = None) -> None:
    """Check that the models of a run exist and that its reward servers answer, which actors take a minute to find out.

    Nothing is checked for a run that joins a cluster, whose nodes may have files and networks that this machine lacks.

    Args:
        config: the configuration of the run.
        rows: prompt -> the columns of its row; None where they are not read yet, and servers that need some not tried.

    Raises:
        ModelError: the model does not exist, is no pipeline, or is of a family that is not supported.
        HubError: a model of the backbone or of a reward head is not in the local cache, and the hub does not answer.
        RewardError: a reward server does not answer, or not as it should.
        ConfigError: an option of a reward server is wrong.
    """
    backbone = config.backbone
    if named_cluster(config.cluster.address)[0] is not None:
        return
    if backbone.family in OPENED:
        require_model(backbone.model, backbone.revision, "backbone.model")
    for name, reward in config.rewards.items():
        if reward.head in SERVERS:
            _require_answer(name, reward, rows or {})
    wanted = {f"rewards.{name}": _hub_ids(r.head, r.options) for name, r in config.rewards.items() if _loads(r)}
    absent = lacking(model for models in wanted.values() for model in models)
    if absent:
        named = (f"{key}: {model}" for key, models in wanted.items() for model in models if model in absent)
        raise HubError(f"{', '.join(named)}: not in the local cache, and {no_hub()}")


def _loads(reward: RewardConfig) -> bool:
    """Whether a head loads its model in this package's own code, which tells where it comes from."""
    if reward.head in SERVERS:
        return False
    return reward.backend == "native" and reward.head in HEADS.names() and reward.options.get("model") not in EMBEDDED


def _hub_ids(head: str, options: Mapping[str, Any]) -> list[str]:
    """The models that a head opens, by its options and their defaults."""
    defaults = {name: p.default for name, p in inspect.signature(HEADS.get(head)).parameters.items()}
    return [value for value in (defaults | dict(options)).values() if isinstance(value, str)]


def require_model(model: str, revision: str | None, name: str) -> None:
    """Check that a pipeline exists and is of a family that is supported.

    Args:
        model: a pipeline directory, a hub id, or the name of an embedded model.
        revision: branch, tag or commit of a hub repository.
        name: the setting or option that names the model, for the message.

    Raises:
        ModelError: it is not so.
    """
    try:
        supported_index(model, revision)
    except ModelError as error:
        raise type(error)(f"{name}: {error}") from error


def _require_answer(name: str, reward: RewardConfig, rows: Mapping[str, Metadata]) -> None:
    head: Any = HEADS.build(reward.head, reward.options)
    row = next((row for row in rows.values() if all(column in row for column in head.needs)), None)
    try:
        if row is not None or not head.needs:
            head.probe(row)
    except RewardError as error:
        raise RewardError(name, f"{error.head} {error.problem}") from error
    finally:
        head.close()
