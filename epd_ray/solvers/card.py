"""The model card of a solver: what the solver was made for, what it costs, and how to use it."""

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor

from epd_ray.solvers.costs import Cost
from epd_ray.solvers.table import SolverTable
from epd_ray.solvers.wording import columns_as_text

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SHOWN = (
    "rewards_before",
    "rewards_after",
    "scheduler",
    "prompted",
)  # entries of meta that the card does not list: they have tables of their own, or a file


def model_card(
    table: SolverTable, sigmas: Tensor, cost: Cost, meta: Mapping[str, JsonValue], source: str, *, has_scheduler: bool
) -> str:
    """README.md for a solver's directory.

    Args:
        table: [N, K].
        sigmas: [N+1], decreasing, > 0.
        cost: the evaluations that a picture takes.
        meta: what the solver was made for and from.
        source: where people load the solver from: a hub id, or a directory.
        has_scheduler: whether the configuration of an EPDScheduler lies beside the solver.

    Returns:
        Markdown with the hub's front matter.
    """
    base = _base_model(meta)
    prompted = takes_prompts(meta)
    about = "".join(f"| {key} | {_code(value)} |\n" for key, value in meta.items() if key not in _SHOWN)
    spans = pairwise(sigmas.tolist())
    columns = columns_as_text(table, ", ")
    rows = zip(spans, *columns.values(), strict=True)
    steps = "".join(f"| {a:.5g} to {b:.5g} | {' | '.join(row)} |\n" for (a, b), *row in rows)
    return _CARD.format(
        task="text-to-image" if prompted else "unconditional-image-generation",
        tags="diffusers, " if has_scheduler else "",
        base_line=f"base_model: {base}\n" if base else "",
        intervals=table.intervals,
        points="one point" if table.points == 1 else f"{table.points} parallel points",
        parallel_nfe=cost.parallel_nfe,
        model_evals=cost.model_evals,
        passes=_passes(cost, meta),
        pipeline=_pipeline(table, meta, source, base) if has_scheduler else "",
        source=source,
        about=about,
        rewards=_rewards(meta.get("rewards_before"), meta.get("rewards_after")),
        heads=" | ".join(name.capitalize() for name in columns),
        rules="---|" * len(columns),
        steps=steps,
    )


def _passes(cost: Cost, meta: Mapping[str, JsonValue]) -> str:
    """How many network passes an image takes, as far as meta says what the model's guidance is."""
    passes = cost.passes_by(meta)
    if passes is None and takes_prompts(meta):
        return f"{cost.model_evals} network passes, or {2 * cost.model_evals} with classifier-free guidance"
    return f"{cost.model_evals if passes is None else passes} network passes"


def takes_prompts(meta: Mapping[str, JsonValue]) -> bool:
    """Whether the model that a solver was made for takes prompts; true unless meta says `"prompted": false`."""
    return meta.get("prompted") is not False


def local_model(meta: Mapping[str, JsonValue]) -> str | None:
    """The model that a solver was made for, if meta names it by a path on this machine; None for a hub id."""
    model = meta.get("model_id")
    if not isinstance(model, str):
        return None
    path = Path(model)
    return model if path.is_absolute() or model.startswith(("~", ".")) or path.is_dir() else None


def _base_model(meta: Mapping[str, JsonValue]) -> str | None:
    """The hub id of the model that a solver was made for, or None. A run on a directory stores the revision null."""
    model = meta.get("model_id")
    if not isinstance(model, str) or local_model(meta) or meta.get("revision", "") is None:
        return None
    return model if HUB_ID.fullmatch(model) else None


def _pipeline(table: SolverTable, meta: Mapping[str, JsonValue], source: str, base: str | None) -> str:
    guidance = meta.get("guidance_scale")
    scale = f", guidance_scale={guidance:g}" if isinstance(guidance, (int, float)) else ""
    name, line, how = _GUIDE if table.guides else _SCHEDULER
    return _PIPELINE.format(
        how=how,
        name=name,
        line=line.format(source=source),
        base=base or "path/to/the/pipeline",
        source=source,
        scale=scale,
        n=table.intervals,
    )


def _rewards(before: JsonValue, after: JsonValue) -> str:
    """A Markdown table of mean rewards by reward head; an empty string where none was measured."""
    if not isinstance(after, dict):
        return ""
    start = before if isinstance(before, dict) else {}
    rows = "".join(f"| {head} | {_mean(start.get(head))} | {_mean(value)} |\n" for head, value in after.items())
    return f"\n| Mean reward | Before | After |\n|---|---|---|\n{rows}" if rows else ""


def _mean(value: JsonValue) -> str:
    return f"{value:.5g}" if isinstance(value, (int, float)) else "-"


def _code(value: JsonValue) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")


_SCHEDULER = (
    "EPDScheduler",
    'pipe.scheduler = EPDScheduler.from_pretrained("{source}", like=pipe.scheduler)',
    "as its scheduler",
)
_GUIDE = (
    "guide",
    'pipe = guide(pipe, "{source}")',
    "with hooks around its network, because this solver sets the guidance of each interval",
)
"""The name that is imported, the line that puts the solver into a pipeline, and what that does."""

_PIPELINE = """\
In a diffusers pipeline, {how}:

```python
from diffusers import DiffusionPipeline
from epd_ray import {name}

pipe = DiffusionPipeline.from_pretrained("{base}")
{line}
image = pipe("a red circle", num_inference_steps={n}{scale}).images[0]
```

With the points of an interval in one batch, or each on a device of its own, which takes less time per picture:

```python
from epd_ray import parallelize

pipe = parallelize(pipe, "{source}")  # devices=["cuda:0", "cuda:1"]
```

"""

_CARD = """\
---
library_name: epd-ray
pipeline_tag: {task}
tags: [{tags}diffusion, ode-solver, epd-solver]
{base_line}---
# A learned diffusion solver

{intervals} intervals with {points} each: parallel NFE {parallel_nfe} (calls that wait for each other),
{model_evals} evaluations per image in all, {passes}.

{pipeline}On any drift of one's own:

```python
from epd_ray import Solver

solver = Solver.from_pretrained("{source}")
x = solver.solve(drift, x)  # drift(x [B, ...], sigma [B]) -> dx/dsigma; x: the state at solver.sigmas[0]
```

| Made with | |
|---|---|
{about}{rewards}
| Interval (sigma) | {heads} |
|---|{rules}
{steps}
Method: EPD-Solver (arXiv 2507.14797) and RDPO (arXiv 2512.22796).
"""
