import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epd_ray.errors import ScheduleError
from epd_ray.solvers import schedules

DATA = Path(__file__).parent / "data"
SOLVERS: dict[str, Any] = json.loads((DATA / "golden_solvers.json").read_text())
SD15: dict[str, Any] = json.loads((DATA / "golden_sd15_schedule.json").read_text())


@pytest.fixture(scope="module")
def alphas_cumprod() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


@pytest.mark.parametrize("case", SOLVERS["schedules"], ids=lambda c: f"{c['kind']}-{c['num_steps']}")
def test_matches_the_reference(case: dict[str, Any]) -> None:
    curve = [] if case["kind"] == "logsnr" else [case["rho"]]
    sigmas = getattr(schedules, case["kind"])(case["num_steps"], case["sigma_min"], case["sigma_max"], *curve)
    assert sigmas.dtype == torch.float64
    assert torch.allclose(sigmas, torch.tensor(case["sigmas"], dtype=torch.float64), rtol=1e-10, atol=0)
    schedules.check_sigmas(sigmas)


@pytest.mark.parametrize("case", SD15["schedules"], ids=lambda c: str(c["num_sigmas"]))
def test_discrete_matches_sd15(case: dict[str, Any], alphas_cumprod: Tensor) -> None:
    sigmas = schedules.discrete(case["num_sigmas"], alphas_cumprod, case["rho"])
    # The reference computes in float32: measured distance 5.8e-7 absolute, 1.6e-7 relative.
    assert torch.allclose(sigmas, torch.tensor(case["sigmas"], dtype=torch.float64), rtol=0, atol=1e-6)
    assert sigmas[0].item() == pytest.approx(SD15["sigma_max"], rel=1e-14)
    assert sigmas[-1].item() == pytest.approx(SD15["sigma_min"], rel=1e-14)


def test_network_timesteps_match_sd15(alphas_cumprod: Tensor) -> None:
    sigma = torch.tensor(SD15["sigma_to_network_timestep"]["sigma"], dtype=torch.float64)
    expected = torch.tensor(SD15["sigma_to_network_timestep"]["timestep"], dtype=torch.float64)
    timestep = schedules.sigma_to_timestep(sigma, alphas_cumprod)
    # float32 cannot hold 1e-6 of a step near 1000 (its spacing there is 6e-5): 1e-6 of the range of 1000 steps instead,
    # measured 2.8e-8 of it.
    assert torch.allclose(timestep / 1000, expected / 1000, rtol=0, atol=1e-7)
    assert torch.allclose(schedules.timestep_to_sigma(timestep, alphas_cumprod), sigma, rtol=1e-12, atol=0)


def test_timesteps_extend_beyond_training(alphas_cumprod: Tensor) -> None:
    timestep = torch.tensor([[-0.5, 1000.0], [0.0, 999.0]], dtype=torch.float64)
    sigma = schedules.timestep_to_sigma(timestep, alphas_cumprod)
    assert sigma.shape == (2, 2)
    assert sigma[0, 0] < sigma[1, 0] and sigma[0, 1] > sigma[1, 1]
    assert torch.allclose(schedules.sigma_to_timestep(sigma, alphas_cumprod), timestep, atol=1e-8)


def test_flow_shift() -> None:
    assert torch.equal(schedules.flow_shifted(3, shift=1.0, t_min=0.5), torch.tensor([1, 0.75, 0.5]).double())
    assert schedules.flow_shifted(3, shift=3.0, t_min=0.5)[-1].item() == pytest.approx(0.75)


def test_one_sigma_is_the_largest() -> None:
    assert schedules.polynomial(1, 0.1, 10).tolist() == pytest.approx([10])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.polynomial(0, 0.1, 1), "num_sigmas is 0"),
        (lambda: schedules.polynomial(3, 0.1, 1, rho=0), "rho is 0"),
        (lambda: schedules.logsnr(3, 0, 1), "sigma_min is 0"),
        (lambda: schedules.logsnr(3, 2, 1), "sigma_min is 2 and sigma_max 1"),
        (lambda: schedules.time_uniform(3, 0.1, math.inf), "sigma_max inf"),
        (lambda: schedules.time_uniform(3, 0.1, 1, rho=math.nan), "rho is nan"),
        (lambda: schedules.flow_shifted(3, shift=-1), "shift is -1"),
        (lambda: schedules.flow_shifted(3, t_min=1), "sigma_min is 1"),
        (lambda: schedules.discrete(0, torch.tensor([0.9, 0.1])), "num_sigmas is 0"),
        (lambda: schedules.discrete(3, torch.tensor([0.1, 0.9])), "alphas_cumprod"),
        (lambda: schedules.sigma_to_timestep(torch.tensor(1.0), torch.tensor([1.0, 0.5])), "alphas_cumprod"),
    ],
)
def test_refuses_values_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        make()


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], "shape"),
        ([[1.0, 0.5]], "shape"),
        ([1.0, math.nan, 0.1], r"sigmas\[1\] is nan"),
        ([1.0, 0.5, 0.5], r"sigmas\[2\] is 0.5, expected less than sigmas\[1\]"),
        ([1.0, 2.0], r"sigmas\[1\] is 2"),
        ([1.0, -1.0], "at least 0"),
        ([1.0, 0.0], "terminal 0"),
    ],
)
def test_check_sigmas(sigmas: list[float], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedules.check_sigmas(torch.tensor(sigmas))


def test_check_sigmas_allows_zero_where_asked() -> None:
    schedules.check_sigmas(torch.tensor([1.0, 0.0]), allow_zero=True)
