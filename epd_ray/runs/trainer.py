"""The stages of a run on a built algorithm, and the files that each stage writes into the run directory."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import ray
import torch

from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.errors import RunDirectoryError, is_own_bug, shown
from epd_ray.evaluation.comparison import SceneJudge, scenes_of
from epd_ray.evaluation.statistics import judged
from epd_ray.evaluation.suites.tune import Tuning
from epd_ray.evaluation.validation import STOPPED, Best, Curve, Validation, write_curve
from epd_ray.evaluation.verdict import closing
from epd_ray.prompts.splits import PromptSplits
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.runs.compare import comparison, contest
from epd_ray.runs.origin import Origin, started
from epd_ray.runs.stage_one import cost_of, fit_start_table, made_by, weights_of
from epd_ray.runs.trackers import Sink
from epd_ray.solvers import Solver, SolverTable, check_fit
from epd_ray.stage_one.shard import as_table
from epd_ray.storage.checkpoint import save_best, save_checkpoint
from epd_ray.storage.rollouts import drop_rollouts, rollout_table, write_rollouts
from epd_ray.storage.run_directory import MetricsLog, RunDirectory, package_versions, write_text
from epd_ray.telemetry.monitor import memory_metrics
from epd_ray.telemetry.progress import Observer

log = logging.getLogger(__name__)
RATE_ITERATIONS = 10  # over which images per second are averaged: images that a validation delays arrive at once


def validate(config: RunConfig, prompts: PromptSplits, algo: RDPO, table: SolverTable, iteration: int) -> Validation:
    """Score a table, [N, K], on each validation prompt; the noise seeds are the same in every iteration."""
    s = config.solver
    sampler = Sampler("epd", s.intervals, "validation", "validation", table, s.afs, s.order)
    seeds = noise_seeds(Purpose.VALIDATION, config.seed, len(prompts.validation))
    scenes = scenes_of(prompts.validation)
    judge = SceneJudge(scenes)
    found = algo.sample_scored(sampler, prompts.validation, seeds, judge.see if scenes else None)
    return Validation(iteration, found.reward, {**found.scores, **judge.values})


def held_out(config: RunConfig, prompts: PromptSplits, algo: RDPO) -> float:
    """The mean reward of the policy's current mean table over the validation prompts."""
    return float(validate(config, prompts, algo, algo.mean_table(), algo.policy_version).reward.mean())


