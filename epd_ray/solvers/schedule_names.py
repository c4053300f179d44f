"""The names of the sigma schedules, which a configuration checks without torch."""

from typing import TYPE_CHECKING

from epd_ray.errors import UnknownNameError, shown
from epd_ray.registry import did_you_mean

if TYPE_CHECKING:
    from epd_ray.types import Form

MODEL = "model"  # stands for the schedule of the model itself
OWN = "own"  # stands for the sigmas that the diffusers scheduler of a method makes by itself, see `zoo.Method`
AYS = "ays"  # stands for the sigmas that Align Your Steps (arXiv 2404.14507) publishes for some models
SCHEDULES: dict[str, "Form"] = {
    "polynomial": "ve",
    "logsnr": "ve",
    "uniform": "ve",
    "time_uniform": "ve",
    "shift": "flow",
}
"""The named schedules, and the form of the models that each one is for."""
IN_MODEL_TIME = ("uniform", "shift")  # need the model's own time; the others can span any two sigmas


def require_schedule(name: str) -> None:
    """Refuse a name that is neither "own", "model", "ays" nor a key of SCHEDULES.

    Raises:
        UnknownNameError: the message suggests the nearest name.
    """
    if name not in (known := [OWN, MODEL, AYS, *SCHEDULES]):
        raise UnknownNameError(f"unknown schedule {shown(name)}{did_you_mean(name, known)}")
