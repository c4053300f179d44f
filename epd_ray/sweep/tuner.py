"""Running and resuming a sweep on Ray Tune, its table of results, and its best solver."""

import json
import logging
import os
import re
import shutil
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.tune import Callback, CheckpointConfig
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from epd_ray.actors.beforehand import panel_of
from epd_ray.actors.cluster import require_room
from epd_ray.actors.configured import run_session
from epd_ray.config.documents import dump_yaml
from epd_ray.config.loading import to_yaml
from epd_ray.errors import RunDirectoryError, TaskError
from epd_ray.prompts.splits import PromptSplits, load_prompts
from epd_ray.randomness import Purpose, plain_seed
from epd_ray.runs.saved import read_splits
from epd_ray.runs.stage_one import given_solver
from epd_ray.runs.trackers import require_trackers, tune_callbacks
from epd_ray.solvers import Solver
from epd_ray.storage.places import LocalPlace
from epd_ray.storage.run_directory import RunDirectory, write_text
from epd_ray.sweep.begun import begun_with, require_as_begun
from epd_ray.sweep.space import CONCURRENT, MUTABLE, Distribution, Plan, load_plan
from epd_ray.sweep.table import Result, Status, as_csv, as_lines, ranking
from epd_ray.sweep.trial import IMAGES, OBJECTIVE, PLAN, PROMPTS, SOLVER, SweepTrial
from epd_ray.telemetry.progress import Observer

PLAN_FILE, PROMPTS_FILE, TABLE, TRIALS, BEST = "sweep.yaml", "prompts.json", "results.csv", "trials", "best"
CHECKPOINTS = 3  # of a trial, because PBT may still read one that is not the newest
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 the old output prints nothing, and the new one still does
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in a configuration are relative to the working directory
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # seconds that a killed driver loses
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def sweep(plan: Plan, out: Path, observer: Observer, callbacks: Sequence[Callback] = ()) -> list[str]:
    """Run a sweep into a new directory.

    Args:
        plan: the run and the values to try.
        out: a directory that does not exist yet, or an empty one.
        observer: is told of the progress.
        callbacks: callbacks for Tune, beside those of the trackers that the plan asks for.

    Returns:
        Lines about the best trials, and the paths of table, solver and configuration.

    Raises:
        EpdRayError: something went wrong that the user can mend, such as that every trial failed.
        KeyboardInterrupt: a signal stopped the sweep, which can be resumed.
    """
    _require_new(out)
    prompts = load_prompts(plan.config.prompts, plan.config.seed, panel_of(plan.config))
    given_solver(plan.config)
    require_trackers(plan.config.tracking)
    with LocalPlace(out).claimed():
        create(out, plan, prompts)
        return _go_on(plan, prompts, out, observer, callbacks)


def resume(path: Path, observer: Observer, callbacks: Sequence[Callback] = ()) -> list[str]:
    """Go on with a sweep, its unfinished and failed trials from their checkpoints.

    Args:
        path: directory of the sweep.
        observer: as for `sweep`.
        callbacks: as for `sweep`.

    Returns:
        As `sweep` does.

    Raises:
        RunDirectoryError: the directory holds no sweep, its prompts cannot be read, or what decides has changed.
        EpdRayError: as for `sweep`.
        KeyboardInterrupt: as for `sweep`.
    """
    if not (path / PLAN_FILE).is_file():
        raise RunDirectoryError(f"{path} is no sweep: it has no {PLAN_FILE} (epd-ray sweep makes one)")
    prompts, plan = read_splits(path / PROMPTS_FILE), load_plan(path / PLAN_FILE)
    with LocalPlace(path).claimed():
        require_as_begun(path, plan, prompts)
        return _go_on(plan, prompts, path, observer, callbacks)


def _require_new(out: Path) -> None:
    if (out / PLAN_FILE).exists():
        raise RunDirectoryError(f"{out} holds another sweep: resume it, or name a new directory")
    LocalPlace(out).require_new()


