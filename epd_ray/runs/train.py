"""A whole run: distil, fine-tune, compare, report. What the command line and the jobs call."""

import json
import logging
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from epd_ray.actors.cluster import stop_signals
from epd_ray.config.loading import load_config, to_yaml
from epd_ray.config.problems import first_difference
from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import learned
from epd_ray.errors import EpdRayError, PromptError, RunDirectoryError, TableError
from epd_ray.evaluation.comparison import Comparison, headline, rivals
from epd_ray.prompts.files import read_prompts
from epd_ray.prompts.splits import BUILTIN, SHAPES, PromptSplits, load_prompts
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.config import uniform_table
from epd_ray.rdpo.session import algorithm
from epd_ray.runs.report import write_report
from epd_ray.runs.trackers import require_trackers, trackers
from epd_ray.runs.trainer import Trainer, comparison, warn_of_long_prompts
from epd_ray.solvers import Solver
from epd_ray.solvers.zoo import require_form, require_installed
from epd_ray.storage.checkpoint import changed_versions, load_newest
from epd_ray.storage.lock import held
from epd_ray.storage.places import Place, inside, place_of, reading
from epd_ray.storage.run_directory import RunDirectory, named_when_full, package_versions, write_text
from epd_ray.telemetry.monitor import Monitor
from epd_ray.telemetry.progress import Observer

log = logging.getLogger(__name__)
SECONDS_PER_PASS = 0.005  # the embedded model on one core, for the estimate before a run
SECONDS_TO_START = 30.0
HELD_OUT = {"validation": Purpose.VALIDATION, "test": Purpose.TEST}


def describe(config: RunConfig) -> tuple[str, str]:
    """What a run will do and about how long it takes, in two lines."""
    s, r, e = config.solver, config.rdpo, config.evaluation
    images = r.iterations * r.prompts_per_iteration * r.group_size
    table = uniform_table(s.intervals, s.points, s.start_point)
    evals, depth = table.evaluations(s.afs), table.depth(s.afs)
    model = config.backbone.arguments.get("model", config.backbone.family)
    what = (
        f"Fine-tune {s.intervals} intervals x {s.points} point{'s' * (s.points > 1)} (parallel NFE {depth}) on {model} "
        f"against {', '.join(config.rewards)}: {r.iterations} iterations, {images} images."
    )
    if model != SHAPES or config.cluster.rollout_gpus:
        return what, "The first iteration will tell how long it takes."
    validations = 1 + r.iterations // e.every
    compared = evals * 2 + (depth + evals * e.equal_evals) * len(e.baselines)
    distilled = config.distill.prompts * s.intervals * (2 * config.distill.teacher_steps + config.distill.grid + 2)
    if config.distill.method == "gradient":  # a step costs about four passes a point
        distilled += (
            (4 * config.distill.steps * config.distill.batch + 2 * config.distill.prompts) * s.points * s.intervals
        )
    drifts = images * evals + validations * config.prompts.validation * evals + config.prompts.test * compared
    drifts += distilled if config.distill.enabled and config.distill.table is None else 0
    passes = drifts * (2 if (config.backbone.guidance_scale or 0) > 1 else 1)
    minutes = (SECONDS_TO_START + passes * SECONDS_PER_PASS / max(1, config.cluster.rollout_actors)) / 60
    actors = config.cluster.rollout_actors
    return (
        what,
        f"{passes:,} network passes in all, about {minutes:.0f} minutes with {actors} rollout actors on CPU cores.",
    )


def train(config: RunConfig, out: str | Path, observer: Observer, again: bool = False) -> list[str]:
    """Run all of it into a new directory.

    Args:
        config: of the run.
        out: a directory that does not exist yet, or an empty one; a path, or a URI such as s3://bucket/run.
        observer: sees the progress.
        again: where `out` holds this very run, continue it, or give its results if it is finished.

    Returns:
        The results in a few lines.

    Raises:
        EpdRayError: something that the user can mend; what was written so far stays readable.
        KeyboardInterrupt: stopped by a signal, after a checkpoint.
    """
    place = place_of(out)
    if again and place.begun():
        return _again(config, place, observer)
    place.require_new()
    prompts = load_prompts(config.prompts, config.seed)
    start = given_solver(config)
    require_trackers(config.tracking)
    with place.claimed() as folder:
        saved = json.dumps(asdict(prompts), indent=1, ensure_ascii=False)
        run = RunDirectory.create(folder, to_yaml(config), saved)
        place.save()
        try:
            return _go_on(config, run, prompts, start, None, observer, place.save)
        except EpdRayError:
            if not run.distilled.exists():  # it never got as far as a result: leave nothing in the way of the next try
                run.clear()
            raise


