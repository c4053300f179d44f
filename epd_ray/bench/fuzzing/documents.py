"""Kinds of documents that are text: configurations, tables of solvers, and the JSON of models, runs and comparisons."""

import functools
import io
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from epd_ray.backbones.index import INDEX, read_index
from epd_ray.bench.fuzzing.importer import Importer, writes
from epd_ray.config.loading import load_config, to_yaml
from epd_ray.config.run_config import RunConfig
from epd_ray.deploy.scheduler import EPDScheduler
from epd_ray.evaluation.ab.records import KEY, RESULTS, Key, Pair, read_key, read_votes
from epd_ray.evaluation.records import Evaluation, read_evaluation
from epd_ray.rewards.imagereward import TextSizes, read_sizes
from epd_ray.runs.origin import Accepted, Origin, read_origin
from epd_ray.runs.saved import read_splits
from epd_ray.runs.trackers import TRACKING, known_runs
from epd_ray.solvers import Solver, SolverTable
from epd_ray.solvers.presets import PRESETS
from epd_ray.solvers.reference import read_reference
from epd_ray.solvers.scheduler_config import SCHEDULER_FILE
from epd_ray.storage.run_directory import RunDirectory, read_metrics
from epd_ray.telemetry.provenance import MADE_BY, Provenance, signed_by


def _dumped(value: object) -> bytes:
    return json.dumps(value).encode()


# -- configurations ---------------------------------------------------------------------------------------------------


@functools.cache
def _defaults() -> RunConfig:
    return load_config(None)


def _config(numbers: list[int]) -> tuple[bytes, Any]:
    a, b, c, d = numbers
    value = {"seed": a, "name": f"run{b}", "rdpo": {"iterations": c + 1, "lr": (d + 1) / 1e5}}
    expected = _defaults().model_dump(mode="json") | {"seed": a, "name": f"run{b}"}
    return yaml.safe_dump(value).encode(), expected | {"rdpo": expected["rdpo"] | value["rdpo"]}


def _override(numbers: list[int]) -> tuple[bytes, Any]:
    return b"seed=%d" % numbers[0], _defaults().model_dump(mode="json") | {"seed": numbers[0]}


def _read_override(path: Path) -> RunConfig:
    return load_config(None, [path.read_bytes().decode(errors="surrogateescape")])


