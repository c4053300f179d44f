"""The evaluations that the pictures of a rollout job take, recorded so that they can be counted and repeated."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epd_ray.bench.flops import tflop_per_eval
from epd_ray.drawing.worker import Generated, RolloutWorker
from epd_ray.policy.network import PolicyNetwork
from epd_ray.rdpo.batch import propose
from epd_ray.rdpo.config import RDPOConfig
from epd_ray.types import Backbone, Conditioning, RolloutJob


def jobs_of(config: RDPOConfig, prompts: Sequence[str], iteration: int) -> list[RolloutJob]:
    """The rollout jobs of an iteration, for the policy that training starts from.

    Args:
        config: configuration of the run.
        prompts: the training prompts.
        iteration: number of the iteration, from 0.
    """
    parameters = PolicyNetwork(config.policy_spec).parameters_array()
    batches = propose(config.batch_plan, prompts, iteration)
    return [RolloutJob((iteration, i), 0, parameters, batch) for i, batch in enumerate(batches)]


class Passes:
    """A backbone that records the arguments of its evaluations and decodings, and can repeat them.

    Args:
        backbone: the backbone that computes.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.family, self.model_id, self.form = backbone.family, backbone.model_id, backbone.form
        self.schedule, self.default_guidance, self.facts = backbone.schedule, backbone.default_guidance, backbone.facts
        self.classifier_free = backbone.classifier_free
        self.encode, self.truncated, self.sigmas = backbone.encode, backbone.truncated, backbone.sigmas
        self.noise, self.initial = backbone.noise, backbone.initial
        self.drifts: list[tuple[Tensor, Tensor, Conditioning]] = []
        self.latents: list[Tensor] = []

    def drift(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Backbone.drift, recorded."""
        self.drifts.append((x, sigma, conditioning))
        return self._backbone.drift(x, sigma, conditioning)

    def decode(self, x: Tensor) -> Tensor:
        """Backbone.decode, recorded."""
        self.latents.append(x)
        return self._backbone.decode(x)

    @torch.inference_mode()
    def run_network(self) -> None:
        """Repeat all recorded evaluations."""
        for x, sigma, conditioning in self.drifts:
            self._backbone.drift(x, sigma, conditioning)

    @torch.inference_mode()
    def run_decoder(self) -> None:
        """Repeat all recorded decodings."""
        for x in self.latents:
            self._backbone.decode(x)


class RecordedJobs:
    """Jobs that a worker has generated once while its evaluations were recorded.

    Args:
        worker: a worker as a rollout actor has it.
        jobs: the jobs, at least one.

    Attributes:
        passes: the recorded evaluations and decodings of all jobs.
        generated: what the worker answered to each job.
        tflop: 10^12 operations of the network in all recorded evaluations.
    """

    def __init__(self, worker: RolloutWorker, jobs: Sequence[RolloutJob]) -> None:
        self.passes = Passes(worker.backbone)
        recording = RolloutWorker(self.passes, worker.guidance_scale, worker.space, worker.sampler)
        self.generated: list[Generated] = [recording.generate(job) for job in jobs]
        evaluations = sum(len(x) for x, _, _ in self.passes.drifts)
        self.tflop = evaluations * tflop_per_eval(worker.backbone, worker.guidance_scale)
