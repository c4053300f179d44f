"""A table that also sets its grid, its history and its guidance: against loops that are typed here."""

import json

import pytest
import torch
from torch import Tensor

from epd_ray.backbones.conditioning import TextConditioning, guided_at, guided_drift
from epd_ray.deploy.scheduler import EPDScheduler
from epd_ray.errors import TableError
from epd_ray.solvers import Solver, SolverTable
from epd_ray.solvers.conditioned import ConditionedDrift
from epd_ray.solvers.costs import Cost
from epd_ray.solvers.epd import epd
from epd_ray.solvers.grid import regrid

SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.05], dtype=torch.float64)
SHARES = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64)
N = 4


def one_device(**parts: Tensor) -> SolverTable:
    """Euler's method, with further parts."""
    return SolverTable(torch.zeros(N, 1).double(), torch.ones(N, 1).double(), **parts)


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.sin(3 * x) * sigma.reshape(-1, *[1] * (x.ndim - 1)) + 0.3 * x**2


class Guided:
    """A model whose prompt moves the drift; counts the rows that its network sees."""

    family, model_id, classifier_free = "guided", "guided", True

    def __init__(self) -> None:
        self.rows = 0

    def network(self, x: Tensor, sigma: Tensor, tensors: tuple[Tensor, ...], scale: object = None) -> Tensor:
        self.rows += len(x)
        assert len(tensors[0]) == len(x) == len(sigma)
        return curved(x, sigma) + torch.cos(x) * tensors[0][:, None]

    def drift(self, x: Tensor, sigma: Tensor, conditioning: TextConditioning) -> Tensor:
        return guided_drift(self.network, x, sigma, conditioning)

    def guided(self, x, sigma, conditioning, scale, difference):
        return guided_at(self.network, x, sigma, conditioning, scale, difference, classifier_free=True)


def prompts(scale: float = 3.0) -> TextConditioning:
    words = torch.tensor([0.5, -1.0], dtype=torch.float64)
    both = torch.cat([torch.zeros(2).double(), words])
    return TextConditioning((both if scale > 1 else words,), 2, scale, scale > 1)


X = torch.tensor([[0.3, -0.7, 1.1], [0.9, 0.1, -0.4]], dtype=torch.float64)


def run(table: SolverTable, scale: float = 3.0, rows: slice = slice(0, 2)) -> tuple[Tensor, int]:
    model, told = Guided(), prompts(scale)
    tensors = tuple(torch.cat([half[rows] for half in t.split(2)]) for t in told.tensors)
    x = X[rows]
    conditioning = TextConditioning(tensors, len(x), scale, told.guided)
    return epd(ConditionedDrift(model, conditioning), x, SIGMAS, table, form="flow"), model.rows  # type: ignore[arg-type]


