"""Rivals: their text form, their options in the installed diffusers, and what the options do."""

import re

import diffusers
import pytest
import torch

from epd_ray.config.loading import load_config
from epd_ray.drawing.sampler import baseline, rival_sampler
from epd_ray.errors import ConfigError, ScheduleError
from epd_ray.evaluation.suites.solvers import digest
from epd_ray.solvers.rival import Rival, options_of, require_rivals
from tests.families import PROMPTS, SEEDS, backbones, run


def test_text_form() -> None:
    text = "unipc@model?guidance_scale=2.5&shift=1.5&final_zero=false&disable_corrector=[0,1]&solver_type=bh1"
    rival = Rival("unipc", "model", 2.5, 1.5, False, (("disable_corrector", (0, 1)), ("solver_type", "bh1")))
    assert Rival.parse(text) == rival and rival.text == text
    assert Rival.parse("ddim") == Rival("euler") and Rival("euler").text == "euler"
    sampler = rival_sampler(rival, 6)
    assert (sampler.guidance_scale, sampler.shift, sampler.final_zero, sampler.schedule) == (2.5, 1.5, False, "model")
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", sampler.key) and sampler.key != rival_sampler(rival, 7).key
    assert sampler.label.startswith("UniPC (model) without the step to 0 (guidance scale 2.5, shift 1.5, ")
    assert rival.having(solver_type="bh2").options[1] == ("solver_type", "bh2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("euler?guidance_scale=-1", "guidance_scale is -1, expected a number of at least 0"),
        ("euler?guidance_scale=much", "guidance_scale is 'much', expected a number of at least 0"),
        ("euler?shift=0", "shift is 0, expected a number above 0"),
        ("euler?final_zero=2", "final_zero is 2, expected true or false"),
    ],
)
def test_wrong_values_are_named_in_the_configuration(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"evaluation.baselines.0: {says}"):
        load_config(None, [f"evaluation.baselines=['{text}']"])


