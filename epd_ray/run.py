"""A whole run: distil, fine-tune, compare, report. What the command line and the jobs call."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image

from epd_ray.backbones import BACKBONES
from epd_ray.checkpoint import load_newest
from epd_ray.config import RunConfig, load_config, to_yaml
from epd_ray.errors import RunDirectoryError, TableError
from epd_ray.evaluate import rivals
from epd_ray.progress import Observer
from epd_ray.prompts import PromptSplits, load_prompts
from epd_ray.report import write_report
from epd_ray.sampling import learned, noises, to_uint8
from epd_ray.session import algorithm
from epd_ray.solvers import Solver, SolverTable
from epd_ray.store import RunDirectory, read_prompts
from epd_ray.trainer import Trainer, comparison, noise_seeds

SECONDS_PER_PASS = 0.005  # the embedded model on one core, for the estimate before a run
SECONDS_TO_START = 30.0


def describe(config: RunConfig) -> tuple[str, str]:
    """What a run will do and about how long it takes, in two lines."""
    s, r, e = config.solver, config.rdpo, config.evaluation
    images = r.iterations * r.prompts_per_iteration * r.group_size
    evals = s.intervals * (1 + s.points)
    validations = 1 + r.iterations // e.every
    compared = evals * 2 + (2 * s.intervals + evals * e.equal_evals) * len(e.baselines)
    distilled = config.distill.prompts * s.intervals * (2 * config.distill.teacher_steps + config.distill.grid + 1)
    drifts = images * evals + validations * config.prompts.validation * evals + config.prompts.test * compared
    drifts += distilled if config.distill.enabled and config.distill.table is None else 0
    passes = drifts * (2 if config.backbone.guidance_scale > 1 else 1)
    what = (
        f"Fine-tune {s.intervals} intervals x {s.points} points (parallel NFE {2 * s.intervals - s.afs}) on "
        f"{config.backbone.model} against {', '.join(config.rewards)}: {r.iterations} iterations, {images} images."
    )
    minutes = (SECONDS_TO_START + passes * SECONDS_PER_PASS / max(1, config.cluster.rollout_actors)) / 60
    duration = (
        f"about {minutes:.0f} minutes with {config.cluster.rollout_actors} rollout actors on CPU cores"
        if config.backbone.model == "shapes"
        else "the first iteration will tell how long it takes"
    )
    return what, f"{passes:,} network passes in all, {duration}."


def train(config: RunConfig, out: Path, observer: Observer) -> list[str]:
    """Run all of it into a new directory.

    Args:
        config: of the run.
        out: a directory that does not exist yet, or an empty one.
        observer: sees the progress.

    Returns:
        The results in a few lines.

    Raises:
        EpdRayError: something that the user can mend; what was written so far stays readable.
        KeyboardInterrupt: stopped by a signal, after a checkpoint.
    """
    prompts = load_prompts(config.prompts, config.seed)
    start_table = _given_table(config)
    run = RunDirectory.create(out, to_yaml(config))
    return _go_on(config, run, prompts, start_table, None, observer)


def resume(run_path: Path, observer: Observer) -> list[str]:
    """Continue a run from its newest checkpoint; the same arguments as `train` otherwise."""
    run = RunDirectory.open(run_path)
    config = load_config(run.config)
    return _go_on(
        config,
        run,
        load_prompts(config.prompts, config.seed),
        _given_table(config),
        load_newest(run.checkpoints),
        observer,
    )


def _given_table(config: RunConfig) -> SolverTable | None:
    if config.distill.table is None:
        return None
    solver = Solver.from_pretrained(config.distill.table)
    table, made_for = solver.table, solver.meta.get("backbone", config.backbone.family)
    if made_for != config.backbone.family:
        raise TableError(
            f"{config.distill.table} is for the backbone family {made_for}, the run uses {config.backbone.family}: "
            "take a solver of the same family"
        )
    wanted = (config.solver.intervals, config.solver.points)
    if (table.intervals, table.points) != wanted:
        raise TableError(
            f"{config.distill.table} has {table.intervals} intervals of {table.points} points, the run {wanted[0]} of "
            f"{wanted[1]}: set solver.intervals and solver.points to match"
        )
    return table


def _go_on(
    config: RunConfig,
    run: RunDirectory,
    prompts: PromptSplits,
    start_table: SolverTable | None,
    checkpoint: dict[str, Any] | None,
    observer: Observer,
) -> list[str]:
    observer.stage("starting actors", 1)
    with ExitStack() as stack:
        stack.enter_context(_stop_signals())
        algo = stack.enter_context(algorithm(config, prompts.train, start_table))
        observer.advance()
        trainer = Trainer(config, run, prompts, algo, observer)
        if checkpoint is None:
            trainer.begin(start_table)
        else:
            trainer.restore(checkpoint)
        trainer.fine_tune()
        lines = trainer.compare_all()
    write_report(run.path)
    observer.done()
    return lines


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM (a stopped job) ends a run as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def evaluate(run_path: Path, count: int | None, prompts_file: Path | None, split: str, observer: Observer) -> list[str]:
    """Compare a run's solver with the baselines again, on other or more prompts; rewrites its evaluation and report.

    Args:
        run_path: a run with a solver.
        count: number of prompts; the run's own when None.
        prompts_file: one prompt a line, instead of the split.
        split: "validation" or "test".
        observer: sees the progress.
    """
    run = RunDirectory.open(run_path)
    config = load_config(run.config)
    if not (run.solver / "solver.json").exists():
        raise RunDirectoryError(f"{run_path} has no solver yet: continue it with epd-ray train --resume {run_path}")
    if count is not None:
        config = config.model_copy(update={"prompts": config.prompts.model_copy(update={split: count})})
    prompts = (
        read_prompts(prompts_file)[:count]
        if prompts_file
        else getattr(load_prompts(config.prompts, config.seed), split)
    )
    ours = learned(Solver.from_pretrained(run.solver), "rdpo", "EPD + RDPO")
    start = learned(Solver.from_pretrained(run.distilled), "distilled", "EPD distilled")
    samplers = [ours, start, *rivals(config.evaluation.baselines, ours, config.evaluation.equal_evals)]
    local = config.model_copy(update={"cluster": config.cluster.model_copy(update={"learner_actors": 0})})
    observer.stage("starting actors", 1)
    with algorithm(local, prompts, start.table) as algo:
        observer.advance()
        where = str(prompts_file.name) if prompts_file else split
        seeds = noise_seeds(config, "test" if prompts_file else split, len(prompts))
        lines = comparison(config, run, algo, samplers, prompts, seeds, where, observer)
    write_report(run.path)
    observer.done()
    return lines


def sample(
    solver_path: str, prompts: Sequence[str], seed: int, out: Path, model: str | None, device: str, dtype: str
) -> Path:
    """Draw one picture per prompt with a saved solver, side by side into one PNG.

    Args:
        solver_path: directory or hub id.
        prompts: at least one.
        seed: of the noise; prompt i uses seed + i.
        out: a .png.
        model: the solver's own when None.
        device: as everywhere.
        dtype: of the network.
    """
    solver = Solver.from_pretrained(solver_path)
    meta = dict(solver.meta)
    if "backbone" not in meta:
        raise TableError(f"{solver_path} does not say which backbone it is for: only solvers of a run can be sampled")
    options: dict[str, Any] = dict(meta.get("options") or {})  # type: ignore[arg-type]
    if "device" in options:
        options |= {"device": device, "dtype": dtype}
    if model is not None:
        options["model"] = model
    backbone = BACKBONES.build(str(meta["backbone"]), options)
    conditioning = backbone.encode(list(prompts), float(meta["guidance_scale"]))  # type: ignore[arg-type]
    noise = noises(backbone, [seed + i for i in range(len(prompts))])
    latents = learned(solver, "sample", "sample").run(backbone, conditioning, noise)
    images = to_uint8(backbone.decode(latents)).permute(0, 2, 3, 1).numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(list(images), axis=1)).save(out)
    return out
