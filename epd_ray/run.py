"""A whole run: distil, fine-tune, compare, report. What the command line and the jobs call."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from epd_ray.checkpoint import load_newest, save_checkpoint
from epd_ray.config import RunConfig, load_config, to_yaml
from epd_ray.distill import as_table
from epd_ray.errors import RunDirectoryError, TableError
from epd_ray.evaluate import Row, compare, headline, rivals, save_comparison, save_pictures
from epd_ray.progress import Observer
from epd_ray.prompts import PromptSplits, load_prompts
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.report import write_report
from epd_ray.sampling import Sampler, learned
from epd_ray.session import algorithm
from epd_ray.solvers import Solver, SolverTable
from epd_ray.statistics import bootstrap_mean
from epd_ray.store import MetricsLog, RunDirectory, read_prompts, rollout_table, write_rollouts
from epd_ray.types import ImageArray

SECONDS_PER_PASS = 0.005  # the embedded model on one core, for the estimate before a run
SECONDS_TO_START = 30.0
STREAMS = {"distill": 1, "validation": 2, "test": 3}  # noise seeds that no rollout uses


@dataclass
class Best:
    """The best table so far by held-out reward."""

    reward: float = -np.inf
    iteration: int = -1
    positions: Any = None
    weights: Any = None
    scale_dir: Any = None
    scale_time: Any = None

    @property
    def table(self) -> SolverTable:
        def tensor(values: Any) -> torch.Tensor | None:
            return None if values is None else torch.as_tensor(np.array(values))

        positions, weights = tensor(self.positions), tensor(self.weights)
        assert positions is not None and weights is not None
        return SolverTable(positions, weights, tensor(self.scale_dir), tensor(self.scale_time))

    def take(self, table: SolverTable, reward: float, iteration: int) -> bool:
        """Keep the table if it is better."""
        if reward <= self.reward:
            return False
        self.reward, self.iteration = reward, iteration
        for name in ("positions", "weights", "scale_dir", "scale_time"):
            values = getattr(table, name)
            setattr(self, name, None if values is None else values.numpy())
        return True


def noise_seeds(config: RunConfig, stream: str, count: int) -> list[int]:
    """Seeds of a held-out set, fixed by the run's seed."""
    seeds: list[int] = np.random.default_rng([config.seed, STREAMS[stream]]).integers(2**62, size=count).tolist()
    return seeds


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
    table = Solver.from_pretrained(config.distill.table).table
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