def create(out: Path, plan: Plan, prompts: PromptSplits) -> None:
    """Write the files that a sweep is resumed from; files that a sweep killed at this point left are written again.

    Raises:
        RunDirectoryError: the directory holds something else already, or cannot be written.
    """
    _require_new(out)
    write_text(out / PROMPTS_FILE, json.dumps(asdict(prompts), indent=1, ensure_ascii=False))
    write_text(RunDirectory(out).origin, begun_with(plan, prompts).text())
    varied = plan.sweep.model_dump(mode="json", exclude_none=True)
    write_text(out / PLAN_FILE, to_yaml(plan.config) + dump_yaml({"sweep": varied}))  # last: its presence marks a sweep


def _go_on(
    plan: Plan, prompts: PromptSplits, path: Path, observer: Observer, callbacks: Sequence[Callback]
) -> list[str]:
    with _quiet(), run_session(plan.config, prompts.rows), _sigterm():
        observer.stage("starting actors", 1)
        bundles = SweepTrial.default_resource_request({PLAN: plan}).bundles
        require_room({"a trial": bundles}, plan.config.cluster.placement_timeout_s)
        observer.advance()
        progress = Progress(observer, plan.sweep.trials)
        trials = _tune(plan, prompts, path, [progress, *tune_callbacks(plan.config.tracking), *callbacks])
    if not trials:  # stopped before the first
        raise KeyboardInterrupt
    results = ranking([_result(trial, plan, path, progress.has_ended(trial)) for trial in trials])
    write_text(path / TABLE, as_csv(results))
    observer.done()
    if any(result.status == "unfinished" for result in results) or len(results) < plan.sweep.trials:
        raise KeyboardInterrupt
    best = results[0]
    if not best.ranked:
        raise TaskError(f"every trial failed (see {path / TABLE}), the first with: {best.error}")
    _take_home(plan, next(trial for trial in trials if str(trial) == best.trial), path)
    return [
        *as_lines(results),
        f"table: {path / TABLE}",
        f"solver: {path / BEST}",
        f"configuration: {path / BEST}.yaml",
    ]


def _tune(plan: Plan, prompts: PromptSplits, path: Path, callbacks: list[Callback]) -> list[Trial]:
    """Start or resume the experiment, with `tune.run`, because a restored Tuner takes no new callbacks."""
    varied = plan.sweep
    random_state = plain_seed(Purpose.SWEEP, plan.config.seed) % 2**32
    concurrent = 0 if varied.scheduler == "pbt" else varied.concurrent or CONCURRENT
    found = tune.run(
        SweepTrial,
        name=TRIALS,
        storage_path=str(path.resolve()),
        config={PLAN: plan, PROMPTS: vars(prompts), **{key: domain(of) for key, of in varied.space.items()}},
        num_samples=varied.trials,
        search_alg=BasicVariantGenerator(max_concurrent=concurrent, random_state=random_state),
        scheduler=scheduler(plan),
        metric=OBJECTIVE,
        mode="max",
        checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS, checkpoint_frequency=1, checkpoint_at_end=True),
        callbacks=callbacks,
        trial_name_creator=trial_name,
        trial_dirname_creator=trial_name,
        resume="AUTO+ERRORED" if list(path.glob(f"{TRIALS}/experiment_state-*.json")) else None,
        verbose=0,
        raise_on_failed_trial=False,
    )
    return list(found.trials)


def trial_name(trial: Trial) -> str:
    """Name of a trial, such as trial-00003."""
    return f"trial-{trial.trial_id.rpartition('_')[2]}"


def domain(values: Distribution) -> Any:
    """A distribution as Tune describes it."""
    if values.choice is not None:
        return tune.choice(values.choice)
    if values.integers is not None:
        low, high = values.integers
        return tune.randint(low, high + 1)
    if values.loguniform is not None:
        return tune.loguniform(*values.loguniform)
    return tune.uniform(*(values.uniform or ()))


def scheduler(plan: Plan) -> TrialScheduler:
    """The scheduler of the plan. It counts time in images, so that trials with larger groups draw no more of them."""
    share = max(1, round(plan.sweep.grace * plan.images))
    if plan.sweep.scheduler == "asha":
        return ASHAScheduler(
            time_attr=IMAGES, max_t=plan.images, grace_period=share, reduction_factor=plan.sweep.reduction
        )
    if plan.sweep.scheduler == "pbt":
        mutable = {key: of for key, of in plan.sweep.space.items() if key in MUTABLE}
        mutations = {key: of.choice if of.choice is not None else domain(of) for key, of in mutable.items()}
        ends = {key: (of.ends[0], of.ends[-1]) for key, of in mutable.items() if of.choice is None}
        return PopulationBasedTraining(
            time_attr=IMAGES,
            perturbation_interval=share,
            hyperparam_mutations=mutations,
            custom_explore_fn=partial(within, ends),
        )
    return FIFOScheduler()


