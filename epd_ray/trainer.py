"""The stages of a run on live actors, and what each leaves in the run directory."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from epd_ray.checkpoint import save_checkpoint
from epd_ray.config import RunConfig
from epd_ray.distill import as_table
from epd_ray.evaluate import Row, compare, headline, rivals, save_comparison, save_pictures
from epd_ray.progress import Observer
from epd_ray.prompts import PromptSplits
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.sampling import Sampler, learned
from epd_ray.solvers import Solver, SolverTable
from epd_ray.statistics import bootstrap_mean
from epd_ray.store import MetricsLog, RunDirectory, rollout_table, write_rollouts
from epd_ray.types import ImageArray

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
            "options": backbone.arguments,
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
        row = {"iteration": last.number, "images": images, **last.metrics}
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
