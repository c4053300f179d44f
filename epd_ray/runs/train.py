"""A whole run: stage 1, fine-tuning, comparison and report. The command line and the jobs call this module."""

import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from epd_ray.actors.cluster import stop_signals
from epd_ray.config.loading import to_yaml
from epd_ray.config.problems import first_difference
from epd_ray.config.run_config import RunConfig
from epd_ray.errors import EpdRayError, RunDirectoryError
from epd_ray.evaluation.records import Evaluation
from epd_ray.evaluation.verdict import closing
from epd_ray.prompts.splits import PromptSplits, load_prompts
from epd_ray.rdpo.session import algorithm, warn_of_long_prompts
from epd_ray.runs.report import write_report
from epd_ray.runs.saved import open_run, saved_prompts
from epd_ray.runs.stage_one import given_solver
from epd_ray.runs.trackers import require_trackers, trackers
from epd_ray.runs.trainer import Trainer
from epd_ray.solvers import Solver
from epd_ray.solvers.zoo import require_form, require_installed
from epd_ray.storage.checkpoint import changed_versions, load_newest
from epd_ray.storage.places import Place, place_of, reading
from epd_ray.storage.run_directory import RunDirectory, named_when_full, package_versions, write_text
from epd_ray.telemetry.monitor import Monitor
from epd_ray.telemetry.progress import Observer

log = logging.getLogger(__name__)


def train(config: RunConfig, out: str | Path, observer: Observer, again: bool = False) -> list[str]:
    """Run all stages, and write what they find into a new directory.

    Args:
        config: the configuration of the run.
        out: a path or a URI such as s3://bucket/run. The directory must be empty or must not exist yet.
        observer: sees the progress.
        again: whether to continue the run where `out` already holds one with this configuration; if that run is
            finished, its results are returned.

    Returns:
        The results in a few lines.

    Raises:
        EpdRayError: something is wrong that the user can mend. The files that were written so far stay readable.
        KeyboardInterrupt: a signal stopped the run, after it wrote a checkpoint.
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
            if not run.distilled.exists():  # without any result the directory would only be in the way of the next try
                run.clear()
            raise


def resume(where: str | Path, observer: Observer) -> list[str]:
    """Continue the run at a path or URI from its newest checkpoint. Returns and raises what `train` does."""
    place = place_of(where)
    place.require_run()
    with place.claimed() as folder:
        run, config = open_run(place, folder)
        return _continue(config, run, place, observer)


def _again(config: RunConfig, place: Place, observer: Observer) -> list[str]:
    with place.claimed() as folder:
        run, begun = open_run(place, folder)
        if changed := first_difference(begun, config):
            raise RunDirectoryError(f"{place.name} holds another run: {changed} (name a new directory)")
        if run.stages.is_file() and run.report.is_file():  # a run writes these two files last
            return closing(Evaluation.model_validate_json(run.evaluation.read_bytes()))
        return _continue(config, run, place, observer)


def _continue(config: RunConfig, run: RunDirectory, place: Place, observer: Observer) -> list[str]:
    with reading(place, run.path):
        checkpoint, prompts = load_newest(run.checkpoints), saved_prompts(run)
    if checkpoint is None:
        return _go_on(config, run, prompts, given_solver(config), None, observer, place.save)
    if changed := changed_versions(checkpoint["versions"], package_versions()):
        log.warning(
            "the run %s began with other package versions (%s): the last bits of its numbers may differ from now on",
            place.name,
            changed,
        )
    return _go_on(config, run, prompts, None, checkpoint, observer, place.save)


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
    """Measures the seconds of each stage of a run, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Record the seconds since the last stage ended as those of `stage`."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now
