"""The stages of a run on live actors, and what each leaves in the run directory."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import Sampler, learned
from epd_ray.drawing.worker import BackboneFacts
from epd_ray.errors import is_own_bug
from epd_ray.evaluation.comparison import (
    Comparison,
    Draw,
    Row,
    SceneJudge,
    compare,
    headline,
    rivals,
    save_comparison,
    save_pictures,
    scenes_of,
)
from epd_ray.evaluation.validation import STOPPED, Best, Curve, Validation, write_curve
from epd_ray.prompts.splits import PromptSplits
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.runs.trackers import Sink
from epd_ray.solvers import Solver, SolverTable, check_fit
from epd_ray.stage_one.fit import StageOne, fit_table
from epd_ray.stage_one.gradient import Descent
from epd_ray.stage_one.shard import Fit, as_table
from epd_ray.storage.checkpoint import save_best, save_checkpoint
from epd_ray.storage.rollouts import drop_rollouts, rollout_table, write_rollouts
from epd_ray.storage.run_directory import MetricsLog, RunDirectory, package_versions
from epd_ray.telemetry.monitor import memory_metrics
from epd_ray.telemetry.progress import Observer
from epd_ray.types import ImageArray

log = logging.getLogger(__name__)
TRUNCATED = "%d of %d prompts are longer than the model reads: their ends are cut"
RATE_ITERATIONS = 10  # that images per second are averaged over: what a validation delays comes out at once afterwards


def distil(config: RunConfig, prompts: PromptSplits, algo: RDPO, observer: Observer | None = None) -> list[Fit]:
    """Stage 1 on the first training prompts; the observer sees a step for each interval."""
    chosen = prompts.train[: config.distill.prompts]
    stage = stage_one(config, chosen, noise_seeds(Purpose.STAGE_ONE, config.seed, len(chosen)))
    if observer is not None:
        observer.stage("distilling", stage.intervals)

    def show(fit: Fit) -> None:
        if observer is not None:
            observer.advance(1, residual=fit.residual)

    return fit_table(algo.work, stage, algo.facts.sigmas, descent_of(config, algo.facts), after_each=show)


def stage_one(config: RunConfig, prompts: Sequence[str], seeds: Sequence[int]) -> StageOne:
    """What a run fits, on some prompts."""
    s, d = config.solver, config.distill
    return StageOne(
        intervals=s.intervals,
        points=s.points,
        prompts=tuple(prompts),
        noise_seeds=tuple(seeds),
        shard_size=config.cluster.images_per_job,
        teacher_steps=d.teacher_steps,
        grid=d.grid,
        min_weight=d.min_weight,
        afs=s.afs,
        order=s.order,
        start_point=s.start_point,
        scale_range=_scale_range(config),
    )


def descent_of(config: RunConfig, facts: BackboneFacts) -> Descent | None:
    """How a run descends the gradient, if it does."""
    d = config.distill
    if d.method == "least_squares":
        return None
    batch = max(1, round(d.batch / config.cluster.images_per_job))
    max_sigma = facts.sigmas[0] if facts.form == "flow" else None
    return Descent(
        d.steps,
        d.lr,
        batch,
        d.min_weight,
        scale_range=_scale_range(config),
        scale_time=config.rdpo.scale_time,
        start_point=config.solver.start_point,
        max_sigma=max_sigma,
    )


def _scale_range(config: RunConfig) -> float:
    """Stage 1 finds no scales that the policy would not keep."""
    return config.distill.scale_range if config.rdpo.scale_dir else 0.0


def validate(config: RunConfig, prompts: PromptSplits, algo: RDPO, table: SolverTable, iteration: int) -> Validation:
    """A table's scores on each validation prompt, always with the same seeds."""
    s = config.solver
    sampler = Sampler("epd", s.intervals, "validation", "validation", table, s.afs, s.order)
    seeds = noise_seeds(Purpose.VALIDATION, config.seed, len(prompts.validation))
    scenes = scenes_of(prompts.validation)
    judge = SceneJudge(scenes)
    found = algo.sample_scored(sampler, prompts.validation, seeds, judge.see if scenes else None)
    return Validation(iteration, found.reward, {**found.scores, **judge.values})


def held_out(config: RunConfig, prompts: PromptSplits, algo: RDPO) -> float:
    """The current mean table's reward on the validation prompts."""
    return float(validate(config, prompts, algo, algo.mean_table(), algo.policy_version).reward.mean())


def warn_of_long_prompts(algo: RDPO, prompts: Sequence[str]) -> None:
    """One line for all prompts that the model does not read to their ends."""
    if cut := algo.truncated(prompts):
        log.warning(TRUNCATED, cut, len(prompts))


def made_by(config: RunConfig, facts: BackboneFacts, table: SolverTable, **meta: Any) -> Solver:
    """A run's solver, with what it was made for and from."""
    about = {
        "backbone": facts.family,
        "model_id": facts.model_id,
        **facts.more,
        "guidance_scale": facts.guidance_scale,
        "registry": config.backbone.family,
        "options": config.backbone.portable,
        **meta,
    }
    sigmas = torch.tensor(facts.sigmas, dtype=torch.float64)
    return Solver(table, sigmas, facts.form, config.solver.afs, config.solver.order, about)


def weights_of(config: RunConfig) -> dict[str, float]:
    """Head -> share in the mix, as a solver file keeps it."""
    return {name: head.weight for name, head in config.rewards.items()}