@pytest.mark.parametrize(
    ("text", "form", "says"),
    [
        ("dpmpp2m?solver_ordr=3", "flow", r"DPMSolverMultistepScheduler of diffusers \S+ has no option "
         "'solver_ordr', it has solver_order, solver_type, lower_order_final, euler_at_final, timestep_spacing"),
        ("dpmpp2m?disable_corrector=[0]", "ve", "has no option 'disable_corrector', it has solver_order"),
        ("euler?solver_order=3", "ve", "EulerDiscreteScheduler .* no option 'solver_order', it has timestep_spacing"),
        ("heun?solver_order=3", "ve", "without a scheduler of diffusers has no option 'solver_order', it has none"),
        ("unipc?solver_type=bh3", "ve", "solver_type is 'bh3', expected bh1 or bh2"),
        ("unipc?solver_order=4", "ve", "solver_order is 4, expected 1, 2 or 3"),
        ("dpmpp2m?lower_order_final=no", "ve", "lower_order_final is 'no', expected true or false"),
        ("unipc?disable_corrector=0", "flow", r"disable_corrector is 0, expected a list of steps such as \[0,1\]"),
        ("euler?shift=2", "ve", "shift is for a flow"),
        ("euler@ays", "flow", "follows the form ve"),
        ("dpmpp2m@model?timestep_spacing=leading", "ve", "timestep_spacing is about schedule own, not model"),
    ],
)  # fmt: skip
def test_options_that_do_not_exist_are_named_with_those_that_do(text: str, form: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        require_rivals([text], form)
    require_rivals([text.partition("?")[0].partition("@")[0]], form)


def test_an_option_that_this_diffusers_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        def __init__(self, solver_order: int = 2) -> None: ...

    assert "euler_at_final" in options_of("dpmpp2m", "ve")
    monkeypatch.setattr(diffusers, "DPMSolverMultistepScheduler", Older)
    with pytest.raises(ConfigError, match=r"has no option 'euler_at_final', it has solver_order$"):
        require_rivals(["dpmpp2m?euler_at_final=true"], "ve")


OPTIONS = [
    ("sd", "dpmpp2m", "solver_order=3", 6), ("sd", "unipc", "lower_order_final=false", 5),
    ("sd", "dpmpp2m", "solver_type=heun", 5),
    ("sd3", "unipc", "disable_corrector=[0,1]", 5), ("sd", "unipc", "solver_type=bh1&final_sigmas_type=sigma_min", 5),
    ("sd", "dpmpp2m", "timestep_spacing=trailing", 5), ("sd", "dpmpp2m", "use_karras_sigmas=true", 5),
    ("sd", "euler", "timestep_spacing=trailing", 5), ("sd3", "dpmpp2m", "final_sigmas_type=sigma_min", 5),
]  # fmt: skip


@pytest.mark.parametrize(("model", "name", "option", "steps"), OPTIONS)
def test_an_option_does_what_it_does_in_the_pipeline(model: str, name: str, option: str, steps: int) -> None:
    """On a scheduler of diffusers itself, stepped by the drift of the model."""
    backbone, text = backbones(model), f"{name}?{option}"
    require_rivals([text], backbone.form)
    ours = baseline(text, steps)
    found = run(backbone, ours, 3.0)
    assert not torch.equal(found, run(backbone, baseline(name, steps), 3.0))
    assert torch.allclose(found, stepped(backbone, ours, name), rtol=1e-4, atol=1e-4)


def stepped(backbone, sampler, name):
    from epd_ray.solvers import zoo
    from epd_ray.solvers.conditioned import ConditionedDrift, noises

    flow = backbone.form == "flow"
    given = {key: list(v) if isinstance(v, tuple) else v for key, v in sampler.options}
    if flow:
        given |= {"use_flow_sigmas": True, "flow_shift": 2.0, "prediction_type": "flow_prediction"}
    scheduler = getattr(diffusers, zoo.find(name).schedulers[backbone.form]).from_config(
        backbone.pipeline.scheduler.config, **given
    )
    scheduler.set_timesteps(sampler.intervals)
    sigmas = scheduler.sigmas.tolist()
    scale = [1.0 if flow or name == "euler" else (1 + s**2) ** 0.5 for s in sigmas]
    x = noises(backbone, SEEDS) * scheduler.init_noise_sigma
    drift = ConditionedDrift(backbone, backbone.encode(PROMPTS, 3.0))
    for t, sigma, c in zip(scheduler.timesteps, sigmas, scale, strict=False):
        d = drift(c * x, x.new_full((2,), sigma))
        x = scheduler.step(d, t, x, return_dict=False)[0]
    return scale[-1] * x


def test_the_guidance_of_a_rival_is_its_own() -> None:
    from epd_ray.drawing.worker import RolloutWorker
    from epd_ray.policy.dirichlet import TableSpace

    worker = RolloutWorker(backbones("sd3"), 7.0, TableSpace(3, True, False), baseline("euler", 2))
    strong, weak = (worker.sample(baseline(f"euler{g}", 2), PROMPTS, SEEDS) for g in ("", "?guidance_scale=2"))
    worker.guidance_scale = 2.0
    assert (weak == worker.sample(baseline("euler", 2), PROMPTS, SEEDS)).all() and (strong != weak).any()


def test_what_is_chosen_has_its_own_checksum() -> None:
    texts = ("euler", "euler?guidance_scale=2", "euler?shift=2", "euler@model", "euler?final_zero=false")
    assert len({digest(baseline(text, 4)) for text in texts}) == len(texts)


def test_a_shift_needs_the_schedule_of_a_pipeline() -> None:
    from epd_ray.backbones.gaussian import GaussianBackbone

    with pytest.raises(ScheduleError, match="shift is 2, but schedule 'own' of model 'gaussian-flow' has none"):
        baseline("euler?shift=2", 4).steps(GaussianBackbone(form="flow"))
