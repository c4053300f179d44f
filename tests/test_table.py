import json
import math
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import httpx
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

import epd_ray
import epd_ray.solvers
from epd_ray.errors import ScheduleError, TableError
from epd_ray.solvers import Solver, SolverTable, dpm2_table, heun_table
from epd_ray.solvers.costs import Cost, fewest_intervals, sequential_cost, table_cost
from epd_ray.solvers.table import COLUMN_NAMES

R = torch.tensor([[0.2, 0.6], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
W = torch.tensor([[0.3, 0.7], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
SIGMAS = torch.tensor([1.0, 0.6, 0.3, 0.1], dtype=torch.float64)
COLUMNS = ("positions", "weights", "scale_dir", "scale_time")


def put(values: torch.Tensor, row: int, k: int, value: float) -> torch.Tensor:
    changed = values.clone()
    changed[row, k] = value
    return changed


def test_derived_facts() -> None:
    table = SolverTable(R, W)
    assert (table.intervals, table.points, table.batch) == (3, 2, None)
    assert table.scale_dir is None and table.scale_time is None
    batched = SolverTable(R.expand(5, 3, 2), W.expand(5, 3, 2), torch.ones(5, 3, 2), torch.ones(5, 3, 2))
    assert (batched.intervals, batched.points, batched.batch) == (3, 2, 5)
    assert batched.to(torch.float32).positions.dtype == torch.float32
    assert batched.to(torch.float32).scale_time is not None


def test_named_tables() -> None:
    assert dpm2_table(2).positions.tolist() == [[0.5]] * 2
    assert heun_table(2).positions.tolist() == [[0.0, 1.0]] * 2
    assert heun_table(2).weights.tolist() == [[0.5, 0.5]] * 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((R, put(W, 0, 1, 0.67)), r"weights\[0\] sums to 0.97, expected 1 \(pass normalised weights\)"),
        ((R, put(W, 0, 1, 0.7002)), r"weights\[0\] sums to 1.0002"),
        ((R, torch.tensor([[0.3, 0.7], [1.5, -0.5], [1.0, 0.0]])), r"weights\[1, 1\] is -0.5, expected at least 0"),
        ((put(R, 1, 1, 1.2), W), r"positions\[1, 1\] is 1.2, expected a value in \[0, 1\]"),
        ((put(R, 0, 0, -0.1), W), r"positions\[0, 0\] is -0.1"),
        ((put(R, 0, 0, 0.7), W), r"positions\[0\] is \[0.7, 0.6\], expected increasing \(use from_unsorted\)"),
        ((put(R, 2, 1, math.nan), W), r"positions\[2, 1\] is nan, expected a finite number"),
        ((R, put(W, 2, 1, math.inf)), r"weights\[2, 1\] is inf"),
        ((R, W[:2]), r"weights has shape \[2, 2\], expected that of positions: \[3, 2\]"),
        ((R[0], W[0]), r"shape \[2\], expected \[N, K\] or \[B, N, K\]"),
        ((R[:0], W[:0]), r"shape \[0, 2\]"),
        ((R, W, torch.zeros_like(W)), r"scale_dir\[0, 0\] is 0, expected above 0"),
        ((R, W, None, put(torch.ones_like(W), 2, 0, -1.0)), r"scale_time\[2, 0\] is -1"),
        ((R, W, None, torch.ones(3, 1)), "scale_time has shape"),
        ((R.long(), W), "dtype torch.int64"),
        ((R.expand(2, 3, 2), torch.stack([W, put(W, 1, 0, 0.2)])), r"weights\[1, 1\] sums to 0.7"),
    ],
)
def test_refuses_broken_tables(columns: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(TableError, match=message):
        SolverTable(*columns)


def test_float32_rounding_is_accepted() -> None:
    SolverTable(R.float(), torch.rand(3, 2, generator=torch.Generator().manual_seed(0)).softmax(-1))


def test_from_unsorted_moves_points_together() -> None:
    table = SolverTable.from_unsorted(R.flip(-1), W.flip(-1), scale_time=torch.tensor([[1.0, 2.0]] * 3))
    assert torch.equal(table.positions, R)
    assert torch.equal(table.weights[:2], W[:2])
    assert table.scale_time is not None and table.scale_time[0].tolist() == [2.0, 1.0]
    with pytest.raises(TableError, match="differ"):
        SolverTable.from_unsorted(R, W[:2])


def test_evaluation_counts() -> None:
    plain, afs = Solver(SolverTable(R, W), SIGMAS), Solver(SolverTable(R, W), SIGMAS, "flow", afs=True)
    assert (plain.parallel_nfe, plain.model_evals) == (6, 9)
    assert (afs.parallel_nfe, afs.model_evals) == (5, 8)


@pytest.mark.parametrize(
    ("meta", "passes"),
    [
        ({"guidance_scale": 1.5, "classifier_free": True}, 18),
        ({"guidance_scale": 1, "classifier_free": True}, 9),
        ({"guidance_scale": 3.5, "classifier_free": False}, 9),  # the network takes the scale as an input
        ({"guidance_scale": 0.0}, 9),
        ({"classifier_free": False}, 9),
        ({"guidance_scale": 1.5}, None),
        ({"classifier_free": True}, None),
        ({}, None),
    ],
)
def test_passes_are_counted_only_where_guidance_is_known(meta: dict[str, JsonValue], passes: int | None) -> None:
    assert Solver(SolverTable(R, W), SIGMAS, meta=meta).network_passes == passes


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Solver(SolverTable(R, W), SIGMAS[:-1]), TableError, "3 intervals, but 3 sigmas make 2"),
        (lambda: Solver(SolverTable(R, W), SIGMAS.flip(0)), ScheduleError, r"sigmas\[1\]"),
        (lambda: Solver(SolverTable(R, W), SIGMAS - 0.1), ScheduleError, "terminal 0"),
        (lambda: Solver(SolverTable(R, W), SIGMAS, order=5), TableError, "order is 5"),
        (lambda: Solver(SolverTable(R, W), SIGMAS, afs=True), TableError, "afs needs form"),
        (lambda: Solver(SolverTable(R, W), SIGMAS, form="vp"), TableError, "form is 'vp'"),  # type: ignore[arg-type]
        (lambda: Solver(SolverTable(R, W), 2 * SIGMAS, "flow"), ScheduleError, r"sigmas\[0\] is 2, expected at most 1"),
        (lambda: Solver(SolverTable(R[None], W[None]), SIGMAS), TableError, "for 1 samples"),
    ],
)
def test_solver_refuses_parts_that_do_not_fit(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_save_and_load(tmp_path: Path) -> None:
    meta: dict[str, Any] = {
        "model_id": "stabilityai/sd3",
        "note": "a [ 1,\n 2 ] | b",
        "rewards": {"before": 0.1, "after": [0.2, None]},
    }
    solver = Solver(SolverTable(R, W, W + 0.5), SIGMAS, "flow", afs=True, order=3, meta=meta)
    path = solver.save_pretrained(tmp_path / "new" / "solver")
    loaded = Solver.from_pretrained(path.parent)
    for name in COLUMNS:
        before, after = getattr(solver.table, name), getattr(loaded.table, name)
        assert (before is None and after is None) or torch.equal(before, after)
    assert torch.equal(loaded.sigmas, SIGMAS)
    assert (loaded.form, loaded.afs, loaded.order, loaded.meta) == ("flow", True, 3, meta)
    assert sorted(file.name for file in path.parent.iterdir()) == ["README.md", "scheduler_config.json", "solver.json"]
    assert "[ 0.2, 0.6 ]" in path.read_text()
    card = (path.parent / "README.md").read_text()
    assert (
        "base_model: stabilityai/sd3\n" in card and "parallel NFE 5" in card and "| 1 to 0.6 | 0.2000, 0.6000 |" in card
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), intervals=st.integers(1, 5), points=st.integers(1, 4))
def test_every_table_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, seed: int, intervals: int, points: int
) -> None:
    r, q, c = torch.rand(3, intervals, points, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    table = SolverTable.from_unsorted(r, q.softmax(-1), scale_time=c + 0.5)
    sigmas = torch.linspace(5, 0.1, intervals + 1, dtype=torch.float64)
    path = Solver(table, sigmas).save_pretrained(tmp_path_factory.mktemp("solver"))
    loaded = Solver.from_pretrained(path.parent).table
    assert torch.equal(loaded.positions, table.positions) and torch.equal(loaded.weights, table.weights)
    assert loaded.scale_time is not None and table.scale_time is not None
    assert torch.equal(loaded.scale_time, table.scale_time)


def test_solver_travels_by_pickle() -> None:
    again = pickle.loads(pickle.dumps(Solver(SolverTable(R, W), SIGMAS)))
    assert torch.equal(again.table.positions, R) and again.model_evals == 9


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solver = Solver(SolverTable(R, W), SIGMAS)
    before = solver.save_pretrained(tmp_path).read_text()

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        Solver(SolverTable(R, W), SIGMAS, order=2).save_pretrained(tmp_path)
    assert (tmp_path / "solver.json").read_text() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "solver.json"]


