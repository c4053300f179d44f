"""Running a suite: the actors draw and score its pictures shard by shard, and each finished shard is kept."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from pydantic import JsonValue

from epd_ray.actors.cluster import stop_signals
from epd_ray.actors.configured import run_session
from epd_ray.actors.pipeline import Outcome
from epd_ray.actors.tasks import Task
from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.evaluation.comparison import save_pictures
from epd_ray.evaluation.suites.definition import require_fit
from epd_ray.evaluation.suites.directory import CACHE, LOCK, TUNED, ResultsDirectory
from epd_ray.evaluation.suites.features import foresee_features, open_features
from epd_ray.evaluation.suites.measure import rows
from epd_ray.evaluation.suites.output import write_results
from epd_ray.evaluation.suites.settings import Request
from epd_ray.evaluation.suites.solvers import (
    build_suite,
    foresee_suite,
    keep_solvers,
    or_published,
    runs_of,
    sources_of,
    warn_of_misfits,
)
from epd_ray.evaluation.suites.subject import Pictures, Subject, model_facts, pictures_of, source_of, validation_of
from epd_ray.evaluation.suites.tune import Kept, Tuning
from epd_ray.evaluation.tuning import Place, TunedPlace
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.session import algorithm, warn_of_long_prompts
from epd_ray.storage.lock import held
from epd_ray.storage.run_directory import named_when_full
from epd_ray.telemetry.progress import Observer
from epd_ray.telemetry.provenance import sign
from epd_ray.types import FeatureExtractor


def evaluate_suite(config: RunConfig, request: Request, observer: Observer) -> list[str]:
    """Draw and score the pictures of a suite that the results' directory lacks, and write the results.

    Args:
        config: a run's configuration, of which the model, the reward heads, the cluster and the seed count.
        request: which suite, with which solvers and prompts.
        observer: is told of the progress.

    Returns:
        The table and the headline, as lines for the terminal.

    Raises:
        ConfigError: the model, table, a solver or the number of pictures does not fit the suite.
        RunDirectoryError: the directory holds other things or other results.
        EpdRayError: something else is wrong that the user can mend.
        KeyboardInterrupt: a signal stopped the command; finished shards stay.
    """
    results = ResultsDirectory(request.out)
    require_fit(request.suite, config.backbone)
    pictures = pictures_of(config, request)
    held_out = validation_of(config, request, pictures)
    rivals, sources = config.evaluation.baselines, sources_of(request.solvers, results.solvers)
    foresee_suite(request, sources, rivals, config.backbone)
    spec = foresee_features(request, config, len(pictures))
    results.prepare()
    cluster = config.cluster.model_copy(update={"learner_actors": 0})
    with ExitStack() as stack:
        stack.enter_context(held(results.path / LOCK, str(results.path)))
        stack.enter_context(named_when_full(results.path))
        observer.stage("starting actors", 2)
        rows_of_all = {**({} if held_out is None else held_out.rows), **pictures.rows}
        stack.enter_context(run_session(config, rows_of_all))
        stack.enter_context(stop_signals())  # after Ray has set its own signal handler
        features = stack.enter_context(
            open_features(spec, request.reference, len(pictures), results.path / CACHE, cluster)
        )
        observer.advance()
        local = config.model_copy(update={"cluster": cluster})
        algo = stack.enter_context(algorithm(local, list(pictures.prompts), rows=rows_of_all))
        observer.advance()
        tune = _no_tuning if held_out is None else _tuning(config, algo, held_out.texts, results, observer)
        suite = build_suite(request, sources, rivals, algo.facts, tune)
        subject = Subject(config, algo.facts, suite, pictures, source_of(config, request))
        results.claim(subject.manifest(features.extractor))
        sources = or_published(sources, suite.table)
        warn_of_misfits(sources, algo.facts)
        warn_of_long_prompts(algo, pictures.prompts)
        keeper = Keeper(results, pictures, config.evaluation.pictures, features.extractor)
        keeper.do(algo, jobs(pictures, suite.samplers, scored=bool(config.rewards)), observer)
    lines = write_results(results, subject, features, runs_of(sources))
    with named_when_full(results.path):
        keep_solvers(sources, results.solvers)
    sign(results.path)
    observer.done()
    return lines


Tune = Callable[[Sequence[Place]], Sequence[TunedPlace]]


def _no_tuning(places: Sequence[Place]) -> Sequence[TunedPlace]:
    return ()


def _tuning(
    config: RunConfig,
    algo: RDPO,
    held_out: Sequence[str],
    results: ResultsDirectory,
    observer: Observer,
) -> Tune:
    """Tunes rivals, each once for a directory of results, so that an interrupted suite goes on with the same ones."""
    tuning = Tuning(config, algo, held_out, observer)
    settings: dict[str, JsonValue] = {
        "model": model_facts(config, algo.facts),
        "heads": {name: head.model_dump(mode="json") for name, head in config.rewards.items()},
        "prompts": list(held_out),
        "seed": config.seed,
        "images": config.evaluation.tune_images,
    }
    kept = Kept(results.path / TUNED, settings)
    return lambda places: tuning.tuned(places, kept.read(), kept.add)


@dataclass(frozen=True)
class Job:
    """The task of a rollout actor that draws and scores one shard of pictures with one sampler.

    Attributes:
        sampler: the sampler's key.
        shard: the shard's number.
        task: the task.
    """

    sampler: str
    shard: int
    task: Task


def jobs(pictures: Pictures, samplers: Sequence[Sampler], scored: bool) -> Iterator[Job]:
    """Make the jobs of a suite.

    The samplers take turns in each shard, so that whatever slows the machine for a while slows them all. Each shard
    begins with another sampler, because the first one also encodes the prompts.

    Args:
        pictures: the prompts and seeds, which are the same for all samplers.
        samplers: have distinct keys.
        scored: whether reward heads score the pictures.

    Yields:
        A job for each shard and sampler, shard by shard.
    """
    for shard in pictures.shards:
        turn = shard % len(samplers)
        for sampler in [*samplers[turn:], *samplers[:turn]]:
            yield Job(sampler.key, shard, _task(pictures, sampler, shard, scored))


def _task(pictures: Pictures, sampler: Sampler, shard: int, scored: bool) -> Task:
    members = pictures.shard(shard)
    prompts = tuple(pictures.prompts[pictures.prompt_of(i)] for i in members)
    seeds = tuple(pictures.seeds[i] for i in members)
    ids = tuple(f"{sampler.key}:{i}" for i in members)
    name = f"suite-{sampler.key}-{shard}"
    return Task(name, "sample", (sampler, prompts, seeds), prompts, ids, scored, keep_images=True)


class Keeper:
    """Runs jobs on the actors, and keeps the result of each as it comes.

    Args:
        results: the directory that the rows and pictures go to.
        pictures: the prompts and seeds of the suite.
        shown: the number of prompts whose first picture is kept for the page.
        extractor: computes features of each picture; None keeps none.
    """

    def __init__(
        self, results: ResultsDirectory, pictures: Pictures, shown: int, extractor: FeatureExtractor | None
    ) -> None:
        self._results, self._pictures, self._shown, self._extractor = results, pictures, shown, extractor
        self._session = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"

    def do(self, algo: RDPO, suite_jobs: Iterable[Job], observer: Observer) -> None:
        """Run the jobs whose results are missing; several actors may finish them in another order."""
        missing = {j.task.task_id: j for j in suite_jobs if not self._results.has(j.sampler, j.shard)}
        observer.stage("evaluating", len(missing))
        begin, drawn = time.perf_counter(), 0
        for task, outcome in algo.stream(job.task for job in missing.values()):
            self._keep(missing[task.task_id], outcome)
            drawn += len(task.rollout_ids)
            observer.advance(1, images_per_s=drawn / (time.perf_counter() - begin))

    def _keep(self, job: Job, outcome: Outcome) -> None:
        """Write the pictures before the rows, because a shard counts as finished as soon as its rows are there."""
        images, each = outcome.images, self._pictures.images_per_prompt
        assert images is not None
        for image, i in zip(images, self._pictures.shard(job.shard), strict=True):
            if i % each == 0 and i // each < self._shown:
                save_pictures(self._results.pictures / job.sampler, [image], i // each)
        found = rows(
            self._pictures, job.shard, images, outcome.scores, outcome.generate_seconds, self._session, self._extractor
        )
        self._results.add(job.sampler, job.shard, found)
