"""A solver in the files of other tools: plain noise levels, diffusers, JSON, NumPy, and a node for ComfyUI."""

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue

from epd_ray.deploy.formats import ENDINGS, ExportFormat
from epd_ray.errors import TableError
from epd_ray.solvers import Solver
from epd_ray.solvers.card import local_model, takes_prompts
from epd_ray.solvers.table import INTERVAL_NAMES
from epd_ray.storage.run_directory import whole
from epd_ray.types import Form

FLOW_CHANGES = {
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
"""What keeps FlowMatchEulerDiscreteScheduler from shifting the levels that it is given once more."""
VE_CHANGES = {"timestep_spacing": "trailing"}
"""What makes EulerDiscreteScheduler begin with noise times the first level, and not with a little more."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: the file.
        lost: what the format has no place for, in one line; None where it holds the whole solver.
    """

    path: Path
    lost: str | None


def export(solver: Solver, name: str, form: ExportFormat, out: Path | None = None) -> Exported:
    """Write a solver for another tool. The file appears whole or not at all, and never in the place of another.

    Args:
        solver: the solver.
        name: what people call it, such as "flux-rl".
        form: the format.
        out: the file; None means one in the current directory that is named after the solver.

    Raises:
        TableError: the format cannot hold the solver, the file exists, or its folder does not.
        RunDirectoryError: the file cannot be written.
    """
    path = Path(f"{_identifier(name)}{ENDINGS[form]}") if out is None else out
    if path.exists():
        raise TableError(f"{path} exists (choose another --out)")
    if not path.parent.is_dir():
        raise TableError(f"{path.parent} is no folder (make it, or choose another --out)")
    data = _WRITERS[form](solver, name, path)
    with whole(path) as partial:
        partial.write_bytes(data)
    return Exported(path, _lost(solver) if form in ("sigmas", "diffusers") else None)


def fields(solver: Solver) -> dict[str, JsonValue]:
    """A solver as plain values: those of the file in JSON.

    Returns:
        `sigmas` [N+1]; `positions`, `weights`, `scale_dir` and `scale_time`, each [N, K], the scales 1 where the table
        has none; `history` [N, H], `guidance` [N] and `reuse` [N], each None where the table has none; `form`, "ve" or
        "flow", None where it is unknown; `afs`, whether the first drift is analytical; `order` of the multistep slope;
        `start_point`, whether the first point of each interval is its start; `parallel_nfe` and `model_evals`, the
        evaluations in a row and in all; `meta`, what the solver was made for and how.
    """
    table = solver.table
    ones = torch.ones_like(table.positions)
    scales = (ones if scale is None else scale for scale in (table.scale_dir, table.scale_time))
    found = dict(zip(("scale_dir", "scale_time"), (scale.tolist() for scale in scales), strict=True))
    parts = {"history": table.history, "guidance": table.guidance, "reuse": table.reuse if table.reused else None}
    return {
        "sigmas": solver.sigmas.tolist(),
        "positions": table.positions.tolist(),
        "weights": table.weights.tolist(),
        **found,
        **{part: None if values is None else values.tolist() for part, values in parts.items()},
        "form": solver.form,
        "afs": solver.afs,
        "order": solver.order,
        "start_point": table.start_point,
        "parallel_nfe": solver.parallel_nfe,
        "model_evals": solver.model_evals,
        "meta": dict(solver.meta),
    }


def _lost(solver: Solver) -> str | None:
    table = solver.table
    euler = table.points == 1 and table.start_point
    parts = [] if euler else [f"the {table.points} points of each interval and their weights"]
    parts += ["direction scales"] if table.scale_dir is not None else []
    parts += ["time scales"] if table.scale_time is not None else []
    parts += [INTERVAL_NAMES[part] for part in ("history", "guidance") if getattr(table, part) is not None]
    parts += ["reused guidance"] if table.reused else []
    parts += ["the multistep slope"] if solver.order > 1 and not euler else []
    parts += ["the analytical first step"] if solver.afs else []
    if not parts:
        return None
    return f"noise levels alone: left out {', '.join(parts)} (another solver on these levels draws other pictures)"


def _sigmas(solver: Solver, name: str, path: Path) -> bytes:
    # In decimals without an exponent, which ManualSigmas cannot read; split at ", ", as CustomSigmas of KJNodes does.
    levels = solver.sigmas.float().numpy()
    return ", ".join(np.format_float_positional(level, trim="0") for level in levels).encode() + b"\n"


def _json(solver: Solver, name: str, path: Path) -> bytes:
    rows = (f"  {json.dumps(key)}: {_written(value)}" for key, value in fields(solver).items())
    return ("{\n" + ",\n".join(rows) + "\n}\n").encode()


def _written(value: JsonValue) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise TableError(f"meta cannot be written as JSON: {error}") from error


def _numpy(solver: Solver, name: str, path: Path) -> bytes:
    found = {key: value for key, value in fields(solver).items() if value is not None}
    found["meta"] = _written(found["meta"])
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {key: np.asarray(value) for key, value in found.items()}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _diffusers(solver: Solver, name: str, path: Path) -> bytes:
    form = _form(solver, "diffusers")
    if not takes_prompts(solver.meta):
        raise TableError("the solver is for a model without prompts, whose pipeline takes no sigmas (use --to json)")
    flow = form == "flow"
    count = solver.table.intervals
    scale = solver.meta.get("guidance_scale")
    known = isinstance(scale, int | float)
    changes = FLOW_CHANGES if flow else VE_CHANGES
    last = (
        f"The scheduler makes {count + 1} steps: it adds a 0 to the end of the {count + 1} levels."
        if flow
        else f"The scheduler makes {count} steps, to the last of the {count + 1} levels."
    )
    marks = {
        "TITLE": _title(name),
        "MADE_FOR": _made_for(solver),
        "MODULE": _identifier(path.stem),
        "SCALE": f", guidance_scale={scale}" if known else "",
        "STEPS": last,
        "SCHEDULER": "FlowMatchEulerDiscreteScheduler" if flow else "EulerDiscreteScheduler",
        "SIGMAS": repr(solver.sigmas.tolist()),
        "CHANGES": "\n".join(f"        {key}={value!r}," for key, value in changes.items()),
    }
    return _filled("diffusers_sigmas.py.txt", marks)


def _comfyui(solver: Solver, name: str, path: Path) -> bytes:
    form = _form(solver, "comfyui")
    if solver.table.guides and solver.meta.get("classifier_free") is not True:
        raise TableError(
            "the table sets guidance, and its model does not say that the guidance is classifier-free: a sampler of "
            "ComfyUI cannot set any other (train without it, or use --to json)"
        )
    found = fields(solver)
    columns = ("sigmas", "positions", "weights", "scale_dir", "scale_time", "history", "guidance", "reuse")
    about = _made_for(solver)
    marks = {
        "TITLE": _title(name),
        "NAME": f"EPDSolver_{_identifier(name)}",
        "MADE_FOR": about,
        "DESCRIPTION": repr(" ".join(about.split())),
        "FORM": form,
        **{column.upper(): _literal(found[column]) for column in columns},
        **{
            key: repr(found[part]) for key, part in (("AFS", "afs"), ("ORDER", "order"), ("START_POINT", "start_point"))
        },
    }
    return _filled("comfyui_node.py.txt", marks)


_WRITERS: Mapping[ExportFormat, Callable[[Solver, str, Path], bytes]] = {
    "sigmas": _sigmas,
    "diffusers": _diffusers,
    "json": _json,
    "numpy": _numpy,
    "comfyui": _comfyui,
}


def _form(solver: Solver, tool: str) -> Form:
    if solver.form is None:
        raise TableError(
            f"the solver does not say whether its model is a flow model, which {tool} has to know (write form, 've' or "
            "'flow', into its solver.json)"
        )
    return solver.form


def _made_for(solver: Solver) -> str:
    """Sentences for the docstring of a Python file, which no value of the solver can end."""
    meta, local = solver.meta, local_model(solver.meta)
    model = meta.get("model_id") if local is None else Path(local).name
    facts = [f"the model {model}"] if model is not None else []
    facts += [f"{meta['resolution']} pixels a side"] if "resolution" in meta else []
    facts += [f"guidance scale {meta['guidance_scale']}"] if "guidance_scale" in meta else []
    said = " ".join(f"It was made for {', '.join(facts)}.".split()) + "\n" if facts else ""
    cost = f"A picture takes {solver.model_evals} evaluations, {solver.parallel_nfe} of them one after the other.\n"
    return (said + cost).replace("\\", "/").replace('"', "'")


def _title(name: str) -> str:
    return f"EPD solver {re.sub(r'[^A-Za-z0-9_./ -]+', '_', name)}"


def _literal(value: JsonValue) -> str:
    """Python code of numbers, each row on a line of its own."""
    if not isinstance(value, list) or not isinstance(value[0], list):
        return repr(value)
    return "[\n" + "".join(f"    {row},\n" for row in value) + "]"


def _identifier(name: str) -> str:
    """A name that can be a module's and a file's: letters, digits and underscores."""
    found = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "solver"
    return f"solver_{found}" if found[0].isdigit() else found


def _filled(template: str, marks: Mapping[str, str]) -> bytes:
    text = (resources.files(__package__) / "templates" / template).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda mark: marks[mark[1]], text).encode()
