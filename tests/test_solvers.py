import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from epd_ray.backbones.gaussian import Mixture
from epd_ray.errors import ScheduleError, TableError
from epd_ray.solvers import Form, Solver, SolverTable, dpm2, dpm2_table, euler, heun, heun_table, ipndm, schedules
from epd_ray.solvers.epd import epd
from epd_ray.types import Drift

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "golden_solvers.json").read_text())
GAUSSIAN = Mixture(torch.full((1, 2), 0.4), torch.tensor([0.5]), torch.ones(1))


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_table(*shape: int, scales: bool = True, seed: int = 0) -> SolverTable:
    r, q, o, c = torch.rand(4, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scaled = (0.9 + 0.2 * o, 0.9 + 0.2 * c) if scales else (None, None)
    return SolverTable(r.sort(-1).values, q.softmax(-1), *scaled)


def latents(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    """A drift that is non-linear in x and sigma, for any rank, sample by sample."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return (x - torch.sin(x + sigma)) / (1 + sigma)


def golden_drift(form: Form) -> Drift:
    flat = GOLDEN["mixture"]
    means = tensor(flat["means"]).reshape(-1, *flat["shape"])
    mixture = Mixture(means, tensor(flat["std"]), tensor(flat["probs"]))

    def flow(x: Tensor, sigma: Tensor) -> Tensor:
        # The golden values come from a denoiser that keeps 1 - sigma above 1e-6.
        alpha = (1 - sigma).clamp(min=1e-6)
        clean = mixture.denoise(x / alpha[:, None, None, None], sigma / alpha, "ve")
        return (x - clean) / sigma[:, None, None, None]

    return flow if form == "flow" else lambda x, sigma: mixture.drift(x, sigma, "ve")


def golden_sigmas(args: dict[str, Any]) -> Tensor:
    if args["schedule_type"] == "flowmatch":
        return schedules.flow_shifted(args["num_steps"])
    span = args["num_steps"], args["sigma_min"], args["sigma_max"]
    return schedules.logsnr(*span) if args["schedule_type"] == "logsnr" else schedules.polynomial(*span)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_matches_the_reference(case: dict[str, Any]) -> None:
    args, form, drift = case["args"], case["model"], golden_drift(case["model"])
    sigmas = golden_sigmas(args)
    x = tensor(GOLDEN["latents"]) * (sigmas[0] if form == "ve" else 1)
    norms = [x.norm().item()]

    def record(step: int, sigma: float, state: Tensor) -> None:
        assert sigma == sigmas[step + 1].item() and step == len(norms) - 1
        norms.append(state.norm().item())

    if case["table"] is not None:
        table = SolverTable(**{name: tensor(rows) for name, rows in case["table"].items()})
        order, afs = args.get("max_order", 1), args.get("afs", False)
        result = epd(drift, x, sigmas, table, order=order, afs=afs, form=form, callback=record)
    elif "max_order" in args:
        result = ipndm(drift, x, sigmas, order=args["max_order"], callback=record)
    else:
        solve = {"ddim": euler, "heun": heun, "dpm2": dpm2}[case["name"].removesuffix("_flow")]
        result = solve(drift, x, sigmas, callback=record)
    assert result.dtype == torch.float64
    assert torch.allclose(result, tensor(case["output"]), rtol=0, atol=1e-9)
    assert len(norms) == len(sigmas)
    assert norms == pytest.approx(case["trajectory_norms"] or norms, abs=1e-9)


def observed_order(solve: Callable[[Drift, Tensor, Tensor], Tensor], counts: tuple[int, ...] = (32, 64, 128)) -> float:
    """Minus the slope of log error over log N on a geometric grid, by least squares."""
    x, errors = latents(3, 2) * 10, []
    exact = GAUSSIAN.solution(x, 10.0, 0.1, "ve")
    for count in counts:
        end = solve(lambda x, s: GAUSSIAN.drift(x, s, "ve"), x, schedules.logsnr(count + 1, 0.1, 10.0))
        errors.append((end - exact).abs().max().item())
    n, e = tensor(counts).log(), tensor(errors).log()
    return -((n - n.mean()) * (e - e.mean())).sum().item() / ((n - n.mean()) ** 2).sum().item()


def rows(r: list[float], w: list[float]) -> Callable[[int], SolverTable]:
    return lambda n: SolverTable(tensor([r] * n), tensor([w] * n))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        pytest.param(dpm2_table, 2, id="dpm2"),
        pytest.param(heun_table, 2, id="heun"),
        pytest.param(rows([0.335, 0.665], [0.5, 0.5]), 2, id="thirds"),
        pytest.param(rows([0.2, 0.5, 0.6], [0.2, 0.2, 0.6]), 2, id="three-points"),
        pytest.param(rows([0.2], [1.0]), 1, id="early"),
        pytest.param(rows([0.6, 0.9], [0.5, 0.5]), 1, id="late"),
    ],
)
def test_table_order(table: Callable[[int], SolverTable], expected: int) -> None:
    t = table(1)
    assert ((t.weights * t.positions).sum() - 0.5).abs().item() < 1e-12 or expected == 1
    assert observed_order(lambda f, x, s: epd(f, x, s, table(len(s) - 1))) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("solve", "expected"), [(euler, 1), (heun, 2), (dpm2, 2)])
def test_baseline_order(solve: Any, expected: int) -> None:
    assert observed_order(solve) == pytest.approx(expected, abs=0.1)


def test_named_tables_are_the_named_solvers() -> None:
    x, sigmas = latents(2, 3), tensor([5.0, 2.0, 0.7, 0.1])
    assert torch.allclose(epd(curved, x, sigmas, heun_table(3)), heun(curved, x, sigmas), atol=1e-14)
    assert torch.equal(epd(curved, x, sigmas, dpm2_table(3)), dpm2(curved, x, sigmas))
    assert torch.equal(ipndm(curved, x, sigmas, order=1), euler(curved, x, sigmas))


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("points", [1, 2, 3])
def test_counts_match_the_calls(points: int, afs: bool) -> None:
    calls: list[int] = []

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == x.shape[:1] and sigma.dtype == x.dtype
        calls.append(len(x))
        return curved(x, sigma)

    solver = Solver(random_table(4, points), tensor([8.0, 4.0, 2.0, 1.0, 0.5]), "ve", afs=afs)
    solver.solve(counting, latents(5, 3))
    assert len(calls) == solver.parallel_nfe
    assert sum(calls) == 5 * solver.model_evals
    assert calls[-2:] == [5, 5 * points]


@pytest.mark.parametrize(("order", "afs"), [(1, False), (3, False), (1, True)])
def test_a_start_point_is_not_evaluated_twice(order: int, afs: bool) -> None:
    """The same step as with a first point that is next to the start, which needs an evaluation of its own."""
    table, calls = random_table(4, 3), []
    nearly, exactly = (
        SolverTable(torch.cat([torch.full((4, 1), first).double(), table.positions[:, 1:]], 1), table.weights)
        for first in (1e-9, 0.0)
    )

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x))
        return curved(x, sigma)

    sigmas, x = tensor([8.0, 4.0, 2.0, 1.0, 0.5]), latents(5, 3)
    slow, fast = (Solver(t, sigmas, "ve", afs=afs, order=order) for t in (nearly, exactly))
    assert not nearly.start_point and exactly.start_point
    torch.testing.assert_close(fast.solve(counting, x), slow.solve(curved, x), rtol=0, atol=1e-7)
    assert sum(calls) == 5 * fast.model_evals and fast.model_evals == slow.model_evals - 4 + afs


@pytest.mark.parametrize("afs", [False, True])
def test_a_lone_start_point_is_euler_with_stretched_steps(afs: bool) -> None:
    sigmas, x = tensor([8.0, 4.0, 2.0, 1.0, 0.5]), latents(5, 3)
    ones, scales = torch.ones(4, 1).double(), tensor([0.5, 1.0, 1.2, 0.8])
    calls: list[int] = []

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(len(x))
        return curved(x, sigma)

    plain, stretched = (SolverTable(0 * ones, ones, scale_dir=s) for s in (None, scales[:, None]))
    solver = Solver(stretched, sigmas, "ve", afs=afs)
    expected = x
    for scale, (a, b) in zip(scales, pairwise(sigmas.tolist()), strict=True):
        expected = expected + scale * (b - a) * curved(expected, torch.full((5,), a).to(x))
    torch.testing.assert_close(solver.solve(counting, x), expected)
    assert calls == [5] * 4 and solver.parallel_nfe == solver.model_evals == 4
    torch.testing.assert_close(Solver(plain, sigmas).solve(curved, x), euler(curved, x, sigmas))


def test_heun_as_a_table_costs_what_heun_does() -> None:
    solver = Solver(heun_table(4), tensor([8.0, 4.0, 2.0, 1.0, 0.5]))
    assert solver.model_evals == solver.parallel_nfe == 8
    scaled = replace(solver.table, scale_time=torch.full((4, 2), 1.1))
    assert scaled.cost().model_evals == 12  # its first points are evaluated at another time


@pytest.mark.parametrize(("solve", "calls"), [(euler, 3), (ipndm, 3), (heun, 6), (dpm2, 6)])
def test_baseline_counts(solve: Any, calls: int) -> None:
    seen: list[int] = []

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(len(x))
        return curved(x, sigma)

    solve(counting, latents(2, 3), tensor([4.0, 2.0, 1.0, 0.5]))
    assert seen == [2] * calls


def test_points_are_batched_sample_major() -> None:
    table, sigmas, x = random_table(2, 1, 3, seed=3), tensor([4.0, 1.0]), latents(2, 1)
    seen: list[Tensor] = []

    def recording(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return curved(x, sigma)

    epd(recording, x, sigmas, table)
    assert table.scale_time is not None
    expected = table.scale_time * 1.0**table.positions * 4.0 ** (1 - table.positions)  # [2, 1, 3]
    assert torch.allclose(seen[1], expected.flatten(), atol=1e-14)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 3), (4, 2, 3, 2)], ids=str)
def test_per_sample_tables_equal_a_loop(shape: tuple[int, ...], order: int) -> None:
    table, sigmas, x = random_table(4, 5, 2), tensor([9.0, 5.0, 2.0, 0.8, 0.3, 0.1]), latents(4, *shape)
    together = epd(curved, x, sigmas, table, order=order)
    assert together.shape == x.shape
    assert table.scale_dir is not None and table.scale_time is not None
    for b in range(4):
        one = SolverTable(table.positions[b], table.weights[b], table.scale_dir[b], table.scale_time[b])
        alone = epd(curved, x[b : b + 1], sigmas, one, order=order)
        assert torch.allclose(together[b : b + 1], alone, rtol=0, atol=1e-12)


def test_order_of_points_does_not_matter() -> None:
    r, w, o, c = torch.rand(4, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    swap = torch.tensor([2, 0, 3, 1])
    columns = {"positions": r, "weights": w.softmax(-1), "scale_dir": o + 0.5, "scale_time": c + 0.5}
    x, sigmas = latents(2, 3), tensor([5.0, 2.0, 0.7, 0.1])
    first, second = (
        epd(curved, x, sigmas, SolverTable.from_unsorted(**{name: v[:, p] for name, v in columns.items()}))
        for p in (slice(None), swap)
    )
    assert torch.equal(first, second)


def test_float32_stays_close_to_float64() -> None:
    table, sigmas, x = random_table(4, 2), schedules.logsnr(5, 0.01, 14.6), latents(2, 3)
    single = epd(curved, x.float(), sigmas, table)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), epd(curved, x, sigmas, table), rtol=1e-5, atol=1e-5)


def test_analytic_first_step_uses_the_form() -> None:
    x, sigmas, table = latents(2, 3), tensor([0.8, 0.2]), dpm2_table(1)
    first: dict[Form, Tensor] = {"ve": x / math.sqrt(1 + 0.8**2), "flow": x / 0.8}
    for form, d in first.items():
        middle = math.sqrt(0.8 * 0.2)
        expected = x - 0.6 * curved(x + (middle - 0.8) * d, torch.full((2,), middle, dtype=torch.float64))
        assert torch.allclose(epd(curved, x, sigmas, table, afs=True, form=form), expected, atol=1e-14)


@pytest.mark.parametrize("solve", [euler, ipndm])
def test_one_step_solvers_reach_zero(solve: Any) -> None:
    end = solve(lambda x, s: GAUSSIAN.drift(x, s, "ve"), latents(2, 2), tensor([2.0, 1.0, 0.0]))
    assert bool(end.isfinite().all())


@pytest.mark.parametrize(
    "solve", [dpm2, heun, lambda f, x, s: epd(f, x, s, dpm2_table(len(s) - 1))], ids=["dpm2", "heun", "epd"]
)
def test_two_step_solvers_refuse_zero(solve: Any) -> None:
    with pytest.raises(ScheduleError, match=r"sigmas\[2\] is 0"):
        solve(curved, latents(2, 2), tensor([2.0, 1.0, 0.0]))


@pytest.mark.parametrize("solve", [euler, ipndm, heun, dpm2, lambda f, x, s: epd(f, x, s, dpm2_table(2))])
def test_every_solver_refuses_sigmas_that_rise(solve: Any) -> None:
    with pytest.raises(ScheduleError, match=r"sigmas\[2\] is 1\.5.*sigmas\[1\] = 1"):
        solve(curved, latents(2, 2), tensor([2.0, 1.0, 1.5]))


def test_refuses_tables_that_do_not_fit() -> None:
    x, sigmas = latents(2, 2), tensor([1.0, 0.5, 0.2])
    with pytest.raises(TableError, match="3 intervals, but 3 sigmas make 2"):
        epd(curved, x, sigmas, dpm2_table(3))
    with pytest.raises(TableError, match="for 3 samples, but x has 2"):
        epd(curved, x, sigmas, random_table(3, 2, 2))
    with pytest.raises(TableError, match="order is 0"):
        epd(curved, x, sigmas, dpm2_table(2), order=0)
    with pytest.raises(TableError, match="order is 5"):
        ipndm(curved, x, sigmas, order=5)
    with pytest.raises(TableError, match="afs needs form"):
        epd(curved, x, sigmas, dpm2_table(2), afs=True)


def test_flow_refuses_times_beyond_one() -> None:
    half = tensor([[0.5, 0.5]] * 2)
    table = SolverTable(tensor([[0.01, 0.5]] * 2), half, scale_time=tensor([[1.04, 1.0], [1.0, 1.0]]))
    x, sigmas = latents(3, 2), tensor([1.0, 0.5, 0.2])
    with pytest.raises(TableError, match=r"scale_time\[0, 0\] is 1\.04.*1\.03282"):
        epd(curved, x, sigmas, table, form="flow")
    batched = torch.ones(3, 2, 2, dtype=torch.float64)
    batched[2, 1, 1] = 4
    table = SolverTable(table.positions.expand(3, 2, 2), half.expand(3, 2, 2), scale_time=batched)
    with pytest.raises(TableError, match=r"scale_time\[2, 1, 1\] is 4"):
        epd(curved, x, sigmas, table, form="flow")
    assert epd(curved, x, sigmas, table, form="ve").shape == x.shape
