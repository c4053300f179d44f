"""A suite from a model to its results: on the rollout and reward actors, shard by shard, kept as they finish."""

import time
import uuid
from collections.abc import Iterable
from contextlib import ExitStack

from epd_ray.actors.cluster import ray_session, stop_signals
from epd_ray.actors.pipeline import Outcome
from epd_ray.config.loading import RunConfig
from epd_ray.errors import ConfigError, PromptError
from epd_ray.evaluation.comparison import save_pictures
from epd_ray.evaluation.suites.definition import require_fit
from epd_ray.evaluation.suites.directory import CACHE, LOCK, ResultsDirectory
from epd_ray.evaluation.suites.features import foresee_features, open_features
from epd_ray.evaluation.suites.jobs import Job, jobs
from epd_ray.evaluation.suites.measure import rows
from epd_ray.evaluation.suites.output import write_results
from epd_ray.evaluation.suites.pictures import Pictures
from epd_ray.evaluation.suites.settings import FID_PICTURES, Request
from epd_ray.evaluation.suites.solvers import (
    build_suite,
    foresee_suite,
    keep_solvers,
    or_published,
    sources_of,
    warn_of_misfits,
)
from epd_ray.evaluation.suites.subject import Subject
from epd_ray.prompts.files import read_prompts
from epd_ray.prompts.splits import SHAPES, load_prompts
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.session import algorithm
from epd_ray.runs.trainer import warn_of_long_prompts
from epd_ray.storage.lock import held
from epd_ray.storage.run_directory import named_when_full
from epd_ray.telemetry.progress import Observer
from epd_ray.telemetry.provenance import sign
from epd_ray.types import FeatureExtractor


def evaluate_suite(config: RunConfig, request: Request, observer: Observer) -> list[str]:
    """Measure a suite's samplers on a model, or what is missing in the results' directory, and write the results.

    Args:
        config: of a run: model, heads, cluster, seed.
        request: what is measured.
        observer: sees the progress.

    Returns:
        The tables and the headline, in lines.

    Raises:
        ConfigError: a model, table, solver or number of pictures that does not go with the suite.
        RunDirectoryError: a directory that holds something else.
        EpdRayError: something else that the user can mend.
        KeyboardInterrupt: stopped by a signal; what is finished stays.
    """
    results = ResultsDirectory(request.out)
    require_fit(request.suite, config.backbone)
    pictures = pictures_of(config, request)
    rivals, sources = config.evaluation.baselines, sources_of(request.solvers, results.solvers)
    foresee_suite(request, sources, rivals, config.backbone)
    spec = foresee_features(request, config, len(pictures))
    results.prepare()
    cluster = config.cluster.model_copy(update={"learner_actors": 0})
    with ExitStack() as stack:
        stack.enter_context(held(results.path / LOCK, str(results.path)))
        stack.enter_context(named_when_full(results.path))
        observer.stage("starting actors", 2)
        stack.enter_context(ray_session(cluster.address, cluster.env, cluster.dashboard))
        stack.enter_context(stop_signals())  # after Ray, which sets its own handler
        features = stack.enter_context(
            open_features(spec, request.reference, len(pictures), results.path / CACHE, cluster.placement_timeout_s)
        )
        observer.advance()
        local = config.model_copy(update={"cluster": cluster})
        algo = stack.enter_context(algorithm(local, list(pictures.prompts)))
        observer.advance()
        suite = build_suite(request, sources, rivals, algo.facts)
        subject = Subject(config, algo.facts, suite, pictures, _source(config, request))
        results.claim(subject.manifest(features.extractor))
        sources = or_published(sources, suite.table)
        warn_of_misfits(sources, algo.facts)
        warn_of_long_prompts(algo, pictures.prompts)
        keeper = Keeper(results, pictures, config.evaluation.pictures, features.extractor)
        keeper.do(algo, jobs(pictures, suite.samplers, scored=bool(config.rewards)), observer)
    lines = write_results(results, subject, features)
    with named_when_full(results.path):
        keep_solvers(sources, results.solvers)
    sign(results.path)
    observer.done()
    return lines


def pictures_of(config: RunConfig, request: Request) -> Pictures:
    """What is drawn for a request.

    Raises:
        PromptError: fewer prompts than are asked for, or a file that cannot be used.
        ConfigError: prompts that the suite cannot judge.
    """
    prompts = _prompts(config, request)
    seeds = noise_seeds(Purpose.TEST, config.seed, len(prompts) * request.images_per_prompt)
    found = Pictures(tuple(prompts), request.images_per_prompt, tuple(seeds), config.cluster.images_per_job)
    if request.suite == "embedded" and not found.judged:
        raise ConfigError(
            ["--suite embedded judges scenes, and some prompt is none of the embedded model's: leave out --prompts, or "
             "use --suite prompts FILE"]
        )  # fmt: skip
    return found


def _source(config: RunConfig, request: Request) -> str:
    """Where the prompts come from."""
    if request.suite == "paper-fid":
        return ""
    if request.prompts is not None:
        return request.prompts.name
    return SHAPES if request.suite == "embedded" else config.prompts.train


def _prompts(config: RunConfig, request: Request) -> list[str]:
    count = request.count
    if request.suite == "paper-fid":
        return [""] * (count or FID_PICTURES)
    if request.prompts is not None:
        found = read_prompts(request.prompts)
    else:
        source = {"train": SHAPES} if request.suite == "embedded" else {}
        wanted = {"test": count} if count is not None else {}
        found = load_prompts(config.prompts.model_copy(update={**source, **wanted}), config.seed).test
    if count is not None and count > len(found):
        raise PromptError(f"{count} prompts asked, {len(found)} there: lower --count or give more prompts")
    return found[:count]


class Keeper:
    """Has shards drawn and scored, and keeps each as it comes.

    Args:
        results: where they go.
        pictures: that are drawn.
        shown: of how many prompts the page shows pictures.
        extractor: of features, where they are asked for.
    """

    def __init__(
        self, results: ResultsDirectory, pictures: Pictures, shown: int, extractor: FeatureExtractor | None
    ) -> None:
        self._results, self._pictures, self._shown, self._extractor = results, pictures, shown, extractor
        self._session = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"

    def do(self, algo: RDPO, all_of_them: Iterable[Job], observer: Observer) -> None:
        """Do those that are not there yet, in their order as far as the actors keep it."""
        missing = {j.task.task_id: j for j in all_of_them if not self._results.has(j.sampler, j.shard)}
        observer.stage("evaluating", len(missing))
        begin, drawn = time.perf_counter(), 0
        for task, outcome in algo.stream(job.task for job in missing.values()):
            self._keep(missing[task.task_id], outcome)
            drawn += len(task.rollout_ids)
            observer.advance(1, images_per_s=drawn / (time.perf_counter() - begin))

    def _keep(self, job: Job, outcome: Outcome) -> None:
        """The pictures first: where the rows are, the shard counts as finished."""
        images, each = outcome.images, self._pictures.images_per_prompt
        assert images is not None
        for image, i in zip(images, self._pictures.shard(job.shard), strict=True):
            if i % each == 0 and i // each < self._shown:
                save_pictures(self._results.pictures / job.sampler, [image], i // each)
        found = rows(
            self._pictures, job.shard, images, outcome.scores, outcome.generate_seconds, self._session, self._extractor
        )
        self._results.add(job.sampler, job.shard, found)
