"""The cases that are no whole runs: stage 1 on a backbone that costs nothing, and batching on small networks."""

import json
from functools import partial

import pytest
import torch
from rich.console import Console

from epd_ray.backbones.architectures import ARCHITECTURES
from epd_ray.bench import batching, cases, distilling
from epd_ray.bench.cases import Options
from epd_ray.bench.flops import peak_tflops
from epd_ray.bench.models import MODELS, Subject
from epd_ray.bench.random_models import random_backbone
from epd_ray.bench.record import Record, keep, show, under
from epd_ray.bench.runner import run
from epd_ray.drawing.sampler import baseline
from epd_ray.errors import ConfigError
from epd_ray.evaluation.results import read_sections
from epd_ray.report.tables import show as table
from epd_ray.solvers.conditioned import noises
from tests.conftest import SIMULATED

TINY = [o for o in SIMULATED if "intervals" not in o]


@pytest.mark.parametrize("name", list(distilling.DISTILLATIONS))
def test_distill_measures_each_way(name):
    overrides = [*TINY, "prompts.num_train=8", "prompts.validation=9", "prompts.test=8", "solver.intervals=2"]
    record = distilling._distilled(
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

    monkeypatch.setattr(distilling, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(distilling, "_distilled", lambda name, overrides: {"overrides": overrides[-1]})
    record = distilling.distill(intervals=(2, 12)).figures
    assert list(record) == [f"{n}/{name}/overrides" for n in (2, 12) for name in distilling.DISTILLATIONS]
    assert record["12/start_point_scales/overrides"] == "solver.intervals=12"
    assert record["12/lone_start_scales/overrides"] == "solver.intervals=36"  # as many evaluations
    assert cases.CASES["distill"] is distilling.distill


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


@pytest.mark.parametrize("model", MODELS[1:])
def test_random_models_of_every_architecture_run(model):
    record = batching._measure(Subject(model, "small", 64), 2, 3)
    of_card = {"peak_tflops", "of_peak"}
    assert all(record[name] > 0 for name in record.keys() - of_card) and record["of_peak"] is None
    assert record["vs_ddim"] == pytest.approx(record["batched_s"] / record["ddim_s"], rel=0.05)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_random_models_draw_pictures_that_depend_on_the_prompt(name):
    backbone = random_backbone(name, "small", resolution=64, dtype="float32")
    one, other = (
        baseline("euler", 2).run(backbone, backbone.encode([p], 3.0), noises(backbone, [0])) for p in ("a", "b")
    )
    pictures = backbone.decode(one)
    assert pictures.shape == (1, 3, 64, 64) and pictures.std() > 0
    assert not torch.allclose(one, other)
    assert torch.equal(backbone.encode(["a"], 1.0).tensors[0], backbone.encode(["a"], 1.0).tensors[0])


def test_unknown_names_are_met_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'sd33'.*'sd3'"):
        random_backbone("sd33", "small", resolution=64)
    with pytest.raises(ConfigError, match=r"'sd3-randm'.*'sd3-random'"):
        Subject("sd3-randm")


def test_a_full_or_compiled_model_says_so():
    small, full = Subject("sd3-random", "small"), Subject("sd3-random", "full", compile=True)
    assert (small.full, full.full, Subject().full) == (False, True, False)
    assert "compile: True" in full.overrides[1] and "compile" not in small.overrides[1]
    assert full.facts["compile"] is True and small.facts["compile"] is False


def test_a_card_is_known_by_its_name():
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989 and peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312 and peak_tflops("NVIDIA L4") == 121
    assert peak_tflops("NVIDIA L40S") == 362 and peak_tflops("NVIDIA GeForce RTX 4090") == 165
    assert peak_tflops("cpu") is None and peak_tflops("NVIDIA A1000") is None


@pytest.fixture
def stand_in(monkeypatch):
    """Cases that measure nothing, and what they were given."""
    given = []

    def case(name, **arguments):
        given.append(arguments)
        rows = {**under("batch 1/euler", {"s": 1.0}), **under("batch 1/epd", {"s": 2.0, "of_peak": None})}
        return Record(name, {"batch": 1}, {"seconds": 0.5, **rows})

    for name in ("latency", "overhead"):
        monkeypatch.setitem(cases.CASES, name, partial(case, name))
    return given


def test_the_command_writes_what_it_measured_and_on_what(stand_in, tmp_path, capsys):
    file = tmp_path / "bench.json"
    records = run(["latency", "overhead"], out=file)
    written = json.loads(file.read_text())
    assert written["cases"] == {record.case: record.figures for record in records}
    assert [record.case for record in records] == ["latency", "overhead"]
    assert {"cpu", "cores", "gpus", "torch_threads", "versions"} <= written["made_by"]["machine"].keys()
    assert written["made_by"]["machine"]["versions"]["torch"] == torch.__version__
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.split() == ["batch", "1/epd", "2", "-"] for line in lines
    )  # a row for each solver, a column a figure
    capsys.readouterr()
    Console().print(table("step", {f"{way}/{stage}_s": 1.5 for way in "ab" for stage in ("x", "y", "z")}))
    assert [line.split() for line in capsys.readouterr().out.splitlines()][1:3] == [["a", "b"], ["x_s", "1.5", "1.5"]]
    Console(width=40).print(table("search", {f"n{n}/random/rdpo_minus_this/mean": 1.5 for n in range(4)}))
    narrow = "".join(capsys.readouterr().out.split())
    assert all(f"n{n}/random/rdpo_minus_this" in narrow for n in range(4)) and "\N{HORIZONTAL ELLIPSIS}" not in narrow
    Console(width=40).print(
        table("search", {f"{way}_minus_this/{f}": 1.5 for way in ("rdpo", "random") for f in "xyz"})
    )
    assert "\N{HORIZONTAL ELLIPSIS}" not in capsys.readouterr().out
    run(["latency"], Options("sd3-random", "small", compile=True))
    assert stand_in == [{"subject": Subject()}, {}, {"subject": Subject("sd3-random", "small", compile=True)}]


def test_a_kept_record_is_read_by_results(tmp_path, capsys):
    record = Record("step", {"images": 4}, {"ratio": 2.5, **under("loop", {"seconds": 3.0, "of_peak": None})})
    keep([record], tmp_path / "bench.json")
    (section,) = read_sections(tmp_path / "bench.json")
    assert section.title == "Benchmark step" and section.made_by == record.made_by
    assert "| images | 4 |" in section.body and "| ratio | 2.5 |" in section.body and "| loop | 3 | - |" in section.body
    show(record)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["images", "4"] in lines and ["loop"] in lines and ["seconds", "3"] in lines


def test_batching_takes_every_random_model_unless_one_is_named(monkeypatch):
    given = []
    monkeypatch.setitem(cases.CASES, "batching", lambda subjects: given.append(subjects) or Record("batching", {}, {}))
    run(["batching"], Options(size="small"))
    run(["batching"], Options("shapes"))
    assert given == [[Subject(model, "small") for model in MODELS[1:]], [Subject("shapes")]]


def test_the_command_refuses_before_it_measures(stand_in, tmp_path):
    with pytest.raises(ConfigError) as error:
        run(["latncy", "overhead"], Options("shapes"))
    said = error.value.problems
    assert "unknown case 'latncy'; did you mean 'latency'?" in said[0]
    assert said[1].startswith("case overhead takes no --model, --size or --compile: give them to batching, latency")
    with pytest.raises(ConfigError, match="did you mean 'flux-random'"):
        run(["latency"], Options("flux-rndom"))
    with pytest.raises(ConfigError, match=r"shapes.*compiled.*sd3-random"):
        run(["latency"], Options("shapes", compile=True))
    with pytest.raises(ConfigError, match=r"shapes.*'small'.*sd3-random"):
        run(["latency"], Options("shapes", "small"))
    for options, message in (
        (Options(size="small"), "--size needs --model, a random one, such as sd3-random"),
        (Options(compile=True), "--compile needs --model, a random one, such as sd3-random"),
        (Options(seeds=2), "none of latency takes --seeds: give them to efficiency, search"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(["latency"], options)
    with pytest.raises(ConfigError, match=f"--out is {tmp_path}/no/b.json"):
        run(["latency"], out=tmp_path / "no" / "b.json")
    assert stand_in == []
