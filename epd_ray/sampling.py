"""Samplers by name: what a picture is drawn with, and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from epd_ray.solvers import Solver, SolverTable, dpm2, epd, euler, heun, ipndm
from epd_ray.types import Backbone, Conditioning, Drift

Kind = Literal["euler", "heun", "dpm2", "ipndm", "epd"]
ENDS_AT_ZERO = {"euler", "ipndm"}  # one evaluation an interval, so the last sigma may be 0, as in the pipelines
LABELS = {"euler": "DDIM / Euler", "heun": "Heun", "dpm2": "DPM-Solver-2", "ipndm": "iPNDM", "epd": "EPD"}


@dataclass(frozen=True)
class Sampler:
    """A solver with its number of intervals; "epd" carries its table.

    Attributes:
        kind: which method.
        intervals: N, at least 1.
        key: unique in a comparison, safe as a file name.
        label: for people.
        table: [N, K] or [B, N, K] for "epd", else None.
        afs: analytical first step ("epd" alone).
        order: of the multistep slope ("epd": 1 to 4).
        sigmas: [N+1], where a saved solver brings its own; else the backbone's.
    """

    kind: Kind
    intervals: int
    key: str
    label: str
    table: SolverTable | None = None
    afs: bool = False
    order: int = 1
    sigmas: tuple[float, ...] | None = None

    @property
    def parallel_nfe(self) -> int:
        """Sequential depth."""
        return self.intervals * (1 if self.kind in ENDS_AT_ZERO else 2) - int(self.afs)

    @property
    def model_evals(self) -> int:
        """All evaluations of the drift (guidance doubles the network's share of each)."""
        return self.parallel_nfe if self.table is None else self.intervals * (1 + self.table.points) - int(self.afs)

    def with_table(self, table: SolverTable) -> "Sampler":
        """The same sampler with another table."""
        return replace(self, table=table)

    def run(
        self, backbone: Backbone, conditioning: Conditioning, noise: Tensor, starts: "Alike | None" = None
    ) -> Tensor:
        """From unit noise [B, ...] to latents [B, ...]; "epd" evaluates the start of rows that begin alike once."""
        drift = conditioned_drift(backbone, conditioning)
        if self.sigmas is not None:
            sigmas = torch.tensor(self.sigmas, dtype=torch.float64)
        else:
            sigmas = backbone.sigmas(self.intervals, final_zero=self.kind in ENDS_AT_ZERO)
        x = backbone.initial(noise)
        if self.table is not None:
            if starts is not None and not self.afs:
                drift = starts.begin(backbone, drift)
            return epd(drift, x, sigmas, self.table, afs=self.afs, order=self.order, form=backbone.form)
        solve = {"euler": euler, "heun": heun, "dpm2": dpm2, "ipndm": ipndm}[self.kind]
        return solve(drift, x, sigmas)


def baseline(kind: Kind, parallel_nfe: int) -> Sampler:
    """A named method at a given sequential depth.

    Raises:
        ValueError: an odd depth for a method with two evaluations an interval.
    """
    per_interval = 1 if kind in ENDS_AT_ZERO else 2
    if parallel_nfe % per_interval:
        raise ValueError(f"{kind} has 2 evaluations an interval, parallel NFE {parallel_nfe} is odd")
    return Sampler(kind, parallel_nfe // per_interval, key=f"{kind}-{parallel_nfe}", label=LABELS[kind])


def learned(solver: Solver, key: str, label: str) -> Sampler:
    """A sampler around a saved solver."""
    sigmas = tuple(solver.sigmas.tolist())
    return Sampler("epd", solver.table.intervals, key, label, solver.table, solver.afs, solver.order, sigmas)


def conditioned_drift(backbone: Backbone, conditioning: Conditioning) -> Drift:
    """The backbone's drift for fixed prompts; K points a sample come as B*K rows."""
    repeated: dict[int, Conditioning] = {1: conditioning}

    def drift(x: Tensor, sigma: Tensor) -> Tensor:
        copies = len(x) // len(conditioning)
        if copies not in repeated:
            repeated[copies] = conditioning.repeat(copies)
        return backbone.drift(x, sigma, repeated[copies])

    return drift


@dataclass(frozen=True)
class Alike:
    """The D < B distinct beginnings in a batch: rows of the same prompt and noise have the same first drift.

    Attributes:
        conditioning: of the D prompts.
        rows: [D], of the batch, the first of each.
        kinds: [B], which of the D each row is.
    """

    conditioning: Conditioning
    rows: tuple[int, ...]
    kinds: tuple[int, ...]

    def begin(self, backbone: Backbone, drift: Drift) -> Drift:
        """The same drift, for a solver whose first call is at the start: that one evaluates D rows."""
        begun = False

        def shared(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal begun
            if begun:
                return drift(x, sigma)
            begun = True
            rows = list(self.rows)
            return backbone.drift(x[rows], sigma[rows], self.conditioning)[list(self.kinds)]

        return shared


def alike(
    backbone: Backbone, prompts: Sequence[str], noise_seeds: Sequence[int], guidance_scale: float
) -> Alike | None:
    """Which rows of a batch begin alike; None where no two of them do."""
    beginnings = list(zip(prompts, noise_seeds, strict=True))
    distinct = list(dict.fromkeys(beginnings))
    if len(distinct) == len(beginnings):
        return None
    conditioning = backbone.encode([prompt for prompt, _ in distinct], guidance_scale)
    rows, kinds = map(beginnings.index, distinct), map(distinct.index, beginnings)
    return Alike(conditioning, tuple(rows), tuple(kinds))


def to_uint8(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> uint8, rounded."""
    return (images * 255).round().to(torch.uint8)


def noises(backbone: Backbone, seeds: Sequence[int]) -> Tensor:
    """Unit noise [B, ...], each row from its own seed."""
    return torch.stack([backbone.noise(seed) for seed in seeds])