class Trainer:
    """The stages of a run on a built algorithm, and what they leave in the run directory."""

    def __init__(
        self, config: RunConfig, run: RunDirectory, prompts: PromptSplits, algo: RDPO, observer: Observer
    ) -> None:
        self.config, self.run, self.prompts, self.algo, self.observer = config, run, prompts, algo, observer
        self.best = Best()

    # -- stage 1 ------------------------------------------------------------------------------------------------------

    def begin(self, start_table: SolverTable | None) -> None:
        """Distil where asked, save the table of the start, and validate it."""
        table = start_table
        residuals: list[float] = []
        if table is None and self.config.distill.enabled:
            table, residuals = self._distill()
            self.algo.rebase(table)
        table = table or self.algo.mean_table()
        self._solver(table, stage="distilled", residuals=residuals).save_pretrained(self.run.distilled)
        self.run.metrics.unlink(missing_ok=True)
        self._validate(table, 0)
        self._checkpoint()

    def _distill(self) -> tuple[SolverTable, list[float]]:
        settings = self.config.distill
        self.observer.stage("distilling", 1)
        chosen = self.prompts.train[: settings.prompts]
        fits = self.algo.distill(
            chosen,
            noise_seeds(self.config, "distill", len(chosen)),
            grid=settings.grid,
            teacher_steps=settings.teacher_steps,
            min_weight=settings.min_weight,
        )
        self.observer.advance()
        return as_table(fits), [f.residual for f in fits]

    def _solver(self, table: SolverTable, **meta: Any) -> Solver:
        facts, backbone = self.algo.facts, self.config.backbone
        about = {
            "backbone": facts.family,
            "model_id": facts.model_id,
            "resolution": backbone.resolution,
            "guidance_scale": backbone.guidance_scale,
            "rewards": {name: head.weight for name, head in self.config.rewards.items()},
            **meta,
        }
        sigmas = torch.tensor(facts.sigmas, dtype=torch.float64)
        return Solver(table, sigmas, facts.form, self.config.solver.afs, self.config.solver.order, about)

    # -- stage 2 ------------------------------------------------------------------------------------------------------

    def fine_tune(self) -> None:
        """RDPO until the last iteration; a checkpoint every few iterations and at an interrupt."""
        r = self.config.rdpo
        done = self.algo.policy_version
        self.observer.stage("fine-tuning", r.iterations)
        self.observer.advance(done)
        images = r.prompts_per_iteration * r.group_size
        with MetricsLog(self.run) as log:
            log.truncate(done)
            try:
                while self.algo.policy_version < r.iterations:
                    self._iterate(log, images)
            except KeyboardInterrupt:
                self._checkpoint()
                raise
        self._checkpoint()

    def _iterate(self, log: MetricsLog, images: int) -> None:
        start = time.perf_counter()
        self.algo.train()
        last = self.algo.last
        row = {"iteration": last.number, "images": last.number * images, **last.metrics}
        write_rollouts(self.run.rollouts, last.number, rollout_table(last.rows))
        if last.number % self.config.evaluation.every == 0 or last.number == self.config.rdpo.iterations:
            row |= self._validate(self.algo.mean_table(), last.number)
        log.write(row)
        if last.number % self.config.checkpoint.every == 0:
            self._checkpoint()
        seconds = time.perf_counter() - start
        shown = {"reward": row["reward/mean"], "images/s": images / seconds}
        if "validation/reward" in row:
            shown["held-out"] = row["validation/reward"]
        self.observer.advance(1, **shown)

    def _validate(self, table: SolverTable, iteration: int) -> dict[str, float]:
        """Score a table on the validation split; the best one so far becomes the solver to take home."""
        prompts = self.prompts.validation
        sampler = self._sampler(table, "validation", "validation")
        sampled = self.algo.sample_scored(sampler, prompts, noise_seeds(self.config, "validation", len(prompts)))
        interval = bootstrap_mean(sampled.reward)
        better = self.best.take(table, interval.mean, iteration)
        if better:
            meta = {"stage": "rdpo", "iteration": iteration, "validation_reward": round(interval.mean, 6)}
            self._solver(table, **meta).save_pretrained(self.run.solver)
        return {
            "validation/reward": interval.mean,
            "validation/low": interval.low,
            "validation/high": interval.high,
            "validation/best": float(better),
        }

    def _sampler(self, table: SolverTable, key: str, label: str) -> Sampler:
        return learned(self._solver(table), key, label)

    def _checkpoint(self) -> None:
        state = {"algorithm": self.algo.export_state(), "best": vars(self.best)}
        save_checkpoint(self.run.checkpoints, self.algo.policy_version, state, self.config.checkpoint.keep)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on where a checkpoint was made; what was written after it is written again, the same."""
        self.algo.import_state(checkpoint["algorithm"])
        self.best = Best(**checkpoint["best"])
        for path in self.run.rollouts.glob("iteration-*.parquet"):
            if int(path.stem.rpartition("-")[2]) > self.algo.policy_version:
                path.unlink()

    # -- the comparison -----------------------------------------------------------------------------------------------

    def compare_all(self) -> list[str]:
        """Ours, the distilled table and the baselines on the test split."""
        ours = self._sampler(self.best.table, "rdpo", "EPD + RDPO")
        start = learned(Solver.from_pretrained(self.run.distilled), "distilled", "EPD distilled")
        others = rivals(self.config.evaluation.baselines, ours, self.config.evaluation.equal_evals)
        prompts = self.prompts.test
        seeds = noise_seeds(self.config, "test", len(prompts))
        return comparison(
            self.config, self.run, self.algo, [ours, start, *others], prompts, seeds, "test", self.observer
        )


def comparison(
    config: RunConfig,
    run: RunDirectory,
    algo: RDPO,
    samplers: Sequence[Sampler],
    prompts: Sequence[str],
    seeds: Sequence[int],
    split: str,
    observer: Observer,
) -> list[str]:
    """Compare samplers on the actors, write the results, return them in a few lines."""
    observer.stage("comparing", len(samplers))
    pictures = config.evaluation.pictures

    def show(sampler: Sampler, row: Row, images: ImageArray) -> None:
        save_pictures(run, sampler.key, images[:pictures])
        observer.advance(1, **{name: float(values.mean()) for name, values in row.values.items()})

    found = compare(algo.sample_scored, samplers, prompts, seeds, split, show)
    save_comparison(run, found, pictures)
    return headline(found.summary())


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
    from PIL import Image

    from epd_ray.backbones import BACKBONES
    from epd_ray.sampling import noises, to_uint8

    solver = Solver.from_pretrained(solver_path)
    meta = dict(solver.meta)
    family = str(meta.get("backbone", "sd3"))
    chosen = model or str(meta.get("model_id", ""))
    options: dict[str, Any] = {"model": chosen, "device": device, "dtype": dtype}
    if chosen == "shapes":
        options["max_sequence_length"] = 20
    backbone = BACKBONES.build(family, options)
    conditioning = backbone.encode(list(prompts), float(meta.get("guidance_scale", 7.0)))  # type: ignore[arg-type]
    sampler = learned(solver, "sample", "sample")
    latents = sampler.run(backbone, conditioning, noises(backbone, [seed + i for i in range(len(prompts))]))
    images = to_uint8(backbone.decode(latents)).permute(0, 2, 3, 1).numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(list(images), axis=1)).save(out)
    return out
