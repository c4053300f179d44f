"""The cases that are no whole runs: stage 1 on a backbone that costs nothing, and batching on small networks."""

import pytest
import torch

from epd_ray.bench import batching, cases
from epd_ray.errors import ConfigError
from epd_ray.random_models import ARCHITECTURES, random_backbone
from tests.conftest import SIMULATED

TINY = [o for o in SIMULATED if "intervals" not in o]


@pytest.mark.parametrize("name", list(cases.DISTILLATIONS))
def test_distill_measures_each_way(name):
    overrides = [*TINY, "prompts.num_train=8", "prompts.validation=9", "prompts.test=8", "solver.intervals=2"]
    record = cases._distilled(
        name, [*overrides, "distill.enabled=true", "distill.prompts=4", "distill.teacher_steps=2"]
    )
    assert list(record) == ["residual_0", "residual_1", "final_rms", "reward", "seconds", "peak_mib"]
    assert all(record[k] > 0 for k in ("residual_0", "residual_1", "final_rms", "seconds")) and record["peak_mib"] >= 0
    assert record["residual_1"] < 1


def test_distill_names_every_figure(monkeypatch):
    class Here:  # a pool in this very process
        def __init__(self, *args, **options): ...

        def __enter__(self):
            return self

        def __exit__(self, *error): ...

        map = staticmethod(map)

    monkeypatch.setattr(cases, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(cases, "_distilled", lambda name, overrides: {"overrides": overrides[-1]})
    record = cases.distill(intervals=(2, 12))
    assert list(record) == [f"{n}/{name}/overrides" for n in (2, 12) for name in cases.DISTILLATIONS]
    assert record["12/gradient/overrides"] == "solver.intervals=12"
    assert cases.CASES["distill"] is cases.distill


def test_batching_compares_the_same_work(monkeypatch):
    rows = []

    def drift(x, sigma):
        rows.append(len(x))
        assert len(sigma) == len(x)
        return x

    x = torch.zeros(3, 4)
    batching._interval(drift, x, 1.0, 0.5, batched=True)
    batching._interval(drift, x, 1.0, 0.5, batched=False)
    batching._two_steps(drift, x, 1.0, 0.5)
    assert rows == [3, 6, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_random_models_of_every_architecture_run(name):
    record = batching._measure(name, "small", 64, 2, 3)
    assert all(value > 0 for value in record.values())
    assert record["vs_ddim"] == pytest.approx(record["batched_s"] / record["ddim_s"], rel=0.05)


def test_an_unknown_architecture_is_named():
    with pytest.raises(ConfigError, match="unknown architecture 'sd33'; did you mean 'sd3'"):
        random_backbone("sd33", "small", resolution=64)
