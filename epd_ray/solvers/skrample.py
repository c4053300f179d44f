"""Samplers of the skrample library (the extra `skrample`) on any sigmas: `solve(drift, x, sigmas, *, form, ...)`.

The library describes a noise level by two numbers, sigma and alpha, where x = alpha * clean + sigma * noise. In VE form
they are (sigma, 1), in flow form (sigma, 1 - sigma). Its formulas accept any such pair, so the state is not rescaled.
Each sampler integrates the denoised x, which is the library's default. It is imported inside the functions, because it
is an optional dependency.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from epd_ray.solvers.epd import Callback
from epd_ray.solvers.schedules import check_sigmas
from epd_ray.types import Drift, Form

Values = npt.NDArray[np.float64]


def structured(
    drift: Drift, x: Tensor, sigmas: Tensor, *, form: Form, sampler: str, order: int, callback: Callback | None = None
) -> Tensor:
    """A multistep sampler of skrample.sampling.structured: N evaluations, parallel NFE N.

    As in the library, the first and the last intervals are of lower order.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing, >= 0; at most 1 in flow form.
        form: how noise enters x, "ve" or "flow".
        sampler: "DPM", "Adams", "UniP" or "UniPC".
        order: 1 to 3 for DPM, 1 to 9 for the others.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N], [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease or fall below 0.

    Source: DPM-Solver++ (arXiv 2211.01095), UniPC (arXiv 2302.04867), and Adams-Bashforth on the denoised x.
    """
    from skrample.sampling import structured as samplers
    from skrample.sampling.interface import StructuredFunctionalAdapter

    check_sigmas(sigmas, allow_zero=True)
    known = {"DPM": samplers.DPM, "Adams": samplers.Adams, "UniP": samplers.UniP, "UniPC": samplers.UniPC}
    return _sample(StructuredFunctionalAdapter(known[sampler](order=order)), drift, x, sigmas, form, callback)


def runge_kutta(
    drift: Drift, x: Tensor, sigmas: Tensor, *, form: Form, order: int, callback: Callback | None = None
) -> Tensor:
    """Ralston's Runge-Kutta method of least error bound (RKUltra): order * N evaluations, parallel NFE the same.

    Args:
        drift: returns dx/dsigma at (x [B, ...], sigma [B]).
        x: [B, ...], the state at sigmas[0].
        sigmas: [N+1], decreasing, > 0; at most 1 in flow form.
        form: how noise enters x, "ve" or "flow".
        order: 2, 3 or 4; also the number of evaluations per interval.
        callback: called with (step_index, sigma_next, x) after each interval.

    Returns:
        The state at sigmas[N], [B, ...].

    Raises:
        ScheduleError: sigmas that do not decrease or reach 0.

    Source: Ralston, Runge-Kutta Methods with Minimum Error Bounds (1962), on the denoised x.
    """
    from skrample.sampling.functional import RKUltra
    from skrample.sampling.tableaux import RK2, RK3, RK4

    check_sigmas(sigmas)
    tableau = {2: RK2.Ralston, 3: RK3.Ralston, 4: RK4.Ralston}[order]
    return _sample(RKUltra(order=order, providers={order: tableau}), drift, x, sigmas, form, callback)


def _sample(sampler: Any, drift: Drift, x: Tensor, sigmas: Tensor, form: Form, callback: Callback | None) -> Tensor:
    from skrample.sampling.models import FlowModel, NoiseModel

    model = FlowModel() if form == "flow" else NoiseModel()  # what the drift is: velocity, or noise
    values = sigmas.tolist()

    def predict(state: Tensor, timestep: float, sigma: float, alpha: float) -> Tensor:
        return drift(state, state.new_full(state.shape[:1], sigma))

    def report(state: Tensor, i: int, interval: Any) -> None:
        if callback is not None:
            callback(i, values[i + 1], state)

    result: Tensor = sampler.sample_model(
        x, predict, model, _grid()(tuple(values), form), len(values) - 1, callback=report
    )
    return result


@cache
def _grid() -> Any:
    """The class of a schedule through given sigmas. It is made in a function because its base class is in skrample."""
    from skrample.scheduling import FlowMatching, SigmaSpace, SkrampleSchedule, VariancePreserving

    class Grid(SkrampleSchedule):  # type: ignore[misc]  # the package has no types here
        """Sigmas [N+1] at the times 1, 1 - 1/N, ..., 0; between them 1 / sigma is interpolated linearly.

        The denoised x is integrated over 1 / sigma, so this lets a Runge-Kutta method keep its order.
        """

        def __init__(self, sigmas: Sequence[float], form: Form) -> None:
            self._sigmas, self._form = np.asarray(sigmas), form

        @property
        def space(self) -> SigmaSpace:
            return FlowMatching() if self._form == "flow" else VariancePreserving()

        def _points(self, t: Values) -> Values:
            sigma = between(self._sigmas, (1 - t) * (len(self._sigmas) - 1))
            alpha = 1 - sigma if self._form == "flow" else np.ones_like(sigma)
            return np.stack([sigma, sigma, alpha], axis=1)  # time itself matters to no sampler: drift knows sigma

    return Grid


def between(sigmas: Values, position: Values) -> Values:
    """Sigmas at positions in [0, N]: the grid's own at whole positions, else interpolated linearly in 1 / sigma.

    Args:
        sigmas: [N+1], decreasing, >= 0.
        position: [M]; a position within 1e-9 of a whole number counts as whole.

    Returns:
        [M].
    """
    nearest = position.round().astype(int)
    low = np.minimum(position.astype(int), len(sigmas) - 2)
    share = position - low
    with np.errstate(divide="ignore", invalid="ignore"):  # a last sigma of 0
        inner = 1 / ((1 - share) / sigmas[low] + share / sigmas[low + 1])
    found: Values = np.where(np.abs(position - nearest) < 1e-9, sigmas[nearest], inner)
    return found
