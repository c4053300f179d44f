"""The guidance of each interval in pipelines whose guidance is a component, against a loop that is typed here."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from PIL import Image
from torch import Tensor

from epd_ray.deploy.parallelize import guide, restore
from epd_ray.deploy.scheduler import EPDScheduler
from epd_ray.errors import ModelError, TableError
from epd_ray.solvers import Solver, SolverTable
from tests.families import PROMPTS, Calls
from tests.tiny_models import TOKENS
from tests.tiny_pipelines import hunyuan_image, z_image

SIGMAS = [1.0, 0.8, 0.5, 0.3, 0.1]
SCALES, REUSE = [5.0, 3.0, 1.0, 6.0], [False, True, False, True]
POSITION, WEIGHTS = 0.6, (0.3, 0.7)  # of the second point; the first is the start
META = {"scheduler": {"prediction_type": "flow_prediction", "num_train_timesteps": 1000}}


def hunyuan() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hunyuan_image()


def modular() -> Any:
    from diffusers.modular_pipelines import ZImageAutoBlocks

    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = z_image().components
    pipe = ZImageAutoBlocks().init_pipeline()
    pipe.update_components(**parts, guider=ClassifierFreeGuidance(guidance_scale=5.0))
    return pipe


MAKERS: dict[str, Callable[[], Any]] = {"hunyuan": hunyuan, "modular": modular}


@cache
def made(name: str) -> Any:
    pipe = MAKERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=MAKERS)
def pipe(request: pytest.FixtureRequest) -> Any:
    whole = made(request.param)
    whole.guider = ClassifierFreeGuidance(guidance_scale=4.0)
    yield whole
    restore(whole)


def solver(points: int = 2, sigmas: list[float] = SIGMAS, **parts: Any) -> Solver:
    n = len(sigmas) - 1
    r, w = ([0.0, POSITION], [*WEIGHTS]) if points == 2 else ([0.0], [1.0])
    table = SolverTable.from_lists({"positions": [r] * n, "weights": [w] * n, **parts})
    return Solver(table, torch.tensor(sigmas, dtype=torch.float64), "flow", meta=META)


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def call(pipe: Any, latents: Tensor, **options: Any) -> Tensor:
    given: dict[str, Any] = {
        "prompt": PROMPTS, "num_inference_steps": 4, "height": 16, "width": 16, "latents": latents.clone(), **options,
    }  # fmt: skip
    if hasattr(pipe, "blocks"):
        found: Tensor = pipe(output="latents", max_sequence_length=TOKENS, **given)
        return found
    return pipe(output_type="latent", **given).images


def at_scale(pipe: Any, x: Tensor, sigma: float, scale: float) -> Tensor:
    """The drift at a scale of the pipeline's own guider, read from one Euler step."""
    former = pipe.guider, pipe.scheduler
    pipe.guider = ClassifierFreeGuidance(guidance_scale=scale)
    pipe.scheduler = EPDScheduler.from_solver(solver(1, [sigma, sigma / 2]))
    drift = (call(pipe, x) - x) / (-sigma / 2)
    pipe.guider, pipe.scheduler = former
    return drift


def test_each_interval_has_its_scale_and_reuses_what_it_knows(pipe: Any) -> None:
    x = noise()
    former = pipe.scheduler
    effect = torch.zeros_like(x)

    def drift(x: Tensor, sigma: float, i: int) -> Tensor:
        nonlocal effect
        text = at_scale(pipe, x, sigma, 1.0)
        if not REUSE[i]:
            if SCALES[i] <= 1:
                return text
            effect = at_scale(pipe, x, sigma, 2.0) - text
        return text + (SCALES[i] - 1) * effect

    expected = x
    for i in range(4):
        a, b = SIGMAS[i : i + 2]
        first = drift(expected, a, i)
        s = b**POSITION * a ** (1 - POSITION)
        second = drift(expected + (s - a) * first, s, i)
        expected = expected + (b - a) * (WEIGHTS[0] * first + WEIGHTS[1] * second)
    guide(pipe, solver(guidance=SCALES, reuse=REUSE))
    with Calls(pipe.transformer) as watched:
        found = call(pipe, x)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4
    assert len(watched.batches) == 2 * (2 + 1 + 1 + 1)  # passes of each evaluation
    assert torch.equal(call(pipe, x), found)  # nothing is left of the call before
    own = restore(pipe).guider
    assert pipe.scheduler is former and type(own) is ClassifierFreeGuidance and own.guidance_scale == 4.0


def test_a_table_that_only_reuses_keeps_the_guiders_scale(pipe: Any) -> None:
    x = noise()
    found = call(guide(pipe, solver(reuse=REUSE)), x)
    told = call(guide(restore(pipe), solver(reuse=REUSE, guidance=[4.0] * 4)), x)
    assert torch.allclose(found, told, rtol=1e-4, atol=1e-5)
    plain = restore(pipe)
    plain.scheduler = EPDScheduler.from_solver(solver())
    assert not torch.allclose(call(plain, x), found, rtol=1e-3)


def test_what_a_guider_cannot_do_is_refused(pipe: Any) -> None:
    wrong = {
        "AdaptiveProjectedGuidance, expected a ClassifierFreeGuidance": AdaptiveProjectedGuidance(),
        "acts between 0 and 0.5 of its steps, expected 0 and 1": ClassifierFreeGuidance(stop=0.5),
        "in its usual formulation": ClassifierFreeGuidance(use_original_formulation=True),
    }
    former = pipe.scheduler
    for said, guider in wrong.items():
        pipe.guider = guider
        with pytest.raises(ModelError, match=said) as caught:
            guide(pipe, solver(guidance=SCALES))
        assert "\n" not in str(caught.value) and pipe.guider is guider and pipe.scheduler is former
    pipe.guider = ClassifierFreeGuidance(guidance_scale=1.0)
    with pytest.raises(TableError, match="sets guidance scale 5, but the pipeline's guider does not guide"):
        call(guide(pipe, solver(guidance=SCALES)), noise())
    restore(pipe)
    pipe.scheduler = EPDScheduler.from_solver(solver(guidance=SCALES))
    with pytest.raises(TableError, match="which a scheduler alone cannot"):
        call(pipe, noise())
    pipe.scheduler = former


def test_a_modular_pipeline_that_begins_from_a_picture_is_refused() -> None:
    """It takes calls of the network for intervals, so that it would begin at another one than strength says."""
    pipe = made("modular")
    former = pipe.scheduler
    options = {"image": Image.new("RGB", (16, 16), "red"), "height": 16, "width": 16, "output": "latents"}
    pipe.scheduler = EPDScheduler.from_solver(solver())
    with pytest.raises(TableError, match=r"takes the 8 calls of the network for intervals.*strength=1") as caught:
        pipe(prompt=PROMPTS, num_inference_steps=4, strength=0.5, max_sequence_length=TOKENS, **options)
    assert "\n" not in str(caught.value)
    pipe.scheduler = former