@pytest.mark.parametrize("value", [math.nan, object()])
def test_refuses_meta_that_is_not_json(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TableError, match="meta cannot be written as JSON"):
        Solver(SolverTable(R, W), SIGMAS, meta={"value": value}).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version is 3, expected 1 or 2"),
        ({"sigmas": [1.0, 0.5]}, "3 intervals, but 2 sigmas"),
        ({"sigmas": [1.0, 0.6, 0.3, 0.0]}, "terminal 0"),
        ({"weights": [[0.3, 0.7], [0.5, 0.5]]}, "weights has shape"),
        ({"weights": [[0.3, 0.7], [0.5], [1.0, 0.0]]}, r"weights has rows of \[1, 2\] values"),
        ({"weights": [[0.3, 0.6], [0.5, 0.5], [1.0, 0.0]]}, r"weights\[0\] sums to 0.9"),
        ({"positions": []}, "shape"),
        ({"positions": "no"}, "positions: Input should be a valid list"),
        ({"order": "2"}, "order: Input should be a valid integer"),
        ({"surprise": 1}, "surprise: Extra inputs"),
    ],
)
def test_refuses_damaged_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = Solver(SolverTable(R, W), SIGMAS).save_pretrained(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TableError, match=message) as error:
        Solver.from_pretrained(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "format_version is None"),
        (b"{}", "format_version is None"),
        (b'{"format_version": 1}', "form: Field required"),
        (b"\xff\xfe", "not valid UTF-8"),
        (b"[" * 200_000, "too deep"),
        (b"9" * 5000, "not valid JSON: Exceeds the limit"),
    ],
)
def test_refuses_files_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "solver.json").write_bytes(content)
    with pytest.raises(TableError, match=message) as error:
        Solver.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_pickle_is_told_where_to_go(tmp_path: Path) -> None:
    file = tmp_path / "x.pkl"
    file.write_bytes(b"\x80\x04.")
    for source in (file, tmp_path / "absent.pkl"):
        with pytest.raises(TableError, match=rf"tables import .*{source.name} --out"):
            Solver.from_pretrained(source)


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TableError, match=r"solver.json cannot be read: No such file"):
        Solver.from_pretrained(tmp_path)
    with pytest.raises(TableError, match="is no directory"):
        Solver.from_pretrained(tmp_path / "missing" / "deep")

    def offline(*args: Any, **kwargs: Any) -> str:
        raise OSError("offline\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(TableError, match=r"'owner/name'.*offline$"):
        Solver.from_pretrained("owner/name")

    def gated(*args: Any, **kwargs: Any) -> str:
        response = httpx.Response(403, request=httpx.Request("GET", "https://hub/x"))
        raise GatedRepoError("403 Client Error. (Request ID: 1)\n\nCannot access it.\nAsk.", response=response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", gated)
    with pytest.raises(TableError, match="HF_TOKEN"):
        Solver.from_pretrained("owner/name")

    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(TableError, match="hub: no route"):
        Solver.from_pretrained("owner/name")


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Solver(SolverTable(R, W), SIGMAS).save_pretrained(tmp_path)
    asked: list[Any] = []

    def download(repo_id: str, filename: str, *, revision: str | None) -> str:
        asked.append((repo_id, filename, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert Solver.from_pretrained("owner/name", revision="v1").parallel_nfe == 6
    assert asked == [("owner/name", "solver.json", "v1")]


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_a_table_is_made_of_its_columns(columns: int) -> None:
    values = dict(zip(COLUMNS, (R, W, torch.full_like(W, 1.5), torch.full_like(W, 0.5)), strict=True))
    given = {name: values[name] for name in COLUMNS[:columns]}
    table = SolverTable(**given)
    assert list(table.columns()) == list(given) and tuple(COLUMN_NAMES) == COLUMNS
    lists = table.to_lists()
    assert tuple(lists) == COLUMNS and [name for name in COLUMNS if lists[name] is None] == list(COLUMNS[columns:])
    again = SolverTable.from_lists(lists)  # type: ignore[arg-type]  # JSON values
    for name, column in again.columns().items():
        assert column.dtype == torch.float64 and torch.equal(column, given[name].double())
    with pytest.raises(TableError, match=r"weights has rows of \[1, 2\] values"):
        SolverTable.from_lists({"positions": [[0.5, 1.0]], "weights": [[1.0], [0.5, 0.5]]})


def test_costs_are_those_of_every_interval() -> None:
    cost = {
        (afs, start): table_cost(3, 2, start_point=start, afs=afs) for afs in (False, True) for start in (False, True)
    }
    assert cost[False, False] == Cost(6, 9) and cost[True, False] == Cost(5, 8)
    # The first interval's start is a point that nobody evaluated, if its drift was analytical.
    assert cost[False, True] == Cost(6, 6) and cost[True, True] == Cost(5, 6)
    assert table_cost(3, 1, start_point=True) == Cost(3, 3)
    assert sequential_cost(4, 2, 1) == Cost(7, 7) and sequential_cost(4, 2, 1, afs=True) == Cost(6, 6)
    for evals, last in ((1, None), (2, None), (2, 1), (4, None)):
        for nfe in range(1, 12):
            n = fewest_intervals(nfe, evals, last)
            assert sequential_cost(n, evals, last).parallel_nfe >= nfe
            assert n == 1 or sequential_cost(n - 1, evals, last).parallel_nfe < nfe


@pytest.mark.parametrize("package", [epd_ray, epd_ray.solvers])
def test_packages_offer_what_they_list(package: ModuleType) -> None:
    assert all(getattr(package, name) is not None for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing
    # An imported submodule takes its name in the package: the name would stand for the module instead.
    folder = Path(package.__path__[0])
    assert not set(package.__all__) & {path.stem for path in folder.iterdir()}
