"""The time from noise to latents of one batch: every solver at the same parallel NFE, relative to Euler."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epd_ray.backbones.conditioning import TextConditioning
from epd_ray.backbones.pipeline import PipelineBackbone
from epd_ray.bench.flops import speed, tflop_per_eval
from epd_ray.bench.models import DEFAULT_SUBJECT, Subject, prompts
from epd_ray.bench.plain_loop import one_after_another
from epd_ray.bench.record import Record, Value, under
from epd_ray.bench.timing import medians
from epd_ray.deploy.parallelize import parallelize, restore
from epd_ray.drawing.sampler import baseline
from epd_ray.errors import ConfigError
from epd_ray.randomness import torch_generator
from epd_ray.solvers import Solver, zoo
from epd_ray.solvers.conditioned import ConditionedDrift, noises
from epd_ray.solvers.costs import Cost
from epd_ray.solvers.epd import epd
from epd_ray.solvers.table import uniform_table
from epd_ray.types import Backbone, Conditioning

EULER = "euler"
POINTS = (2, 3)
Ways = Mapping[str, Callable[[], object]]


def latency(
    subject: Subject = DEFAULT_SUBJECT,
    parallel_nfe: int = 8,
    batch: int = 1,
    repeats: int = 5,
) -> Record:
    """Median seconds from noise to latents, in turns, of every solver that can have this parallel NFE.

    EPD runs with evenly spaced points, K = 2 and K = 3, because the numbers in a table do not change its time; the
    points of an interval are evaluated in one batch and one after another. The rows `pipeline` are a random model's
    diffusers pipeline, with its own Euler scheduler and with `parallelize`; where there are two GPUs the points are
    also spread over both. Beside each solver stand its parallel NFE, evaluations and network passes. `vs_euler` is a
    solver's time over Euler's, and `tflops` the network's speed in it.

    Args:
        subject: the model.
        parallel_nfe: an even number, at least 2.
        batch: number of pictures that are drawn together.
        repeats: number of counted rounds, odd and at least 3.

    Raises:
        ConfigError: the parallel NFE is odd or below 2.
    """
    if parallel_nfe < 2 or parallel_nfe % 2:
        raise ConfigError([f"parallel_nfe is {parallel_nfe}, EPD has 2 an interval: give an even number"])
    backbone, guidance = subject.open()
    devices = [["cuda:0", "cuda:1"]] if torch.cuda.is_available() and torch.cuda.device_count() > 1 else []
    values: dict[str, Value] = {}
    conditioning = backbone.encode(prompts(batch), guidance)
    noise = noises(backbone, range(batch))
    with torch.inference_mode():
        ways, costs = _solvers(backbone, conditioning, noise, parallel_nfe)
        seconds = medians(ways, repeats)
        values |= _ratios("solver", seconds)
        if isinstance(backbone, PipelineBackbone) and isinstance(conditioning, TextConditioning):
            values |= _pipelines(backbone, conditioning, parallel_nfe, devices, repeats)
    tflop = batch * tflop_per_eval(backbone, guidance)
    for name, cost in costs.items():
        passes = cost.network_passes(guidance, backbone.classifier_free)
        values |= under(f"solver/{name}", asdict(cost) | {"network_passes": passes})
        values |= under(f"solver/{name}", speed(cost.model_evals * tflop / seconds[name]))
    settings = {**subject.facts, "parallel_nfe": parallel_nfe, "guidance_scale": guidance, "batch": batch}
    return Record("latency", settings, values)


def _ratios(kind: str, seconds: Mapping[str, float]) -> dict[str, Value]:
    values: dict[str, Value] = {}
    for name, taken in seconds.items():
        values |= under(f"{kind}/{name}", {"s": taken, "vs_euler": taken / seconds[EULER]})
    return values


def _solvers(
    backbone: Backbone, conditioning: Conditioning, noise: Tensor, parallel_nfe: int
) -> tuple[Ways, dict[str, Cost]]:
    """A call for each solver, and what it costs for a picture."""
    possible = [
        name
        for name in zoo.applicable(backbone.form)
        if (method := zoo.find(name)).parallel_nfe(method.intervals(parallel_nfe)) == parallel_nfe
    ]
    samplers = {name: baseline(name, parallel_nfe) for name in possible}
    ways: dict[str, Callable[[], object]] = {
        name: partial(sampler.run, backbone, conditioning, noise) for name, sampler in samplers.items()
    }
    costs = {name: sampler.cost for name, sampler in samplers.items()}
    drift = ConditionedDrift(backbone, conditioning)
    x, sigmas = backbone.initial(noise), backbone.sigmas(parallel_nfe // 2)
    for points in POINTS:
        table = uniform_table(parallel_nfe // 2, points)
        together, apart = f"epd K={points}", f"epd K={points}, one after another"
        ways[together] = partial(epd, drift, x, sigmas, table)
        ways[apart] = partial(epd, one_after_another(drift, len(x)), x, sigmas, table)
        costs[together] = costs[apart] = table.cost()
    return ways, costs


def _pipelines(
    backbone: PipelineBackbone,
    conditioning: TextConditioning,
    parallel_nfe: int,
    devices: Sequence[Sequence[str]],
    repeats: int,
) -> dict[str, Value]:
    """The diffusers pipeline on one device, then with the points shared by each of these lists of devices."""
    pipe, intervals = backbone.pipeline, parallel_nfe // 2
    solver = Solver(uniform_table(intervals, 2), backbone.sigmas(intervals), backbone.form)
    arguments = _arguments(conditioning, backbone.resolution)
    values: dict[str, Value] = {}
    for used in (None, *devices):
        euler = pipe.scheduler
        parallelize(pipe, solver, used)
        ways = {
            EULER: partial(_call, pipe, euler, parallel_nfe, arguments),
            "epd K=2": partial(_call, pipe, pipe.scheduler, intervals, arguments),
        }
        try:
            name = "pipeline" if used is None else f"pipeline, {len(used)} devices"
            values |= _ratios(name, medians(ways, repeats))
        finally:
            pipe.scheduler = euler
            restore(pipe)
    return values


def _call(pipe: Any, scheduler: Any, steps: int, arguments: Mapping[str, Any]) -> None:
    pipe.scheduler = scheduler
    pipe(num_inference_steps=steps, generator=torch_generator(0), **arguments)


def _arguments(conditioning: TextConditioning, resolution: int) -> dict[str, Any]:
    """The arguments of a pipeline's call, with prompts that are encoded already."""
    found: dict[str, Any] = {"height": resolution, "width": resolution, "output_type": "latent"}
    for name, tensor in zip(("prompt_embeds", "pooled_prompt_embeds"), conditioning.tensors, strict=False):
        if conditioning.guided:
            found[f"negative_{name}"], found[name] = tensor.chunk(2)
        else:
            found[name] = tensor
    return {**found, "guidance_scale": conditioning.guidance_scale}
