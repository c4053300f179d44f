"""The conventions of a denoising network: its timestep at a sigma, the scale of its input, and the drift that its
output stands for."""

import torch
from torch import Tensor

from epd_ray.errors import TableError, shown
from epd_ray.solvers.epd import spread
from epd_ray.solvers.scheduler_config import SchedulerFacts
from epd_ray.solvers.schedules import alphas_cumprod, sigma_to_timestep


class Network:
    """The conventions of one network, for k points of each sample, [B, k, ...], with one sigma per point.

    Args:
        facts: what the network predicts and how it was trained.

    Raises:
        TableError: a beta schedule that diffusers does not know.
    """

    def __init__(self, facts: SchedulerFacts) -> None:
        self.facts = facts
        self.flow = facts.prediction_type == "flow_prediction"
        self._alphas_cumprod = None if self.flow else _alphas_cumprod(facts)

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's timesteps [k], float32, at sigmas [k]; both on the CPU."""
        if self._alphas_cumprod is None:
            return (sigma * self.facts.num_train_timesteps).float()
        return sigma_to_timestep(sigma, self._alphas_cumprod).float()

    def scaled(self, points: Tensor, sigma: Tensor) -> Tensor:
        """Points [B, k, ...] at sigmas [k] in the scale of the network's input: unit variance in VE form."""
        return points if self.flow else unit_variance(points, spread(sigma, points))

    def drift(self, output: Tensor, points: Tensor, sigma: Tensor) -> Tensor:
        """dx/dsigma [B, k, ...] from the network's output at points, both [B, k, ...], with sigmas [k]."""
        return output if self.flow else ve_drift(output, points, spread(sigma, points), self.facts.prediction_type)


def check_same(ours: SchedulerFacts, theirs: SchedulerFacts) -> None:
    """Refuse a pipeline whose network was trained in another way than the network that a solver was made for.

    Args:
        ours: facts that the solver has of its network.
        theirs: facts from the pipeline's scheduler.

    Raises:
        TableError: another prediction type, number of timesteps, or training schedule.
    """
    fix = "(use a solver made for it)"
    if ours.prediction_type != theirs.prediction_type:
        raise TableError(
            f"the solver is for a network that predicts {shown(ours.prediction_type)}, "
            f"but this pipeline's predicts {shown(theirs.prediction_type)} {fix}"
        )
    mine, given = ours.model_dump(), theirs.model_dump()
    if mine == given:
        return
    if ours.num_train_timesteps == theirs.num_train_timesteps and (
        ours.prediction_type == "flow_prediction" or torch.allclose(_alphas_cumprod(ours), _alphas_cumprod(theirs))
    ):
        return
    name = next(key for key in mine if mine[key] != given[key])
    values = ("", "") if name == "trained_betas" else (f" {shown(mine[name])}", f" is {shown(given[name])}")
    raise TableError(
        f"the solver is for a network with {name}{values[0]}, but this pipeline's{values[1] or ' differ'} {fix}"
    )


def unit_variance(x: Tensor, sigma: Tensor) -> Tensor:
    """x = clean + sigma * noise at unit variance, as networks in VE form see it; sigma has a shape that broadcasts."""
    return x / (sigma**2 + 1).sqrt()


def ve_drift(output: Tensor, x: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """dx/dsigma in VE form from the output of a network at x.

    Args:
        output: what the network returned, in the shape of x.
        x: clean + sigma * noise.
        sigma: > 0, of a shape that broadcasts with x.
        prediction_type: what the output is: "epsilon", "sample" or "v_prediction".

    Source: EDM (arXiv 2206.00364), table 1; v prediction (arXiv 2202.00512).
    """
    if prediction_type == "epsilon":
        return output
    if prediction_type == "sample":
        return (x - output) / sigma
    return x * sigma / (sigma**2 + 1) + output / (sigma**2 + 1).sqrt()


def _alphas_cumprod(facts: SchedulerFacts) -> Tensor:
    """The training noise schedule [T], float64, from diffusers' own betas."""
    from diffusers import DDIMScheduler  # here, since diffusers takes long to import

    given = facts.model_dump(exclude={"prediction_type"}, exclude_none=True)
    try:
        betas: Tensor = DDIMScheduler(**given).betas
    except NotImplementedError as error:
        raise TableError(f"beta_schedule is {shown(facts.beta_schedule)}, which diffusers does not know") from error
    return alphas_cumprod(betas)