def parts_of(x: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """The drifts without and with the prompt."""
    empty = curved(x, x.new_full((2,), float(SIGMAS[i])))
    return empty, empty + torch.cos(x) * prompts().tensors[0][2:, None]


def test_equal_shares_are_the_schedule_and_others_keep_its_ends() -> None:
    torch.testing.assert_close(regrid(SIGMAS, torch.full((N,), 1 / N).double()), SIGMAS, rtol=1e-12, atol=0)
    found = regrid(SIGMAS, SHARES)
    logs = SIGMAS.log()
    places = [0.4 * N, 0.5 * N, 0.8 * N]
    inner = [float((logs[int(p)] + (p - int(p)) * (logs[int(p) + 1] - logs[int(p)])).exp()) for p in places]
    assert found.tolist() == pytest.approx([1.0, *inner, 0.05], rel=1e-12)


def test_a_grid_moves_the_intervals() -> None:
    table = one_device(grid=SHARES)
    expected = epd(curved, X, regrid(SIGMAS, SHARES), one_device())
    torch.testing.assert_close(epd(curved, X, SIGMAS, table), expected, rtol=1e-12, atol=0)
    assert not torch.allclose(epd(curved, X, SIGMAS, one_device()), expected)


def test_history_is_adams_bashforth_on_an_uneven_grid() -> None:
    widths = SIGMAS.diff()
    history = torch.zeros(N, 1).double()
    history[1:, 0] = widths[1:] / widths[:-1] / 2
    x, older = X, None
    for i in range(N):  # the exact integral of the line through the last two drifts
        now = curved(x, x.new_full((2,), float(SIGMAS[i])))
        slope = now if older is None else now + (now - older) * float(widths[i] / (2 * widths[i - 1]))
        x, older = x + float(widths[i]) * slope, now
    torch.testing.assert_close(epd(curved, X, SIGMAS, one_device(history=history)), x, rtol=1e-12, atol=0)


def test_every_interval_has_its_guidance_scale() -> None:
    scales = torch.tensor([5.0, 3.0, 1.0, 2.0]).double()
    x = X
    for i in range(N):
        empty, text = parts_of(x, i)
        x = x + float(SIGMAS[i + 1] - SIGMAS[i]) * (empty + float(scales[i]) * (text - empty))
    found, rows = run(one_device(guidance=scales))
    torch.testing.assert_close(found, x, rtol=1e-12, atol=0)
    assert rows == 2 * (2 + 2 + 1 + 2)
    same, _ = run(one_device(guidance=torch.full((N,), 3.0).double()))
    assert torch.equal(same, run(one_device())[0])


def test_a_reused_difference_saves_the_pass_without_the_prompt() -> None:
    x, difference = X, torch.zeros_like(X)
    reuse = [False, True, True, False]
    for i in range(N):
        empty, text = parts_of(x, i)
        difference = difference if reuse[i] else text - empty
        x = x + float(SIGMAS[i + 1] - SIGMAS[i]) * (text + 2 * difference)
    table = one_device(reuse=torch.tensor(reuse))
    found, rows = run(table)
    torch.testing.assert_close(found, x, rtol=1e-12, atol=0)
    assert rows == 2 * (2 + 1 + 1 + 2) and table.cost() == Cost(4, 4, 2)
    assert table.cost().network_passes(3.0, True) == 6 and table.cost().network_passes(1.0, True) == 4


def test_points_share_the_guidance_of_their_interval() -> None:
    positions, weights = torch.tensor([[0.0, 0.6]] * N).double(), torch.tensor([[0.4, 0.6]] * N).double()
    reuse = torch.tensor([False, True, False, True])
    table = SolverTable(positions, weights, guidance=torch.tensor([4.0, 4.0, 1.0, 2.0]).double(), reuse=reuse)
    found, rows = run(table)
    assert rows == 2 * (4 + 2 + 2 + 2) and table.cost() == Cost(8, 8, 6) and found.isfinite().all()


def test_samples_with_tables_of_their_own_are_drawn_as_if_alone() -> None:
    grids = torch.stack([SHARES, SHARES.flip(0)])
    history = torch.zeros(2, N, 2).double()
    history[:, 2:] = torch.tensor([0.3, -0.1]).double()
    history[1, 1, 0] = 0.2
    scales = torch.tensor([[2.0, 3.0, 4.0, 1.5], [3.0, 3.0, 2.5, 6.0]]).double()
    both = SolverTable(
        torch.zeros(2, N, 1).double(), torch.ones(2, N, 1).double(), grid=grids, history=history, guidance=scales
    )
    together, _ = run(both)
    for b in range(2):
        alone, _ = run(both.row(b), rows=slice(b, b + 1))
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-10, atol=0)
    assert torch.equal(both.rows(1, 2).row(0).history, history[1])  # type: ignore[arg-type]
    assert both.repeat_rows(2).grid.shape == (4, N)  # type: ignore[union-attr]