def resume(where: str | Path, observer: Observer) -> list[str]:
    """Continue a run, at a path or URI, from its newest checkpoint; the same otherwise as `train`."""
    place = place_of(where)
    place.require_run()
    with place.claimed() as folder:
        run, config = _opened(place, folder)
        return _continue(config, run, place, observer)


def _opened(place: Place, folder: Path) -> tuple[RunDirectory, RunConfig]:
    with reading(place, folder):
        run = RunDirectory.open(folder)
        return run, load_config(run.config)


def _again(config: RunConfig, place: Place, observer: Observer) -> list[str]:
    with place.claimed() as folder:
        run, begun = _opened(place, folder)
        if changed := first_difference(begun, config):
            raise RunDirectoryError(f"{place.name} holds another run: {changed} (name a new directory)")
        if run.stages.is_file() and run.report.is_file():  # the last that are written
            return headline(json.loads(run.evaluation.read_text()))
        return _continue(config, run, place, observer)


def _continue(config: RunConfig, run: RunDirectory, place: Place, observer: Observer) -> list[str]:
    with reading(place, run.path):
        checkpoint, prompts = load_newest(run.checkpoints), saved_prompts(run)
    if checkpoint is None:
        return _go_on(config, run, prompts, given_solver(config), None, observer, place.save)
    if changed := changed_versions(checkpoint["versions"], package_versions()):
        log.warning("%s was made with other versions (%s): the last bits may differ from now on", place.name, changed)
    return _go_on(config, run, prompts, None, checkpoint, observer, place.save)


