"""Pictures per second of one rollout actor, where its time goes, and how fast the networks alone would be."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from epd_ray.backbones.pipeline import PipelineBackbone
from epd_ray.bench.flops import speed
from epd_ray.bench.models import DEFAULT_SUBJECT, Subject, prompts, scorers
from epd_ray.bench.passes import RecordedJobs, jobs_of
from epd_ray.bench.record import Record, Value, under
from epd_ray.bench.settings import DEFAULTS
from epd_ray.bench.timing import interleaved, medians
from epd_ray.config.loading import load_config
from epd_ray.drawing.worker import RolloutWorker
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.rdpo.session import algorithm, rdpo_config


def throughput(
    subject: Subject = DEFAULT_SUBJECT,
    intervals: int = DEFAULTS.solver.intervals,
    batch: int = DEFAULTS.cluster.images_per_job,
    repeats: int | None = None,
) -> Record:
    """Pictures per second of drawing, as a share of the bare forward passes in the same run.

    The bare passes repeat the calls of network and decoder that the pictures of a job took, on the same tensors,
    without tables, solver, checks or Ray. `worker_of_bare` compares them with RolloutWorker.generate in this process,
    and `actor_of_bare` with a rollout actor in the pipeline, which has its own copy of the model. On a CPU torch has
    one thread, as in an actor. `tflops` is the network's speed without the time of decoding. The row `stages` has the
    median seconds of a job; only `encode_s` is of one prompt, which a run encodes once, and `rest_s` is `generate_s`
    without network and decoder.

    Args:
        subject: the model.
        intervals: N.
        batch: number of pictures of a job.
        repeats: number of counted rounds, odd and at least 3; None means 9, or 3 with a full model.
    """
    jobs, repeats = (1, repeats or 3) if subject.full else (4, repeats or 9)  # jobs that an actor draws in a round
    chosen = prompts(2 * batch)
    config = load_config(None, _overrides(subject, intervals, batch, jobs))
    own = rdpo_config(config, chosen)
    with _one_thread(), algorithm(config, chosen) as algo:
        work = _Work(own, chosen, own.worker_spec.build(), jobs)
        stages = medians(work.stages(), repeats)
        actor = interleaved(
            {
                "actor": lambda: algo.work("generate", [(job,) for job in work.jobs]),
                "bare": lambda: work.bare(jobs),
            },
            repeats,
        )
    shares = [bare / ours for ours, bare in zip(actor["actor"], actor["bare"], strict=True)]
    network = stages["generate"] - stages["decode"]
    values: dict[str, Value] = {
        "images_per_s": batch / stages["generate"],
        "actor_images_per_s": batch * jobs / median(actor["actor"]),
        "bare_images_per_s": batch / stages["bare"],
        "worker_of_bare": stages["bare"] / stages["generate"],
        "actor_of_bare": median(shares),
        "interval_s": network / intervals,
        "tflop_per_image": work.tflop / batch,
        **speed(work.tflop / network),
        **under("stages", {f"{name}_s": value for name, value in stages.items()}),
        "stages/rest_s": network - stages["network"],
    }
    shape = {"batch": batch, "intervals": intervals, "points": own.table.points, "resolution": work.resolution}
    return Record("throughput", {**subject.facts, **shape}, values)


def _overrides(subject: Subject, intervals: int, batch: int, jobs: int) -> list[str]:
    """A run with one rollout actor, whose iterations have this many jobs, but at least two."""
    return [
        *subject.overrides,
        f"solver.intervals={intervals}",
        f"cluster.images_per_job={batch}",
        f"rdpo.prompts_per_iteration={batch}",
        f"rdpo.group_size={max(2, jobs)}",
        "rdpo.minibatch_size=1",
        "cluster.rollout_actors=1",
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread on a CPU, as an actor has."""
    before = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Work:
    """The jobs of an iteration, and the recorded evaluations of the first of them.

    Args:
        config: configuration of the run.
        chosen: the training prompts.
        worker: a worker as a rollout actor has it.
        count: number of jobs.

    Attributes:
        jobs: the jobs.
        resolution: pixels per side of the pictures.
        tflop: 10^12 operations of the network in the first job.
    """

    def __init__(self, config: RDPOConfig, chosen: Sequence[str], worker: RolloutWorker, count: int) -> None:
        self._worker = worker
        self.jobs = jobs_of(config, chosen, 0)[:count]
        recorded = RecordedJobs(worker, self.jobs[:1])
        self._passes, self.tflop = recorded.passes, recorded.tflop
        self._images = recorded.generated[0].images
        self.resolution = self._images.shape[-1]
        self._scorer = scorers(config.reward_specs)[0]

    def stages(self) -> dict[str, Callable[[], object]]:
        """The stages of the first job, the whole of it as a worker generates it, and its bare passes."""
        requests = self.jobs[0].requests
        texts, ids = [r.prompt for r in requests], [r.rollout_id for r in requests]
        return {
            "encode": lambda: self._encode(texts[:1]),
            "network": self._passes.run_network,
            "decode": self._passes.run_decoder,
            "score": lambda: self._scorer.score(self._images, texts, ids),
            "generate": lambda: self._worker.generate(self.jobs[0]),
            "bare": self.bare,
        }

    def _encode(self, prompts: Sequence[str]) -> None:
        """Encode prompts as if the model had not seen them before."""
        if isinstance(self._worker.backbone, PipelineBackbone):
            self._worker.backbone.embeddings.clear()
        self._worker.backbone.encode(prompts, self._worker.guidance_scale)

    def bare(self, times: int = 1) -> None:
        """Repeat the forward passes of the first job this many times."""
        for _ in range(times):
            self._passes.run_network()
            self._passes.run_decoder()
