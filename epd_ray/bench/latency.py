"""What a picture waits for: every solver at the same parallel NFE, against Euler in the same run."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from epd_ray.backbones.conditioning import TextConditioning
from epd_ray.backbones.pipeline import PipelineBackbone
from epd_ray.bench.flops import speed, tflop_per_eval
from epd_ray.bench.models import EMBEDDED, Subject, prompts
from epd_ray.bench.plain_loop import one_after_another
from epd_ray.bench.random_models import Size
from epd_ray.bench.timing import medians
from epd_ray.deploy.parallelize import parallelize, restore
from epd_ray.drawing.sampler import baseline
from epd_ray.errors import ConfigError
from epd_ray.randomness import torch_generator
from epd_ray.rdpo.config import uniform_table
from epd_ray.solvers import Solver, epd, zoo
from epd_ray.solvers.conditioned import conditioned_drift, noises
from epd_ray.types import Backbone, Conditioning

EULER = "euler"
POINTS = (2, 3)
Record = dict[str, float | int | str | bool | None]
Ways = Mapping[str, Callable[[], object]]


def latency(
    model: str = EMBEDDED,
    size: Size | None = None,
    compile: bool = False,
    parallel_nfe: int = 8,
    batch: int = 1,
    repeats: int = 5,
    resolution: int | None = None,
) -> Record:
    """Median seconds from noise to latents of every solver that can have one parallel NFE, and their ratio to Euler's.

    EPD runs with evenly spaced points, K = 2 and 3, those of an interval in one batch and one after another: what a
    table holds costs nothing. `pipeline/...` is the diffusers pipeline, with its own scheduler (Euler) and with
    `parallelize`, on one device and, where there are several GPUs, with the points spread over two of them.
    `tflops` are the network's operations over a solver's time, `of_peak` their share of what the card can do.

    Args:
        model: one of MODELS.
        size: see Subject.
        compile: see Subject.
        parallel_nfe: even.
        batch: pictures drawn together.
        repeats: odd, at least 3.
        resolution: see Subject.

    Raises:
        ConfigError: an odd parallel NFE.
    """
    if parallel_nfe < 2 or parallel_nfe % 2:
        raise ConfigError([f"parallel_nfe is {parallel_nfe}, EPD has 2 an interval: give an even number"])
    subject = Subject(model, size, resolution, compile=compile)
    backbone, guidance = subject.open()
    devices = [["cuda:0", "cuda:1"]] if torch.cuda.is_available() and torch.cuda.device_count() > 1 else []
    record: Record = {**subject.facts, "parallel_nfe": parallel_nfe, "guidance_scale": guidance, "batch": batch}
    conditioning = backbone.encode(prompts(batch), guidance)
    noise = noises(backbone, range(batch))
    with torch.inference_mode():
        ways, evals = _solvers(backbone, conditioning, noise, parallel_nfe)
        seconds = medians(ways, repeats)
        record |= _ratios("solver", seconds)
        if isinstance(backbone, PipelineBackbone) and isinstance(conditioning, TextConditioning):
            record |= _pipelines("pipeline", backbone, conditioning, parallel_nfe, devices, repeats)
    tflop = batch * tflop_per_eval(backbone, guidance)
    for name, count in evals.items():
        reached = speed(count * tflop / seconds[name], str(subject.facts["device"]))
        record |= {f"solver/{name}/{figure}": value for figure, value in reached.items()}
    return record


def _ratios(prefix: str, seconds: Mapping[str, float]) -> Record:
    return {
        key: value
        for name, taken in seconds.items()
        for key, value in (
            (f"{prefix}/{name}/s", taken),
            (f"{prefix}/{name}/vs_euler", taken / seconds[EULER]),
        )
    }


def _solvers(
    backbone: Backbone, conditioning: Conditioning, noise: Tensor, parallel_nfe: int
) -> tuple[Ways, dict[str, int]]:
    """The ways, and the evaluations that each takes for a picture."""
    possible = [
        name
        for name in zoo.applicable(backbone.form)
        if (method := zoo.find(name)).parallel_nfe(method.intervals(parallel_nfe)) == parallel_nfe
    ]
    samplers = {name: baseline(name, parallel_nfe) for name in possible}
    ways: dict[str, Callable[[], object]] = {
        name: partial(sampler.run, backbone, conditioning, noise) for name, sampler in samplers.items()
    }
    evals = {name: sampler.model_evals for name, sampler in samplers.items()}
    drift = conditioned_drift(backbone, conditioning)
    x, sigmas = backbone.initial(noise), backbone.sigmas(parallel_nfe // 2)
    for points in POINTS:
        table = uniform_table(parallel_nfe // 2, points)
        together, apart = f"epd K={points}", f"epd K={points}, one after another"
        ways[together] = partial(epd, drift, x, sigmas, table)
        ways[apart] = partial(epd, one_after_another(drift, len(x)), x, sigmas, table)
        evals[together] = evals[apart] = table.evaluations(afs=False)
    return ways, evals


def _pipelines(
    prefix: str,
    backbone: PipelineBackbone,
    conditioning: TextConditioning,
    parallel_nfe: int,
    devices: Sequence[Sequence[str]],
    repeats: int,
) -> Record:
    """With one device, then with each list of `devices` that share the points."""
    pipe, intervals = backbone.pipeline, parallel_nfe // 2
    solver = Solver(uniform_table(intervals, 2), backbone.sigmas(intervals), backbone.form)
    arguments = _arguments(conditioning, backbone.resolution)
    found: Record = {}
    for used in (None, *devices):
        euler = pipe.scheduler
        parallelize(pipe, solver, used)
        ways = {
            EULER: partial(_call, pipe, euler, parallel_nfe, arguments),
            "epd K=2": partial(_call, pipe, pipe.scheduler, intervals, arguments),
        }
        try:
            name = prefix if used is None else f"{prefix}, {len(used)} devices"
            found |= _ratios(name, medians(ways, repeats))
        finally:
            pipe.scheduler = euler
            restore(pipe)
    return found


def _call(pipe: Any, scheduler: Any, steps: int, arguments: Mapping[str, Any]) -> None:
    pipe.scheduler = scheduler
    pipe(num_inference_steps=steps, generator=torch_generator(0), **arguments)


def _arguments(conditioning: TextConditioning, resolution: int) -> dict[str, Any]:
    """What a pipeline is called with, its prompts encoded already."""
    found: dict[str, Any] = {"height": resolution, "width": resolution, "output_type": "latent"}
    for name, tensor in zip(("prompt_embeds", "pooled_prompt_embeds"), conditioning.tensors, strict=False):
        if conditioning.guided:
            found[f"negative_{name}"], found[name] = tensor.chunk(2)
        else:
            found[name] = tensor
    return {**found, "guidance_scale": conditioning.guidance_scale}
