"""Images per second of one rollout actor, where they go, and what the networks alone would give."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from epd_ray.backbones.pipeline import PipelineBackbone
from epd_ray.bench.flops import speed, tflop_per_eval
from epd_ray.bench.models import EMBEDDED, Subject, prompts
from epd_ray.bench.random_models import Size
from epd_ray.bench.timing import interleaved, medians
from epd_ray.config.loading import load_config
from epd_ray.drawing.worker import RolloutWorker
from epd_ray.policy.network import PolicyNetwork
from epd_ray.rdpo.batch import propose
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.rdpo.session import algorithm, rdpo_config
from epd_ray.rewards import HEADS
from epd_ray.rewards.scoring import Scorer
from epd_ray.types import Backbone, Conditioning, RolloutJob

Record = dict[str, float | int | str | bool | None]


def throughput(
    model: str = EMBEDDED,
    size: Size | None = None,
    compile: bool = False,
    intervals: int | None = None,
    batch: int = 8,
    repeats: int | None = None,
    resolution: int | None = None,
) -> Record:
    """Images/s of generating, as a share of the bare forward passes in the same run; FLOP/s; seconds per stage.

    The bare passes are the calls of network and decoder that a job's pictures took, made again on the same tensors:
    no tables, no solver, no checks, no Ray. `worker_of_bare` is RolloutWorker.generate in this process;
    `actor_of_bare` a rollout actor under the pipeline, with another copy of the model. One torch thread on a CPU, as in
    an actor. `tflops` are the network's operations over the time without decoding. `stages/encode_s` is one prompt's,
    once a run; `stages/rest_s` what is left of `generate`; the other stages are of a job.

    Args:
        model: one of MODELS.
        size: see Subject.
        compile: see Subject.
        intervals: N; None: the default run's.
        batch: images per job.
        repeats: odd, at least 3; None: 9, of a full model 3.
        resolution: see Subject.
    """
    subject, chosen = Subject(model, size, resolution, compile=compile), prompts(2 * batch)
    jobs, repeats = (1, repeats or 3) if subject.full else (4, repeats or 9)  # that an actor works off at a time
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
        seconds = {name: statistics.median(values) / jobs for name, values in actor.items()}
    shares = [bare / ours for ours, bare in zip(actor["actor"], actor["bare"], strict=True)]
    return {
        **subject.facts,
        "batch": batch,
        "intervals": own.table.intervals,
        "points": own.table.points,
        "resolution": work.resolution,
        "images_per_s": batch / stages["generate"],
        "actor_images_per_s": batch / seconds["actor"],
        "bare_images_per_s": batch / stages["bare"],
        "worker_of_bare": stages["bare"] / stages["generate"],
        "actor_of_bare": statistics.median(shares),
        "interval_s": (stages["generate"] - stages["decode"]) / own.table.intervals,
        "tflop_per_image": work.tflop / batch,
        **speed(work.tflop / (stages["generate"] - stages["decode"]), str(subject.facts["device"])),
        **{f"stages/{name}_s": value for name, value in stages.items()},
        "stages/rest_s": stages["generate"] - stages["network"] - stages["decode"],
    }


def _overrides(subject: Subject, intervals: int | None, batch: int, jobs: int) -> list[str]:
    """One actor, and an iteration of so many jobs, at least two."""
    return [
        *subject.overrides,
        *([] if intervals is None else [f"solver.intervals={intervals}"]),
        f"cluster.images_per_job={batch}",
        f"rdpo.prompts_per_iteration={batch}",
        f"rdpo.group_size={max(2, jobs)}",
        "rdpo.minibatch=1",
        "cluster.rollout_actors=1",
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in an actor on a CPU."""
    before = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Work:
    """An iteration's jobs, and the passes through the networks that the first of them takes.

    Args:
        config: of the run.
        chosen: prompts.
        worker: what a rollout actor has.
        count: of jobs.

    Attributes:
        jobs: so many.
        resolution: of the pictures.
        tflop: 10^12 operations of the network in the first.
    """

    def __init__(self, config: RDPOConfig, chosen: Sequence[str], worker: RolloutWorker, count: int) -> None:
        self._worker = worker
        parameters = PolicyNetwork(config.policy_spec).parameters_array()
        batches = propose(config.batch_plan, chosen, 0)[:count]
        self.jobs = [RolloutJob((0, i), 0, parameters, batch) for i, batch in enumerate(batches)]
        self._passes = Passes(worker.backbone)
        watched = RolloutWorker(self._passes, worker.guidance_scale, worker.space, worker.sampler)
        self._images = watched.generate(self.jobs[0]).images
        self.resolution = self._images.shape[-1]
        self.tflop = self._passes.rows * tflop_per_eval(worker.backbone, worker.guidance_scale)
        name, reward = next(iter(config.reward_specs.items()))
        self._scorer = Scorer(name, HEADS.build(reward.head, reward.options))

    def stages(self) -> dict[str, Callable[[], object]]:
        """What one job goes through, and the whole of it."""
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
        """As if for the first time."""
        if isinstance(self._worker.backbone, PipelineBackbone):
            self._worker.backbone.embeddings.clear()
        self._worker.backbone.encode(prompts, self._worker.guidance_scale)

    def bare(self, times: int = 1) -> None:
        """The forward passes of one job, so many times."""
        for _ in range(times):
            self._passes.run_network()
            self._passes.run_decoder()


class Passes:
    """A backbone that keeps what its networks are called with, to call them so again.

    Args:
        backbone: any.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.family, self.model_id, self.form = backbone.family, backbone.model_id, backbone.form
        self.schedule, self.default_guidance, self.facts = backbone.schedule, backbone.default_guidance, backbone.facts
        self.encode, self.truncated, self.sigmas = backbone.encode, backbone.truncated, backbone.sigmas
        self.noise, self.initial = backbone.noise, backbone.initial
        self.drifts: list[tuple[Tensor, Tensor, Conditioning]] = []
        self.latents: list[Tensor] = []

    def drift(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See Backbone.drift."""
        self.drifts.append((x, sigma, conditioning))
        return self._backbone.drift(x, sigma, conditioning)

    def decode(self, x: Tensor) -> Tensor:
        """See Backbone.decode."""
        self.latents.append(x)
        return self._backbone.decode(x)

    @property
    def rows(self) -> int:
        """Evaluations for one picture, of all drifts together."""
        return sum(len(x) for x, _, _ in self.drifts)

    @torch.inference_mode()
    def run_network(self) -> None:
        """The same drifts again."""
        for x, sigma, conditioning in self.drifts:
            self._backbone.drift(x, sigma, conditioning)

    @torch.inference_mode()
    def run_decoder(self) -> None:
        """The same pictures again."""
        for x in self.latents:
            self._backbone.decode(x)
