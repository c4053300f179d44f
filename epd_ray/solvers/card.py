"""The model card beside a solver file: what it was made for, what it costs, and how to use it."""

import json
import re
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import JsonValue

if TYPE_CHECKING:
    from epd_ray.solvers.solver import Solver

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_SHOWN = ("rewards_before", "rewards_after", "scheduler")  # in tables of their own, or in the scheduler's file


def model_card(solver: "Solver", source: str, *, has_scheduler: bool) -> str:
    """README.md for a solver's directory.

    Args:
        solver: to describe.
        source: where people load it from: a hub id, or a directory.
        has_scheduler: whether a scheduler's configuration lies beside it.

    Returns:
        Markdown with the hub's front matter.
    """
    meta = solver.meta
    base = meta.get("model_id")
    base = base if isinstance(base, str) and HUB_ID.fullmatch(base) else None
    about = "".join(f"| {key} | {_code(value)} |\n" for key, value in meta.items() if key not in _SHOWN)
    spans = pairwise(solver.sigmas.tolist())
    rows = zip(spans, solver.table.positions.tolist(), solver.table.weights.tolist(), strict=True)
    steps = "".join(f"| {a:.5g} to {b:.5g} | {_decimals(r)} | {_decimals(w)} |\n" for (a, b), r, w in rows)
    return _CARD.format(
        tags="diffusers, " if has_scheduler else "",
        base_line=f"base_model: {base}\n" if base else "",
        intervals=solver.table.intervals,
        points=solver.table.points,
        parallel_nfe=solver.parallel_nfe,
        model_evals=solver.model_evals,
        pipeline=_pipeline(solver, source, base) if has_scheduler else "",
        source=source,
        about=about,
        rewards=_rewards(meta.get("rewards_before"), meta.get("rewards_after")),
        steps=steps,
    )


def _pipeline(solver: "Solver", source: str, base: str | None) -> str:
    guidance = solver.meta.get("guidance_scale")
    scale = f", guidance_scale={guidance:g}" if isinstance(guidance, (int, float)) else ""
    return _PIPELINE.format(base=base or "path/to/the/pipeline", source=source, scale=scale, n=solver.table.intervals)


def _rewards(before: JsonValue, after: JsonValue) -> str:
    """A table of mean rewards by head, empty where nothing was measured."""
    if not isinstance(after, dict):
        return ""
    start = before if isinstance(before, dict) else {}
    rows = "".join(f"| {head} | {_mean(start.get(head))} | {_mean(value)} |\n" for head, value in after.items())
    return f"\n| Mean reward | Before | After |\n|---|---|---|\n{rows}" if rows else ""


def _mean(value: JsonValue) -> str:
    return f"{value:.5g}" if isinstance(value, (int, float)) else "-"


def _code(value: JsonValue) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")


def _decimals(values: list[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


_PIPELINE = """\
In a diffusers pipeline, as its scheduler:

```python
from diffusers import DiffusionPipeline
from epd_ray import EPDScheduler

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.scheduler = EPDScheduler.from_pretrained("{source}")
image = pipe("a red circle", num_inference_steps={n}{scale}).images[0]
```

With the points of an interval in one batch, or each on a device of its own, which takes less time per picture:

```python
from epd_ray import Solver, parallelize

pipe = parallelize(pipe, Solver.from_pretrained("{source}"))  # devices=["cuda:0", "cuda:1"]
```

"""

_CARD = """\
---
library_name: epd-ray
pipeline_tag: text-to-image
tags: [{tags}diffusion, ode-solver, epd-solver]
{base_line}---
# A learned diffusion solver

{intervals} intervals with {points} parallel points each: parallel NFE {parallel_nfe} (calls that wait for each other),
{model_evals} evaluations per image in all (twice as many network passes under classifier-free guidance).

{pipeline}On any drift of one's own:

```python
from epd_ray import Solver

solver = Solver.from_pretrained("{source}")
x = solver.solve(drift, x)  # drift(x [B, ...], sigma [B]) -> dx/dsigma; x: the state at solver.sigmas[0]
```

| Made with | |
|---|---|
{about}{rewards}
| Interval (sigma) | Positions | Weights |
|---|---|---|
{steps}
Method: EPD-Solver (arXiv 2507.14797) and RDPO (arXiv 2512.22796).
"""