class Trainer:
    """Runs the stages one after the other.

    Args:
        config: the configuration of the run.
        run: the directory that receives the results.
        prompts: the prompts of the three splits.
        origin: what decides the results of the run, for its checkpoints.
        algo: the built algorithm.
        observer: sees the progress.
        sinks: take each row of metrics, beside metrics.jsonl.
        after_checkpoint: is called after each checkpoint, for example to upload it.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        prompts: PromptSplits,
        origin: Origin,
        algo: RDPO,
        observer: Observer,
        sinks: Sequence[Sink] = (),
        after_checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.run, self.prompts, self.algo, self.observer = config, run, prompts, algo, observer
        self.sinks, self.after_checkpoint = sinks, after_checkpoint
        self.origin, self._versions = origin, package_versions()
        self.best = Best()
        trained = tuple(name for name, head in config.rewards.items() if head.weight)
        seeds = noise_seeds(Purpose.VALIDATION, config.seed, len(prompts.validation))
        self.curve = Curve(tuple(prompts.validation), tuple(seeds), trained)
        self._checkpointed = -1

    # -- stage 1 ------------------------------------------------------------------------------------------------------

    def begin(self, start: Solver | None) -> None:
        """Run stage 1 where the configuration asks for it, then save the start table and validate it.

        Args:
            start: the solver that the user gives; None where the run fits its own.
        """
        if start is not None:
            facts, name = self.algo.facts, str(self.config.distill.table)
            for warning in check_fit(start, name, facts.family, facts.form, facts.guidance_scale, facts.more):
                log.warning(warning)
            if not torch.allclose(start.sigmas, torch.tensor(facts.sigmas, dtype=torch.float64), rtol=1e-3):
                made, used = (f"{s[0]:.4g} ... {s[-1]:.4g}" for s in (start.sigmas.tolist(), facts.sigmas))
                log.warning(
                    "the solver %s was made for the sigmas %s, but this run uses the sigmas of its model: %s",
                    name,
                    made,
                    used,
                )
        table = None if start is None else start.table
        about: dict[str, Any] = {"residuals": []}
        if table is None and self.config.distill.enabled:
            fits = fit_start_table(self.config, self.prompts, self.algo, self.observer)
            table, cost = as_table(fits), cost_of(fits, self.config, self.prompts, self.algo.facts)
            about = {"residuals": [f.residual for f in fits], "stage_one": asdict(cost)}
            self.observer.note(str(cost))
            self.algo.rebase(table)
        table = table or self.algo.mean_table()
        self._solver(table, stage="distilled", **about).save_pretrained(self.run.distilled)
        self.origin = started(self.origin, self.run)
        write_text(self.run.origin, self.origin.text())
        self.run.metrics.unlink(missing_ok=True)
        self.run.validation.unlink(missing_ok=True)
        drop_rollouts(self.run.rollouts, after=0)
        with MetricsLog(self.run) as metrics:
            self._write(metrics, {"iteration": 0, "images": 0, **self._validate(table, 0)})
        self._mark(better=True)
        self._checkpoint()

    def _solver(self, table: SolverTable, **meta: Any) -> Solver:
        return made_by(self.config, self.algo.facts, table, rewards=weights_of(self.config), **meta)

    # -- stage 2 ------------------------------------------------------------------------------------------------------

    def fine_tune(self) -> None:
        """Train until the last iteration or an early stop, with a checkpoint every few iterations.

        Raises:
            KeyboardInterrupt: a signal stopped the run; a checkpoint of the last whole iteration was written.
        """
        iterations = self.config.rdpo.iterations
        done = self.algo.policy_version
        self.observer.stage("fine-tuning", iterations)
        self.observer.advance(done)
        self.algo.stop_after(iterations)
        self._ends = deque([time.perf_counter()], RATE_ITERATIONS + 1)
        self._written = self._ends[0]
        with MetricsLog(self.run, keep_until=done) as metrics:
            try:
                while self.algo.policy_version < iterations and not self._early_stop():
                    self._iterate(metrics)
            except KeyboardInterrupt:
                self._checkpoint()
                raise
        self._checkpoint()
        if (why := self._early_stop()) and (done := self.algo.policy_version) < iterations:
            self.algo.drop_ahead()
            self.observer.note(f"fine-tuning ends early, after iteration {done} of {iterations}: {STOPPED[why]}")

    def _early_stop(self) -> str | None:
        """The key of STOPPED that ends fine-tuning now, or None. It depends on the curve alone, as after a resume."""
        e = self.config.evaluation
        if e.stop_on_alarm and self.curve.falls():
            return "alarm"
        return "patience" if e.patience and self.curve.stalled >= e.patience else None

    def _iterate(self, metrics: MetricsLog) -> None:
        self.algo.train()
        self._ends.append(time.perf_counter())
        last = self.algo.last
        images = len(last.rollouts)
        rate = images * (len(self._ends) - 1) / (self._ends[-1] - self._ends[0])
        row = {"iteration": last.number, "images": images, "images_per_second": rate, **last.metrics}
        write_rollouts(self.run.rollouts, last.number, rollout_table([rollout.record() for rollout in last.rollouts]))
        if last.number % self.config.evaluation.every == 0 or last.number == self.config.rdpo.iterations:
            row |= self._validate(self.algo.mean_table(), last.number)
            if why := self._early_stop():
                row[f"stopped/{why}"] = 1.0
        before, self._written = self._written, time.perf_counter()
        row["time/total"] = self._written - before
        self._write(metrics, row)
        self._mark(better=bool(row.get("validation/best")))
        if last.number % self.config.checkpoint.every == 0:
            self._checkpoint()
        shown = {"reward": row["reward/mean"], "images/s": rate}
        if "validation/reward" in row:
            shown |= {"held-out": row["validation/reward"], "gain": row["validation/gain"]}
        self.observer.advance(1, **shown)

    def _write(self, metrics: MetricsLog, row: dict[str, float]) -> None:
        metrics.write(row)
        for sink in self.sinks:
            sink.write(row)

    def _mark(self, better: bool = False) -> None:
        """Remember the state after a whole iteration, because a signal may come in the middle of the next one."""
        kept = {"best": self.best.state(), "curve": self.curve.state()}
        about = {"versions": self._versions, "origin": self.origin.state()}
        state = {"algorithm": self.algo.export_state(), **kept, **about}
        self._whole = self.algo.policy_version, state
        if better:
            save_best(self.run.checkpoints, *self._whole)

    def _checkpoint(self) -> None:
        iteration, state = self._whole
        if iteration != self._checkpointed:
            save_checkpoint(self.run.checkpoints, iteration, state, self.config.checkpoint.keep)
            self._checkpointed = iteration
            self.after_checkpoint()

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue from a checkpoint. Rows and rollouts of later iterations are written again with the same values."""
        try:
            self.algo.import_state(checkpoint["algorithm"])
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            if is_own_bug(error):
                raise
            raise RunDirectoryError(
                f"the checkpoint of iteration {checkpoint['iteration']} in {self.run.checkpoints} does not fit the run "
                f"({shown(str(error))}): move it away to go on from the one before"
            ) from error
        self._checkpointed = checkpoint["iteration"]
        self.best, self.curve = Best.restored(checkpoint["best"]), self.curve.restored(checkpoint["curve"])
        write_curve(self.run.validation, self.curve)
        self._save_best()
        drop_rollouts(self.run.rollouts, after=self.algo.policy_version)
        self._mark()

    def _validate(self, table: SolverTable, iteration: int) -> dict[str, float]:
        """Score a table on the validation split. The best table so far without an alarm becomes the run's solver."""
        self.curve = self.curve.extended(validate(self.config, self.prompts, self.algo, table, iteration))
        write_curve(self.run.validation, self.curve)
        row = self.curve.metrics()
        if alarm := self.curve.alarm():
            log.warning("%s: the run keeps the solver of iteration %d", alarm, self.best.iteration)
        better = not self.curve.falls() and self.best.take(table, row["validation/reward"], iteration)
        if better:
            self._save_best()
        return {**row, "validation/best": float(better), **self._memory()}

    def _memory(self) -> dict[str, float]:
        try:
            return memory_metrics(self.algo.memory())
        except (IndexError, ray.exceptions.RayError) as error:  # RLlib raises them while an actor restarts
            if is_own_bug(error):
                raise
            return {}

    def _save_best(self, **rewards: Any) -> None:
        self._solver(self.best.table, **self.best.about, **rewards).save_pretrained(self.run.solver)

    # -- the comparison -----------------------------------------------------------------------------------------------

    def compare_all(self) -> list[str]:
        """Compare the solver, the start table and the baselines on the test split, and add the scores to solver.json.

        Returns:
            The results in a few lines.
        """
        prompts, tuning = self.prompts.test, None
        if self.config.evaluation.tune:
            tuning = Tuning(self.config, self.algo, self.prompts.validation, self.observer)
        who = contest(self.config, self.run, self.algo, tuning)
        seeds = noise_seeds(Purpose.TEST, self.config.seed, len(prompts))
        draw, keep = self.algo.sample_scored, self.config.evaluation.pictures
        found = comparison(draw, who, prompts, seeds, "test", self.run, keep, self.observer)
        means = {
            row.sampler.key: {m: round(float(judged(v).mean()), 6) for m, v in row.values.items()} for row in found.rows
        }
        self._save_best(rewards_before=means["distilled"], rewards_after=means["rdpo"])
        return closing(found.evaluation)