def saved_prompts(run: RunDirectory) -> PromptSplits:
    """The prompts that a run was begun with, whatever has become of the file that they came from.

    Raises:
        RunDirectoryError: they are missing or damaged.
    """
    try:
        return PromptSplits(**json.loads(run.prompts.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunDirectoryError(f"{run.prompts} cannot be read ({error}): the run cannot go on") from error


def given_solver(config: RunConfig) -> Solver | None:
    if config.distill.table is None:
        return None
    solver = Solver.from_pretrained(config.distill.table)
    table = solver.table
    for key, has in (("afs", solver.afs), ("order", solver.order), ("start_point", table.start_point)):
        if has != (asked := getattr(config.solver, key)):
            raise TableError(f"{config.distill.table} has {key} {has}, the run {asked}: set solver.{key} to match")
    wanted = (config.solver.intervals, config.solver.points)
    if (table.intervals, table.points) != wanted:
        raise TableError(
            f"{config.distill.table} has {table.intervals} intervals of {table.points} points, the run {wanted[0]} of "
            f"{wanted[1]}: set solver.intervals and solver.points to match"
        )
    return solver


def _go_on(
    config: RunConfig,
    run: RunDirectory,
    prompts: PromptSplits,
    start: Solver | None,
    checkpoint: dict[str, Any] | None,
    observer: Observer,
    save: Callable[[], None],
) -> list[str]:
    require_installed(config.evaluation.baselines)
    clock = StageClock()
    observer.stage("starting actors", 1)
    with ExitStack() as stack:
        stack.enter_context(named_when_full(run.path))
        sinks = stack.enter_context(trackers(config.tracking, run, config.model_dump(mode="json")))
        algo = stack.enter_context(algorithm(config, prompts.train, None if start is None else start.table))
        stack.enter_context(stop_signals())  # after Ray, which sets its own handler
        observer.advance()
        require_form(config.evaluation.baselines, algo.facts.form)
        clock.lap("starting actors")
        warn_of_long_prompts(algo, [*prompts.train, *prompts.validation, *prompts.test])
        monitor = stack.enter_context(Monitor(run.path.name))
        trainer = Trainer(config, run, prompts, algo, observer, [monitor, *sinks], save)
        if checkpoint is None:
            trainer.begin(start)
        else:
            trainer.restore(checkpoint)
        clock.lap("distilling")
        trainer.fine_tune()
        clock.lap("fine-tuning")
        lines = trainer.compare_all()
        clock.lap("comparing")
    write_text(run.stages, json.dumps(clock.seconds))
    write_report(run.path)
    observer.done()
    return lines


class StageClock:
    """Seconds per stage, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The stage ends now."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


def evaluate(
    where: str | Path, count: int | None, prompts_file: Path | None, split: str, observer: Observer
) -> list[str]:
    """Compare a run's solver with the baselines again, on other or more prompts.

    The results and a report go to RUN/evaluations/<split>-<count>, or file-<name>-<checksum>-<count>; the run's own
    stay as they are, and it may be going on meanwhile.

    Args:
        where: a run with a solver, at a path or URI.
        count: number of prompts; all there are when None. Embedded scenes are drawn anew, as many as asked.
        prompts_file: one prompt a line, instead of the split.
        split: "validation" or "test".
        observer: sees the progress.
    """
    place = place_of(where)
    with place.visited() as folder:
        run, config = _opened(place, folder)
        if not (run.solver / "solver.json").exists():
            raise RunDirectoryError(f"{where} has no solver yet: continue it with epd-ray train --resume {where}")
        with reading(place, folder):
            prompts = _evaluation_prompts(config, run, count, prompts_file, split)
        name = f"{_file_name(prompts_file, prompts) if prompts_file else split}-{len(prompts)}"
        seeds = noise_seeds(HELD_OUT["test" if prompts_file else split], config.seed, len(prompts))
        final = run.path / "evaluations" / name
        final.parent.mkdir(exist_ok=True)
        with held(final.with_name(f".{name}.lock"), str(final)):
            with _draft(run, final) as target:
                found = _compared_again(config, run, target, prompts, seeds, observer)
            report = write_report(final)  # what was compared stays where this fails
        observer.done()
        return [*headline(found.summary()), f"report: {inside(where, Path('evaluations', name, report.name))}"]


def _file_name(path: Path, prompts: list[str]) -> str:
    """Another one for other prompts, and none that a split has."""
    return f"file-{path.stem.lstrip('.')}-{zlib.crc32(chr(10).join(prompts).encode()):08x}"


def _compared_again(
    config: RunConfig,
    run: RunDirectory,
    target: RunDirectory,
    prompts: list[str],
    seeds: list[int],
    observer: Observer,
) -> Comparison:
    ours = learned(Solver.from_pretrained(run.solver), "rdpo", "EPD + RDPO")
    start = learned(Solver.from_pretrained(run.distilled), "distilled", "EPD distilled")
    samplers = [ours, start, *rivals(config.evaluation.baselines, ours, config.evaluation.equal_evals)]
    local = config.model_copy(update={"cluster": config.cluster.model_copy(update={"learner_actors": 0})})
    observer.stage("starting actors", 1)
    with algorithm(local, prompts, None) as algo:
        observer.advance()
        warn_of_long_prompts(algo, prompts)
        keep = config.evaluation.pictures
        return comparison(algo.sample_scored, samplers, prompts, seeds, target.path.name, target, keep, observer)


def _evaluation_prompts(
    config: RunConfig, run: RunDirectory, count: int | None, prompts_file: Path | None, split: str
) -> list[str]:
    if prompts_file is not None:
        held_out = read_prompts(prompts_file)
    elif config.prompts.train in (SHAPES, BUILTIN) and count is not None:
        prompts = config.prompts.model_copy(update={split: count})
        held_out = getattr(load_prompts(prompts, config.seed), split)
    else:
        held_out = getattr(saved_prompts(run), split)
    if count is not None and count > len(held_out):
        raise PromptError(f"{count} prompts asked, {len(held_out)} there: lower --count or give more prompts")
    return held_out[:count]


@contextmanager
def _draft(run: RunDirectory, final: Path) -> Iterator[RunDirectory]:
    """A fresh run directory with what a report needs besides the evaluation.

    Afterwards it takes the place of an earlier one, which stays if the block does not come to its end.

    Raises:
        RunDirectoryError: one that was replaced before cannot be removed.
    """
    draft, earlier = (final.with_name(f".{final.name}.{end}") for end in ("new", "old"))
    _settle(final, earlier)
    if earlier.exists():
        raise RunDirectoryError(f"{earlier} cannot be removed: end what has its files open, or delete it")
    target = RunDirectory(draft / final.name)  # of the final name, which the results show
    shutil.rmtree(draft, ignore_errors=True)
    target.path.mkdir(parents=True)
    for source in (run.config, run.versions, run.metrics):
        shutil.copy(source, target.path)
    if run.validation.is_file():
        shutil.copy(run.validation, target.path)
    shutil.copytree(run.solver, target.solver)
    shutil.copytree(run.distilled, target.distilled)
    try:
        yield target
        if final.exists():
            final.rename(earlier)
        target.path.rename(final)
    finally:
        _settle(final, earlier)
        shutil.rmtree(draft, ignore_errors=True)


def _settle(final: Path, earlier: Path) -> None:
    """Put back an evaluation that was moved aside and not replaced; remove one that was."""
    if final.exists():
        shutil.rmtree(earlier, ignore_errors=True)
    elif earlier.exists():
        earlier.rename(final)
