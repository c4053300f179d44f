"""A whole run: stage 1, fine-tuning, comparison and report. The command line and the jobs call this module."""

import json
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from epd_ray.actors.beforehand import panel_of
from epd_ray.actors.cluster import stop_signals
from epd_ray.config.deciding import changes
from epd_ray.config.loading import to_yaml
from epd_ray.config.problems import flat
from epd_ray.config.run_config import RunConfig
from epd_ray.errors import EpdRayError
from epd_ray.evaluation.tuning import require_apart
from epd_ray.prompts.splits import load_prompts
from epd_ray.rdpo.session import algorithm, warn_of_long_prompts
from epd_ray.runs.origin import origin_of, require_known
from epd_ray.runs.report import write_report
from epd_ray.runs.saved import open_run
from epd_ray.runs.stage_one import given_solver
from epd_ray.runs.standing import Standing, standing
from epd_ray.runs.trackers import require_trackers, trackers
from epd_ray.runs.trainer import Trainer
from epd_ray.solvers.rival import require_rivals
from epd_ray.solvers.zoo import require_installed
from epd_ray.storage.places import Place, place_of, reading
from epd_ray.storage.run_directory import RunDirectory, named_when_full, write_text
from epd_ray.telemetry.monitor import Monitor
from epd_ray.telemetry.progress import Observer


def train(
    config: RunConfig, out: str | Path, observer: Observer, again: bool = False, accept: Collection[str] = ()
) -> list[str]:
    """Run all stages, and write what they find into a new directory.

    Args:
        config: the configuration of the run.
        out: a path or a URI such as s3://bucket/run. The directory must be empty or must not exist yet.
        observer: sees the progress.
        again: whether to continue the run where `out` already holds one with this configuration; if that run is
            finished, its results are returned.
        accept: keys that may have another value than the run in `out` had so far.

    Returns:
        The results in a few lines.

    Raises:
        EpdRayError: something is wrong that the user can mend. The files that were written so far stay readable.
        KeyboardInterrupt: a signal stopped the run, after it wrote a checkpoint.
    """
    place = place_of(out)
    if again and place.begun():
        return _again(config, place, observer, accept)
    place.require_new()
    prompts = load_prompts(config.prompts, config.seed, panel_of(config))
    if config.evaluation.tune:
        require_apart(prompts.validation, prompts.test)
    origin = origin_of(config, prompts)
    require_known(accept, origin.settings)
    given_solver(config)  # before anything is written
    require_trackers(config.tracking)
    with place.claimed() as folder:
        saved = json.dumps(asdict(prompts), indent=1, ensure_ascii=False)
        run = RunDirectory.create(folder, to_yaml(config), {"prompts.json": saved, "origin.json": origin.text()})
        place.save()
        try:
            return _go_on(config, run, Standing(prompts, origin), place, observer)
        except EpdRayError:
            if not run.distilled.exists():  # without any result the directory would only be in the way of the next try
                run.clear()
            raise


def resume(where: str | Path, observer: Observer, accept: Collection[str] = ()) -> list[str]:
    """Continue the run at a path or URI from its newest checkpoint; a finished run's results are returned.

    Args:
        where: the path or URI.
        observer: sees the progress.
        accept: keys that may have another value than the run had so far.

    Returns and raises what `train` does.
    """
    place = place_of(where)
    place.require_run()
    with place.claimed() as folder:
        run, config = open_run(place, folder)
        return _continue(config, config, run, place, observer, accept)


def _again(config: RunConfig, place: Place, observer: Observer, accept: Collection[str]) -> list[str]:
    with place.claimed() as folder:
        run, written = open_run(place, folder)
        return _continue(config, written, run, place, observer, accept)


def _continue(
    config: RunConfig,
    written: RunConfig,
    run: RunDirectory,
    place: Place,
    observer: Observer,
    accept: Collection[str],
) -> list[str]:
    """Go on with a configuration, which config.yaml holds from now on in place of the one that is written there."""
    with reading(place, run.path):
        found = standing(place.name, run, config, accept, place.rollouts_elsewhere)
    if found.results is not None:
        observer.note(f"{place.name} is finished: these are its results")
        return found.results
    if other := changes(*(flat(c.model_dump(mode="json")) for c in (written, config))):
        observer.note(f"{place.name}: config.yaml follows what is given now ({'; '.join(map(str, other))})")
        write_text(run.config, to_yaml(config))
    write_text(run.origin, found.origin.text())
    run.stages.unlink(missing_ok=True)  # it would mark a finished run
    return _go_on(config, run, found, place, observer)


def _go_on(config: RunConfig, run: RunDirectory, found: Standing, place: Place, observer: Observer) -> list[str]:
    prompts = found.prompts
    start = given_solver(config) if found.checkpoint is None else None
    require_installed(config.evaluation.baselines)
    clock = StageClock()
    observer.stage("starting actors", 1)
    with ExitStack() as stack:
        stack.enter_context(named_when_full(run.path))
        sinks = stack.enter_context(trackers(config.tracking, run, config.model_dump(mode="json")))
        table = None if start is None else start.table
        algo = stack.enter_context(algorithm(config, prompts.train, table, prompts.rows))
        stack.enter_context(stop_signals())  # after Ray, which sets its own handler
        observer.advance()
        require_rivals(config.evaluation.baselines, algo.facts.form)
        clock.lap("starting actors")
        warn_of_long_prompts(algo, [*prompts.train, *prompts.validation, *prompts.test])
        monitor = stack.enter_context(Monitor(run.path.name))
        trainer = Trainer(config, run, prompts, found.origin, algo, observer, [monitor, *sinks], place.save)
        if found.checkpoint is None:
            trainer.begin(start)
        else:
            trainer.restore(found.checkpoint)
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