class Trainer:
    """The stages of a run on a built algorithm, and what they leave in the run directory."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        prompts: PromptSplits,
        algo: RDPO,
        observer: Observer,
        sinks: Sequence[Sink] = (),
        after_checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.run, self.prompts, self.algo, self.observer = config, run, prompts, algo, observer
        self.sinks, self.after_checkpoint = sinks, after_checkpoint
        self._about = {"seed": config.seed, "versions": package_versions()}
        self.best = Best()
        trained = tuple(name for name, head in config.rewards.items() if head.weight)
        seeds = noise_seeds(Purpose.VALIDATION, config.seed, len(prompts.validation))
        self.curve = Curve(tuple(prompts.validation), tuple(seeds), trained)
        self._checkpointed = -1

    # -- stage 1 ------------------------------------------------------------------------------------------------------

    def begin(self, start: Solver | None) -> None:
        """Distil where asked, save the table of the start, and validate it."""
        if start is not None:
            facts, name = self.algo.facts, str(self.config.distill.table)
            for warning in check_fit(start, name, facts.family, facts.form, facts.guidance_scale, facts.more):
                log.warning(warning)
            if not torch.allclose(start.sigmas, torch.tensor(facts.sigmas, dtype=torch.float64), rtol=1e-3):
                made, used = (f"{s[0]:.4g} ... {s[-1]:.4g}" for s in (start.sigmas.tolist(), facts.sigmas))
                log.warning("solver %s was made for sigmas %s, the run uses its model's own: %s", name, made, used)
        table = None if start is None else start.table
        residuals: list[float] = []
        if table is None and self.config.distill.enabled:
            fits = distil(self.config, self.prompts, self.algo, self.observer)
            table, residuals = as_table(fits), [f.residual for f in fits]
            self.algo.rebase(table)
        table = table or self.algo.mean_table()
        self._solver(table, stage="distilled", residuals=residuals).save_pretrained(self.run.distilled)
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
        """RDPO until the last iteration or an early stop; a checkpoint every few iterations and at an interrupt."""
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
        """Why fine-tuning is over before its last iteration; it follows from the curve, so a resumed run agrees."""
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
        """Remember the state after a whole iteration, since a signal may come in the middle of one; keep the best."""
        kept = {"best": dict(vars(self.best)), "curve": self.curve.state()}
        state = {"algorithm": self.algo.export_state(), **kept, **self._about}
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
        """Go on where a checkpoint was made; what was written after it is written again, the same."""
        self.algo.import_state(checkpoint["algorithm"])
        self._checkpointed = checkpoint["iteration"]
        self.best, self.curve = Best(**checkpoint["best"]), self.curve.restored(checkpoint["curve"])
        write_curve(self.run.validation, self.curve)
        self._save_best()
        drop_rollouts(self.run.rollouts, after=self.algo.policy_version)
        self._mark()

    def _validate(self, table: SolverTable, iteration: int) -> dict[str, float]:
        """Score a table on the validation split; the best one without an alarm becomes the solver to take home."""
        self.curve = self.curve.extended(validate(self.config, self.prompts, self.algo, table, iteration))
        write_curve(self.run.validation, self.curve)
        row = self.curve.metrics()
        if alarm := self.curve.alarm():
            log.warning("%s: the solver stays that of iteration %d", alarm, self.best.iteration)
        better = not self.curve.falls() and self.best.take(table, row["validation/reward"], iteration)
        if better:
            self._save_best()
        return {**row, "validation/best": float(better), **self._memory()}

    def _memory(self) -> dict[str, float]:
        try:
            return memory_metrics(self.algo.memory())
        except (IndexError, ray.exceptions.RayError) as error:  # RLlib's, of an actor on its way back: no reason to end
            if is_own_bug(error):
                raise
            return {}

    def _save_best(self, **rewards: Any) -> None:
        self._solver(self.best.table, **self.best.about, **rewards).save_pretrained(self.run.solver)

    # -- the comparison -----------------------------------------------------------------------------------------------

    def compare_all(self) -> list[str]:
        """Ours, the distilled table and the baselines on the test split; the solver's card gets its figures."""
        ours = learned(Solver.from_pretrained(self.run.solver), "rdpo", "EPD + RDPO")
        start = learned(Solver.from_pretrained(self.run.distilled), "distilled", "EPD distilled")
        others = rivals(self.config.evaluation.baselines, ours, self.config.evaluation.equal_evals)
        prompts = self.prompts.test
        seeds = noise_seeds(Purpose.TEST, self.config.seed, len(prompts))
        draw, keep = self.algo.sample_scored, self.config.evaluation.pictures
        found = comparison(draw, [ours, start, *others], prompts, seeds, "test", self.run, keep, self.observer)
        means = {row.sampler.key: {m: round(float(v.mean()), 6) for m, v in row.values.items()} for row in found.rows}
        self._save_best(rewards_before=means["distilled"], rewards_after=means["rdpo"])
        return headline(found.summary())


def comparison(
    draw: Draw,
    samplers: Sequence[Sampler],
    prompts: Sequence[str],
    seeds: Sequence[int],
    split: str,
    run: RunDirectory,
    pictures: int,
    observer: Observer,
) -> Comparison:
    """Compare samplers, showing the progress, and write the results and the first `pictures` of each to the run."""
    observer.stage("comparing", len(samplers))

    def save(sampler: Sampler, first: int, images: ImageArray) -> None:
        save_pictures(run.samples / sampler.key, images[: max(0, pictures - first)], first)

    def show(row: Row) -> None:
        observer.advance(1, **{name: float(values.mean()) for name, values in row.values.items()})

    found = compare(draw, samplers, prompts, seeds, split, save, show)
    save_comparison(run, found, pictures)
    return found
