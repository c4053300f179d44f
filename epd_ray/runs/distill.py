"""`epd-ray distill`: stage 1 alone. It fits a solver to a finer one and needs no reward."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from epd_ray.config.loading import resolve
from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import Sampler, learned
from epd_ray.errors import RunDirectoryError
from epd_ray.evaluation.comparison import rivals
from epd_ray.prompts.splits import load_prompts
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.session import algorithm, warn_of_long_prompts
from epd_ray.runs.stage_one import cost_of, fit_start_table, made_by
from epd_ray.solvers.rival import require_rivals
from epd_ray.solvers.zoo import require_installed
from epd_ray.stage_one.shard import as_table
from epd_ray.stage_one.teacher import refine
from epd_ray.telemetry.progress import Observer
from epd_ray.types import FloatArray, ImageArray


def distill(config: RunConfig, out: Path, observer: Observer) -> list[str]:
    """Fit a table, save it, and compare its pictures with those of the teacher on held-out prompts.

    Args:
        config: the configuration of a run. Its rewards are not used, and stage 1 runs even if it disables stage 1.
        out: a directory that is empty or does not exist yet.
        observer: sees the progress.

    Returns:
        One line per solver with the root mean square distance of its pictures to those of the teacher, in [0, 1].

    Raises:
        RunDirectoryError: `out` is not empty.
        EpdRayError: something else is wrong that the user can mend.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunDirectoryError(f"{out} is not empty: choose another --out")
    config = resolve(config.model_dump(mode="json"), ["distill.enabled=true", "distill.table=null"])
    require_installed(config.evaluation.baselines)
    prompts = load_prompts(config.prompts, config.seed)
    observer.stage("starting actors", 1)
    with algorithm(config.model_copy(update={"rewards": {}}), prompts.train) as algo:
        observer.advance()
        require_rivals(config.evaluation.baselines, algo.facts.form)
        warn_of_long_prompts(algo, [*prompts.train[: config.distill.prompts], *prompts.validation])
        fits = fit_start_table(config, prompts, algo, observer)
        residuals = [fit.residual for fit in fits]
        cost = cost_of(fits, config, prompts, algo.facts)
        about = {"stage": "distilled", "residuals": residuals, "stage_one": asdict(cost)}
        solver = made_by(config, algo.facts, as_table(fits), **about)
        solver.save_pretrained(out)
        held_out = prompts.validation
        seeds = noise_seeds(Purpose.VALIDATION, config.seed, len(held_out))
        ours = learned(solver, "distilled", "EPD distilled")
        others = rivals(config.evaluation.baselines, ours, config.evaluation.equal_evals)
        schedule = torch.tensor(algo.facts.sigmas, dtype=torch.float64)
        fine = tuple(refine(schedule, config.distill.teacher_steps).tolist())
        teacher = Sampler("dpm2", len(fine) - 1, "teacher", "teacher", sigmas=fine)
        distances = _distances(algo, teacher, [ours, *others], held_out, seeds, observer)
        lines = []
        for sampler, distance in zip([ours, *others], distances, strict=True):
            passes = sampler.cost.network_passes(algo.facts.guidance_scale, algo.facts.classifier_free)
            took = f"parallel NFE {sampler.parallel_nfe:>2}, {sampler.model_evals:>2} evaluations, {passes:>2} passes"
            lines.append(f"{sampler.label:<18} {took}  distance from the teacher's pictures {distance.mean():.4f}")
    return [*lines, str(cost), f"solver: {out}"]


def _distances(
    algo: RDPO, teacher: Sampler, samplers: list[Sampler], prompts: list[str], seeds: list[int], observer: Observer
) -> list[FloatArray]:
    """The distance of each sampler's pictures to those of the teacher, [B] per sampler (see `rms`).

    All samplers draw one part of the prompts before the next part, so that only the teacher's pictures of one part are
    in memory.
    """
    size = algo.images_at_once
    starts = range(0, len(prompts), size)
    observer.stage("comparing", len(starts) * (1 + len(samplers)))
    found = [np.empty(len(prompts), np.float32) for _ in samplers]
    for start in starts:
        part, own = prompts[start : start + size], seeds[start : start + size]
        target: dict[int, ImageArray] = {}
        algo.sample_scored(teacher, part, own, target.__setitem__)
        observer.advance()
        for sampler, distances in zip(samplers, found, strict=True):
            algo.sample_scored(sampler, part, own, partial(_measure, distances[start : start + size], target))
            observer.advance()
    return found


def _measure(distances: FloatArray, target: dict[int, ImageArray], first: int, images: ImageArray) -> None:
    distances[first : first + len(images)] = rms(images, target[first])


def rms(images: ImageArray, target: ImageArray) -> FloatArray:
    """The root mean square difference of each picture, [B], in [0, 1], where 1 is the difference of black and white.

    Args:
        images: pictures [B, 3, H, W], uint8.
        target: pictures of the same shape.
    """
    difference = (images.astype(np.float32) - target.astype(np.float32)) / 255
    return np.asarray(np.sqrt((difference**2).mean(axis=(1, 2, 3))), np.float32)