def _config_seen(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


# -- solvers ----------------------------------------------------------------------------------------------------------


def _is_table(table: SolverTable) -> bool:
    """Whether a table keeps the rules of its class, which this checks anew."""
    positions, weights = table.positions, table.weights
    ordered = bool((positions.diff(dim=-1) >= 0).all() and (positions >= 0).all() and (positions <= 1).all())
    summed = bool(((weights.sum(-1) - 1).abs() < 1e-3).all() and (weights >= 0).all())
    return ordered and summed and all(bool(column.isfinite().all()) for column in table.columns().values())


def _is_solver(solver: Solver) -> bool:
    sigmas = solver.sigmas
    falling = bool((sigmas.diff() < 0).all() and sigmas[-1] > 0 and sigmas.isfinite().all())
    return falling and len(sigmas) == solver.table.intervals + 1 and _is_table(solver.table)


def _solver(numbers: list[int]) -> tuple[bytes, Any]:
    record = json.loads([*PRESETS.values()][numbers[1] % len(PRESETS)].read_text(encoding="utf-8"))
    record["meta"]["note"] = numbers
    return _dumped(record), [record["sigmas"], record["positions"], record["weights"], record["meta"]]


def _solver_seen(solver: Solver) -> Any:
    return [solver.sigmas.tolist(), solver.table.positions.tolist(), solver.table.weights.tolist(), dict(solver.meta)]


def _scheduler(numbers: list[int]) -> tuple[bytes, Any]:
    solver = Solver.from_pretrained([*PRESETS][numbers[1] % len(PRESETS)])
    values = solver.scheduler_config() or {}
    values["replaced"] = {"shift": numbers[0] / 8, "_use_default_values": ["shift"]}
    record = {"_class_name": "EPDScheduler", **values}
    return _dumped(record), [solver.sigmas.tolist(), solver.table.positions.tolist(), values["replaced"]]


def _scheduler_seen(scheduler: EPDScheduler) -> Any:
    found = scheduler.solver
    return [found.sigmas.tolist(), found.table.positions.tolist(), scheduler.config["replaced"]]


def _pickle(numbers: list[int]) -> tuple[bytes, Any]:
    raw = {"r_params": [n / 100 - 5 for n in numbers[:2]], "weight_s": [n / 500 for n in numbers[2:]]}
    facts = {"num_steps": 2, "num_points": 2, "guidance_rate": 7.5, "schedule_type": "discrete", "schedule_rho": 1.0}
    parts = [_text(key) + _plain(value) for key, value in facts.items()]
    parts += [_text(key) + _parameter(values) for key, values in raw.items()]
    state = _text("class_name") + _text("EPD_predictor") + _text("state") + b"}(" + b"".join(parts) + b"u"
    positions = torch.tensor([raw["r_params"]], dtype=torch.float64).sigmoid().sort().values
    start = b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}("
    return start + state + b"u\x85R.", positions.tolist()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _plain(value: object) -> bytes:
    if isinstance(value, str):
        return _text(value)
    return b"K%c" % value if isinstance(value, int) else b"G" + struct.pack(">d", value)


def _parameter(values: list[float]) -> bytes:
    """A pickled parameter [1, K], as the reference's files hold it."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch wishes that nobody used typed storages
        storage = torch.tensor(values, dtype=torch.float64).storage()
        torch.save(storage, stream, _use_new_zipfile_serialization=False)
    data, count = stream.getvalue(), len(values)
    loaded = b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(data)) + data + b"\x85R"
    shape = b"K\x00K\x01K%c\x86K%cK\x01\x86\x89NtR" % (count, count)
    return b"ctorch._utils\n_rebuild_parameter\n(ctorch._utils\n_rebuild_tensor_v2\n(" + loaded + shape + b"\x89NtR"


# -- runs and models --------------------------------------------------------------------------------------------------


def _splits(numbers: list[int]) -> tuple[bytes, Any]:
    texts = [f"a red circle {n} é" for n in numbers]
    rows = {text: {"level": n, "sign": [str(n), None]} for text, n in zip(texts, numbers, strict=True)}
    value = {"train": texts[:2], "validation": texts[2:3], "test": texts[3:], "rows": rows}
    return _dumped(value), value


def _origin(numbers: list[int]) -> tuple[bytes, Any]:
    accepted = (Accepted(numbers[1], "rdpo.lr", 0.1, numbers[2] / 8),)
    origin = Origin({"seed": numbers[0], "rdpo.lr": numbers[2] / 8, "backbone.name": None}, accepted)
    return origin.text().encode(), origin.text()


def _metrics(numbers: list[int]) -> tuple[bytes, Any]:
    rows = [{"iteration": i, "reward/clip": n / 8, "images": n} for i, n in enumerate(numbers)]
    return b"".join(_dumped(row) + b"\n" for row in rows), rows


def _are_metrics(rows: Any, path: Path) -> bool:
    return all(isinstance(row["iteration"], int) and all(abs(v) < float("inf") for v in row.values()) for row in rows)


def _made_by(numbers: list[int]) -> tuple[bytes, Any]:
    machine: dict[str, Any] = {"cores": 2, "cpu": "x", "gpus": [], "versions": {"python": "3"}}
    record = Provenance(tuple(f"epd-ray bench {n}" for n in numbers), machine).record()
    return _dumped(record), record


def _tracking(numbers: list[int]) -> tuple[bytes, Any]:
    value = {"wandb": f"run{numbers[0]}", "mlflow": f"{numbers[1]:032x}"}
    return _dumped(value), value


def _evaluation(numbers: list[int]) -> tuple[bytes, Any]:
    mean = {"mean": numbers[0] / 8, "low": 0.0, "high": 1.0}
    solver = {"key": "euler", "label": "Euler", "kind": "euler", "intervals": 4, "parallel_nfe": 4, "model_evals": 4}
    record = {"split": "test", "prompts": 4, "metrics": ["clip"], "solvers": [{**solver, "metrics": {"clip": mean}}]}
    return _dumped(record), Evaluation.model_validate(record).model_dump_json()


def _index(numbers: list[int]) -> tuple[bytes, Any]:
    value = {"_class_name": f"Pipeline{numbers[0]}", "vae": ["diffusers", "AutoencoderKL"], "unet": [None, None]}
    return _dumped(value), (value["_class_name"], {"vae": True, "unet": False})


def _read_model(path: Path) -> Any:
    found = read_index(str(path.parent), None)
    return found.class_name, found.components


def _sizes(numbers: list[int]) -> tuple[bytes, Any]:
    value = dict.fromkeys(TextSizes.model_fields, numbers[0] + 1) | {"layer_norm_eps": 1e-5, "hidden_act": "gelu"}
    return _dumped(value | {"architectures": ["BertModel"]}), value


# -- side-by-side comparisons -----------------------------------------------------------------------------------------

PAGE_KEY = Key(
    page="0f" * 8, left="ours", right="euler", seed=3,
    pairs=tuple(Pair(id=f"p{i}", picture=f"{i}.png", prompt="a red circle", swapped=bool(i % 2)) for i in range(4)),
)  # fmt: skip


def votes_of(numbers: list[int]) -> dict[str, Any]:
    """Votes on the page of PAGE_KEY."""
    choices = ("left", "right", "tie")
    votes = [{"pair": f"p{i}", "choice": choices[n % 3], "seconds": n / 8} for i, n in enumerate(numbers)]
    return {"page": PAGE_KEY.page, "saved": "2026-01-01T00:00:00Z", "votes": votes}


def _votes(numbers: list[int]) -> tuple[bytes, Any]:
    value = votes_of(numbers)
    return _dumped(value), value


def _are_votes(found: Any, path: Path) -> bool:
    pairs = [vote.pair for vote in found.votes]
    return len(set(pairs)) == len(pairs) and set(pairs) <= {pair.id for pair in PAGE_KEY.pairs}


def _key(numbers: list[int]) -> tuple[bytes, Any]:
    value = PAGE_KEY.model_copy(update={"seed": numbers[0]})
    return value.model_dump_json().encode(), value.model_dump(mode="json")


def _record_seen(record: Any) -> Any:
    return record.model_dump(mode="json")


def _writes_record(name: str) -> Callable[[Any, Path], None]:
    return writes(name, lambda found: found.model_dump_json().encode())


DOCUMENTS = {
    "configuration": Importer(
        _config, load_config, "run.yaml", _config_seen, writes("run.yaml", lambda found: to_yaml(found).encode())
    ),
    "override": Importer(_override, _read_override, "override", _config_seen),
    "solver.json": Importer(
        _solver, Solver.from_pretrained, "solver.json", _solver_seen,
        lambda found, folder: found.save_pretrained(folder), lambda found, _: _is_solver(found),
    ),
    SCHEDULER_FILE: Importer(
        _scheduler, lambda path: EPDScheduler.from_pretrained(path.parent), SCHEDULER_FILE, _scheduler_seen,
        lambda found, folder: found.save_pretrained(folder),
        lambda found, _: _is_solver(found.solver) and bool(found.timesteps.isfinite().all()),
    ),
    "reference table": Importer(
        _pickle, read_reference, "a.pkl", lambda found: found.table.positions.tolist(),
        holds=lambda found, _: _is_table(found.table),
    ),
    INDEX: Importer(_index, _read_model, INDEX),
    "med_config.json": Importer(
        _sizes, lambda path: read_sizes(path, "m"), "med_config.json", _record_seen, _writes_record("med_config.json")
    ),
    "prompts.json": Importer(
        _splits, read_splits, "prompts.json", lambda found: dict(vars(found)),
        writes("prompts.json", lambda found: _dumped(vars(found))),
    ),
    "origin.json": Importer(
        _origin, lambda path: read_origin(RunDirectory(path.parent)), "origin.json", lambda found: found.text(),
        writes("origin.json", lambda found: found.text().encode()),
    ),
    "tracking.json": Importer(
        _tracking, lambda path: known_runs(RunDirectory(path.parent)), TRACKING, write=writes(TRACKING, _dumped)
    ),
    "metrics.jsonl": Importer(
        _metrics, read_metrics, "metrics.jsonl",
        write=writes("metrics.jsonl", lambda rows: b"".join(_dumped(row) + b"\n" for row in rows)), holds=_are_metrics,
    ),
    MADE_BY: Importer(
        _made_by, lambda path: signed_by(path.parent), MADE_BY, lambda found: found.where and found.record(),
        writes(MADE_BY, lambda found: _dumped(found.record())),
    ),
    "evaluation.json": Importer(
        _evaluation, read_evaluation, "evaluation.json", lambda found: found.model_dump_json(),
        _writes_record("evaluation.json"),
    ),
    "votes": Importer(
        _votes, lambda path: read_votes(path, PAGE_KEY), RESULTS, _record_seen, _writes_record(RESULTS), _are_votes
    ),
    "key.json": Importer(_key, lambda path: read_key(path.parent), KEY, _record_seen, _writes_record(KEY)),
}  # fmt: skip
