"""What the metadata in a solver file of the EPD authors' code means: the model, resolution and sigmas of its table.

Source: github.com/BeierZhu/EPD, training/networks.py (EPD_predictor), sample.py and models/backends.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from torch import Tensor

from epd_ray.errors import TableError, shown
from epd_ray.solvers import schedules
from epd_ray.solvers.scheduler_config import FLOW_FACTS, TRAIN_TIMESTEPS
from epd_ray.solvers.solver import Solver
from epd_ray.solvers.table import SolverTable
from epd_ray.types import Form

MAX_INTERVALS, MAX_POINTS = 1000, 64
CITATION = ["EPD-Solver (arXiv 2507.14797)", "RDPO (arXiv 2512.22796)"]


@dataclass(frozen=True)
class _Family:
    """Facts of one backend of the reference that its code fixes and its files do not contain."""

    name: str
    form: Form
    model_id: str
    resolution: int
    scheduler: dict[str, JsonValue]
    classifier_free: bool = True


_BETA_START, _BETA_END = 0.00085, 0.012
_SCALED_LINEAR: dict[str, JsonValue] = {
    "beta_start": _BETA_START,
    "beta_end": _BETA_END,
    "beta_schedule": "scaled_linear",
}
_FAMILIES = {
    "ldm": _Family(
        "sd",
        "ve",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        512,
        {"prediction_type": "epsilon", "num_train_timesteps": TRAIN_TIMESTEPS, **_SCALED_LINEAR},
    ),
    "sd3": _Family("sd3", "flow", "stabilityai/stable-diffusion-3-medium-diffusers", 1024, FLOW_FACTS),
    "flux": _Family("flux", "flow", "black-forest-labs/FLUX.1-dev", 1024, FLOW_FACTS, classifier_free=False),
}


class BackendConfig(BaseModel):
    """The part of a file that describes its model."""

    model_config = ConfigDict(strict=True, frozen=True)

    model_name_or_path: str | None = None
    resolution: int | None = Field(default=None, ge=8)
    flowmatch_mu: float = 1.15
    flowmatch_shift: float = Field(default=3.0, gt=0)


class ReferenceFacts(BaseModel):
    """The metadata of a reference file that a solver depends on, under the file's own names."""

    model_config = ConfigDict(strict=True, frozen=True)

    num_steps: int = Field(ge=2, le=MAX_INTERVALS + 1)  # sigmas, one more than the intervals
    num_points: int = Field(ge=1, le=MAX_POINTS)
    dataset_name: Literal["ms_coco"] = "ms_coco"  # the other data sets have no text
    sampler_stu: Literal["epd", "ipndm"] = "epd"
    max_order: int | None = None
    afs: bool = False
    fcn: bool = False
    guidance_rate: float
    schedule_type: Literal["polynomial", "logsnr", "time_uniform", "discrete", "flowmatch"]
    schedule_rho: float | None = None
    scale_dir: float = Field(default=0.0, ge=0, le=1)
    scale_time: float = Field(default=0.0, ge=0, le=1)
    backend: Literal["ldm", "sd3", "flux"] = "ldm"
    backend_config: BackendConfig = BackendConfig()


def reference_solver(
    table: SolverTable, facts: ReferenceFacts, source: dict[str, JsonValue], source_sha256: str
) -> Solver:
    """The solver that the reference would run with a table.

    Args:
        table: [N, K], float64.
        facts: metadata of the file.
        source: where the file came from, for the solver's meta.
        source_sha256: SHA-256 of the file.

    Returns:
        The solver.

    Raises:
        TableError: facts that do not fit each other or the table.
        ScheduleError: a schedule with a value outside its range.
    """
    family, config = _FAMILIES[facts.backend], facts.backend_config
    if facts.afs and family.form == "flow":
        raise TableError("afs is true, but the reference's first step for a flow model is not this project's")
    if facts.sampler_stu == "ipndm" and facts.max_order is None:
        raise TableError("sampler_stu is 'ipndm', but max_order is absent")
    sigmas, schedule = _schedule(facts, family)
    # The released SD1.5 files carry a resolution of 1024, a default that their code never reads: they draw 512 x 512.
    resolution = family.resolution if facts.backend == "ldm" else config.resolution or family.resolution
    meta: dict[str, JsonValue] = {
        "backbone": family.name,
        "model_id": config.model_name_or_path or family.model_id,
        "resolution": resolution,
        "guidance_scale": facts.guidance_rate,
        "classifier_free": family.classifier_free,
        "schedule": schedule,
        "scheduler": dict(family.scheduler),
        "source": source,
        "source_sha256": source_sha256,
        "citation": list(CITATION),
    }
    order = facts.max_order if facts.sampler_stu == "ipndm" and facts.max_order is not None else 1
    return Solver(table, sigmas, family.form, facts.afs, order, meta)


def _schedule(facts: ReferenceFacts, family: _Family) -> tuple[Tensor, dict[str, JsonValue]]:
    """Sigmas [N+1], and the name and options of their schedule, for the solver's meta."""
    kind, rho, config = facts.schedule_type, facts.schedule_rho, facts.backend_config
    if (kind == "flowmatch") != (family.form == "flow"):
        raise TableError(f"schedule_type is {shown(kind)}, which the backend {shown(facts.backend)} does not have")
    if kind == "flowmatch":
        dynamic = facts.backend == "flux"
        shape: dict[str, JsonValue] = {"mu": config.flowmatch_mu} if dynamic else {"shift": config.flowmatch_shift}
        return _flowmatch(facts.num_steps, config, dynamic), {"kind": kind, **shape}
    alphas_cumprod = _alphas_cumprod()
    ends = torch.tensor([0.0, TRAIN_TIMESTEPS - 1.0])
    low, high = schedules.timestep_to_sigma(ends, alphas_cumprod).tolist()
    if kind == "logsnr":
        return schedules.logsnr(facts.num_steps, low, high), {"kind": kind}
    if rho is None:
        raise TableError(f"schedule_rho is absent, but the schedule {shown(kind)} needs it")
    if kind == "discrete":
        return schedules.discrete(facts.num_steps, alphas_cumprod, rho), {"kind": kind, "rho": rho}
    curve = schedules.polynomial if kind == "polynomial" else schedules.time_uniform
    return curve(facts.num_steps, low, high, rho), {"kind": kind, "rho": rho}


def _alphas_cumprod() -> Tensor:
    """The training noise schedule [T] of SD1.5 in double precision; diffusers' own has float32 betas."""
    betas = torch.linspace(_BETA_START**0.5, _BETA_END**0.5, TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    return schedules.alphas_cumprod(betas)


def _flowmatch(num_sigmas: int, config: BackendConfig, dynamic: bool) -> Tensor:
    """The sigmas [num_sigmas] of the pipeline's own scheduler, without the 0 at their end."""
    from diffusers import FlowMatchEulerDiscreteScheduler  # here, since diffusers takes long to import

    scheduler = FlowMatchEulerDiscreteScheduler(shift=config.flowmatch_shift, use_dynamic_shifting=dynamic)
    scheduler.set_timesteps(num_sigmas, mu=config.flowmatch_mu if dynamic else None)
    sigmas: Tensor = scheduler.sigmas[:num_sigmas].double()
    return sigmas
