import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from epd_ray.backbones import BACKBONES
from epd_ray.backbones.gaussian import GaussianBackbone, Mixture, text_normal
from epd_ray.backbones.simulated import SimulatedBackbone
from epd_ray.errors import ModelError, ScheduleError
from epd_ray.solvers import Form, SolverTable, dpm2, dpm2_table
from epd_ray.solvers.epd import epd
from epd_ray.solvers.schedules import check_sigmas, logsnr
from epd_ray.types import Backbone

PROMPTS = ["a red circle", "a blue star"]
MAKE: dict[str, Callable[[], Backbone]] = {
    "ve": lambda: GaussianBackbone(form="ve"),
    "flow": lambda: GaussianBackbone(form="flow"),
    "mixture": lambda: GaussianBackbone(components=3),
    "simulated": lambda: SimulatedBackbone(),
}


def draw(backbone: Backbone, table: SolverTable, prompts: list[str] = PROMPTS, seed: int = 0) -> torch.Tensor:
    conditioning = backbone.encode(prompts, 1.0)
    repeated = conditioning.repeat(table.points)
    x = backbone.initial(torch.stack([backbone.noise(seed)] * len(prompts)))
    calls = iter([conditioning, repeated] * table.intervals)
    x = epd(lambda x, s: backbone.drift(x, s, next(calls)), x, backbone.sigmas(table.intervals), table)
    return backbone.decode(x)


@pytest.mark.parametrize("kind", MAKE)
def test_keeps_the_backbone_contract(kind: str) -> None:
    backbone = MAKE[kind]()
    for final_zero in (False, True):
        for count in (1, 5):
            sigmas = backbone.sigmas(count, final_zero=final_zero)
            assert sigmas.shape == (count + 1,) and sigmas.dtype == torch.float64
            assert (sigmas[-1] == 0) == final_zero
            check_sigmas(sigmas, allow_zero=final_zero)
    assert torch.equal(backbone.noise(3), backbone.noise(3)) and not torch.equal(backbone.noise(3), backbone.noise(4))
    conditioning = backbone.encode(PROMPTS, 2.0)
    assert len(conditioning) == 2 and len(conditioning.repeat(3)) == 6
    x = backbone.initial(torch.stack([backbone.noise(0), backbone.noise(1)]))
    sigma = backbone.sigmas(4)[1].float().expand(2)
    d = backbone.drift(x, sigma, conditioning)
    assert d.shape == x.shape and d.dtype == torch.float32
    rows = backbone.drift(x.repeat_interleave(3, 0), sigma.repeat_interleave(3), conditioning.repeat(3))
    assert torch.allclose(rows, d.repeat_interleave(3, 0), atol=1e-6)
    images = draw(backbone, dpm2_table(4))
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("kind", MAKE)
def test_image_depends_on_table_prompt_noise_and_nothing_else(kind: str) -> None:
    backbone = MAKE[kind]()
    first = draw(backbone, dpm2_table(2))
    assert torch.equal(first, draw(MAKE[kind](), dpm2_table(2)))
    other = SolverTable(torch.tensor([[0.3]] * 2), torch.ones(2, 1))
    assert (first - draw(backbone, other)).abs().max() > 1e-3
    assert (first - draw(backbone, dpm2_table(2), PROMPTS[::-1])).abs().max() > 1e-3
    assert (first - draw(backbone, dpm2_table(2), seed=1)).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["ve", "flow"])
def test_exact_solution(form: Form) -> None:
    backbone = GaussianBackbone(form=form)
    conditioning = backbone.encode(PROMPTS, 1.5)
    sigmas = logsnr(401, 0.05, backbone.sigmas(1)[0].item())
    x = backbone.initial(torch.stack([backbone.noise(0), backbone.noise(1)])).double()
    end = dpm2(lambda x, s: backbone.drift(x, s, conditioning), x, sigmas)
    exact = backbone.exact(x, sigmas[0].item(), sigmas[-1].item(), conditioning)
    assert torch.allclose(end, exact, atol=2e-4)
    assert torch.equal(backbone.exact(x, 0.5, 0.5, conditioning), x)


@pytest.mark.parametrize("form", ["ve", "flow"])
def test_denoiser_is_the_posterior_mean(form: Form) -> None:
    mixture = Mixture(torch.tensor([[-1.0], [2.0]]), torch.tensor([0.3, 0.6]), torch.tensor([0.25, 0.75]))
    sigma, x = torch.tensor([0.7], dtype=torch.float64), torch.tensor([[0.4]], dtype=torch.float64)
    clean = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    components = torch.distributions.Normal(mixture.means[:, 0].double(), mixture.std.double())
    prior = (mixture.probs.double() * components.log_prob(clean[:, None]).exp()).sum(-1)
    alpha = 0.3 if form == "flow" else 1.0
    posterior = prior * torch.distributions.Normal(alpha * clean, 0.7).log_prob(x[0]).exp()
    expected = (posterior * clean).sum() / posterior.sum()
    assert mixture.denoise(x, sigma, form).item() == pytest.approx(expected.item(), abs=1e-6)


def test_models_and_prompts_are_drawn_from_their_text() -> None:
    assert torch.equal(text_normal("a", (3,)), text_normal("a", (3,)))
    assert not torch.equal(text_normal("a", (3,)), text_normal("b", (3,)))
    one, two = (GaussianBackbone(model=name, components=2) for name in ("one", "two"))
    assert one.model_id == "one" and GaussianBackbone().model_id == "gaussian-flow"
    assert not torch.equal(draw(one, dpm2_table(2)), draw(two, dpm2_table(2)))


def test_latency_is_per_call() -> None:
    backbone = SimulatedBackbone(latency=0.02)
    start = time.perf_counter()
    draw(backbone, dpm2_table(2))
    assert time.perf_counter() - start >= 4 * 0.02


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GaussianBackbone(form="vp"), ModelError, "form is 'vp'"),  # type: ignore[arg-type]
        (lambda: GaussianBackbone(components=0), ModelError, "components is 0"),
        (lambda: GaussianBackbone(size=0), ModelError, "size is 0"),
        (lambda: GaussianBackbone(std=0.0), ModelError, "std is 0"),
        (lambda: GaussianBackbone(form="flow", sigma_max=2.0), ModelError, "sigma_max is 2"),
        (lambda: GaussianBackbone(form="ve", sigma_min=0.0), ScheduleError, "sigma_min is 0"),
        (lambda: SimulatedBackbone(latency=-1.0), ModelError, "latency is -1"),
        (lambda: Mixture(torch.zeros(2, 1), torch.ones(2), torch.ones(2) / 2).solution(torch.zeros(1, 1), 1, 0, "ve"),
         ModelError, "a mixture of 2"),
    ],
)  # fmt: skip
def test_refuses_values_out_of_range(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_registered_and_cheap_to_import() -> None:
    assert {"auto", "gaussian", "simulated"} <= set(BACKBONES.names())
    assert isinstance(BACKBONES.get("gaussian")(), GaussianBackbone)
    assert isinstance(BACKBONES.get("simulated")(latency=0.0), SimulatedBackbone)
    check = (
        "import sys; from epd_ray.backbones import BACKBONES; BACKBONES.get('simulated');"
        "assert not {'ray', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