def test_lists_keep_every_part() -> None:
    table = one_device(
        grid=SHARES, history=torch.tensor([[0.0], [0.2], [0.3], [0.1]]).double(),
        guidance=torch.full((N,), 2.0).double(), reuse=torch.tensor([False, False, True, False]),
    )  # fmt: skip
    again = SolverTable.from_lists(table.to_lists())  # type: ignore[arg-type]  # JSON values
    for name in ("grid", "history", "guidance", "reuse"):
        assert torch.equal(getattr(again, name), getattr(table, name))
    assert set(one_device().to_lists()) == {"positions", "weights", "scale_dir", "scale_time"}


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"grid": torch.tensor([0.5, 0.5, 0.0, 0.0])}, r"grid\[2\] is 0, expected at least 1e-05"),
        ({"grid": torch.full((N,), 0.3)}, "grid sums to 1.2, expected 1"),
        ({"grid": torch.full((3,), 1 / 3)}, r"grid has shape \[3\], expected \[4\]"),
        ({"guidance": torch.tensor([1.0, 0.0, 1.0, 1.0])}, r"guidance\[1\] is 0, expected above 0"),
        ({"history": torch.ones(N, 1)}, r"history\[0, 0\] is 1, expected 0, because there is no earlier interval"),
        ({"history": torch.zeros(N, 4)}, "history has 4 entries an interval, expected 1 to 3"),
        ({"history": torch.zeros(N)}, r"history has shape \[4\], expected \[4, H\]"),
        ({"reuse": torch.tensor([True, False, False, False])}, "the first false"),
        ({"reuse": torch.tensor([False, True])}, "expected 4 truth values"),
        (
            {"guidance": torch.tensor([1.0, 1.0, 3.0, 3.0]), "reuse": torch.tensor([False, True, False, False])},
            r"reuse\[1\] is true, but no interval before it makes both passes",
        ),
    ],
)
def test_parts_that_break_a_rule_are_refused(parts: dict[str, Tensor], says: str) -> None:
    with pytest.raises(TableError, match=says):
        one_device(**parts)


def test_guidance_is_refused_where_there_is_none() -> None:
    table = one_device(guidance=torch.full((N,), 2.0))
    with pytest.raises(TableError, match="sets guidance, but this drift has none"):
        epd(curved, X, SIGMAS, table)
    with pytest.raises(TableError, match="sets guidance scale 2, but the prompts were encoded for 1"):
        run(table, scale=1.0)


def flow_solver(**parts: Tensor) -> Solver:
    positions, weights = torch.tensor([[0.0, 0.6]] * N).double(), torch.tensor([[0.4, 0.6]] * N).double()
    return Solver(SolverTable(positions, weights, **parts), SIGMAS, "flow", meta={"guidance_scale": 3.0})


HISTORY = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.6, -0.1], [0.4, 0.2]]).double()


def test_a_saved_solver_has_its_grid_in_its_sigmas(tmp_path) -> None:
    solver = flow_solver(grid=SHARES)
    assert solver.table.grid is None and solver.sigmas.tolist() == regrid(SIGMAS, SHARES).tolist()
    solver.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "solver.json").read_text())
    assert record["format_version"] == 1 and "grid" not in record
    assert torch.equal(Solver.from_pretrained(tmp_path).sigmas, solver.sigmas)


def test_files_of_version_2_keep_history_and_guidance(tmp_path) -> None:
    reuse = torch.tensor([False, True, False, False])
    solver = flow_solver(history=HISTORY, guidance=torch.tensor([4.0, 3.0, 2.0, 1.0]).double(), reuse=reuse)
    solver.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "solver.json").read_text())["format_version"] == 2
    again = Solver.from_pretrained(tmp_path).table
    assert torch.equal(again.history, HISTORY) and again.reused == [1]  # type: ignore[arg-type]
    assert again.guidance.tolist() == [4.0, 3.0, 2.0, 1.0] and again.unguided == [1, 3]  # type: ignore[union-attr]
    text = (tmp_path / "solver.json").read_text().replace('"format_version": 2', '"format_version": 3')
    (tmp_path / "solver.json").write_text(text)
    with pytest.raises(TableError, match="format_version is 3, expected 1 or 2"):
        Solver.from_pretrained(tmp_path)


@pytest.mark.parametrize("parallel", [False, True])
def test_the_scheduler_weighs_earlier_drifts_too(parallel: bool) -> None:
    solver = flow_solver(history=HISTORY)
    scheduler = EPDScheduler.from_solver(solver)
    if parallel:
        scheduler.set_parallel(True)
    scheduler.set_timesteps(N)
    x = X.clone()
    for t in scheduler.timesteps:
        points = scheduler.point_inputs(x) if parallel else None
        if points is None:
            output = curved(x, t.double().expand(2) / 1000)
        else:
            flat = points.hidden.flatten(0, 1)
            output = curved(flat, points.timesteps.double().repeat(2) / 1000)
        x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(x, solver.solve(curved, X), rtol=1e-4, atol=1e-5)