def within(ends: dict[str, tuple[Any, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """Keep values in their ranges, since PBT multiplies them."""
    return {**config, **{key: min(max(config[key], low), high) for key, (low, high) in ends.items()}}


class Progress(Callback):  # type: ignore[misc]
    """Tells an observer how many trials have ended, and the best held-out reward.

    Args:
        observer: is told of the progress.
        total: number of trials.
    """

    def __init__(self, observer: Observer, total: int) -> None:
        self._observer, self._total, self._ended = observer, total, set[str]()
        self._stepped = False
        self._best: dict[str, float] = {}

    def setup(self, **info: Any) -> None:
        self._observer.stage("trials", self._total)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        ended = {str(trial) for trial in trials if trial.is_finished()}
        if len(ended) > len(self._ended):  # in a resumed sweep also trials that had ended before
            self._observer.advance(len(ended) - len(self._ended), **self._best)
        self._ended, self._stepped = ended, True

    def has_ended(self, trial: Trial) -> bool:
        """Whether a trial came to its end, which its status does not tell: Tune also terminates trials at Ctrl-C."""
        return bool(trial.is_finished()) and (not self._stepped or str(trial) in self._ended)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        best = max(result["held_out"]["best"], self._best.get("best", float("-inf")))
        running = sum(other.status == Trial.RUNNING for other in trials)
        self._best = {"best": best}
        self._observer.advance(0, running=running, **self._best)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._observer.note(f"{trial} failed: {_why(Path(trial.local_path))}")


def _result(trial: Trial, plan: Plan, path: Path, ended: bool) -> Result:
    values = {key: trial.config[key] for key in plan.sweep.space}
    last = trial.last_result or {}
    reward = last.get("held_out", {})
    complete = bool(reward) and last[IMAGES] >= _planned_images(plan, values)
    status: dict[str, Status] = {Trial.ERROR: "failed", Trial.TERMINATED: "finished" if complete else "stopped"}
    return Result(
        trial=str(trial),
        status=status[trial.status] if ended else "unfinished",
        values=values,
        images=last.get(IMAGES, 0),
        seconds=round(last.get("time_total_s", 0.0), 1),
        start=reward.get("start"),
        reward=reward.get("best"),
        low=reward.get("low"),
        high=reward.get("high"),
        error=_why(path / TRIALS / str(trial)) if trial.status == Trial.ERROR else "",
    )


def _planned_images(plan: Plan, values: dict[str, Any]) -> int:
    rdpo = plan.trial(values).rdpo
    return rdpo.iterations * rdpo.images_per_iteration


def _why(folder: Path) -> str:
    """The last line of a trial's error file, which says what went wrong."""
    found = folder / "error.txt"
    lines = found.read_text(errors="replace").split("\n") if found.is_file() else []
    said = [line.strip() for line in lines if line.strip()] or ["its process died"]
    return re.sub(r"^epd_ray\.errors\.\w+: ", "", said[-1])


def _take_home(plan: Plan, trial: Trial, path: Path) -> None:
    """Copy the best trial's solver, and write its configuration for a whole run."""
    checkpoint = trial.checkpoint
    assert checkpoint is not None  # there is one per evaluation
    shutil.rmtree(path / BEST, ignore_errors=True)
    Solver.from_pretrained(Path(checkpoint.path) / SOLVER).save_pretrained(path / BEST)
    values = {key: trial.config[key] for key in plan.sweep.space}
    write_text(path / f"{BEST}.yaml", to_yaml(plan.trial(values)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Tune, whose errors are in the table."""
    os.environ.update(QUIET)
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="ray.tune")
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _sigterm() -> Iterator[None]:
    """Treat SIGTERM, which a stopped job gets, as Ctrl-C, at which Tune saves and stops."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
