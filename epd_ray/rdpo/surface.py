"""The methods of RLlib's Algorithm that have no meaning for RDPO, each of which says what to use instead."""

from collections.abc import Callable
from typing import Any, NoReturn

from epd_ray.errors import ConfigError

ACTION = "the policy acts on no observation: use distribution() for its distribution over tables, or mean_table()"
POLICY = "RDPO has one policy: use get_module(), distribution() or mean_table()"
STATE = "use import_state(), restore_from_path(), or rebase() for another table to start from"
SAVED = "use save_to_path(), or Solver of epd_ray for a solver directory"
OFFLINE = "RDPO learns from its own pictures: use evaluate()"


def _refusing(name: str, instead: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError([f"RDPO has no {name}(): {instead}"])

    refuse.__name__, refuse.__doc__ = name, f"Raises ConfigError: {instead}."
    return refuse


class Refusals:
    """The methods that raise ConfigError. It stands before Algorithm among the bases of RDPO."""

    get_policy = _refusing("get_policy", POLICY)
    add_policy = _refusing("add_policy", POLICY)
    remove_policy = _refusing("remove_policy", POLICY)
    add_module = _refusing("add_module", POLICY)
    remove_module = _refusing("remove_module", POLICY)
    compute_single_action = _refusing("compute_single_action", ACTION)
    compute_actions = _refusing("compute_actions", ACTION)
    set_weights = _refusing("set_weights", STATE)
    export_policy_model = _refusing("export_policy_model", SAVED)
    export_policy_checkpoint = _refusing("export_policy_checkpoint", SAVED)
    evaluate_offline = _refusing("evaluate_offline", OFFLINE)
