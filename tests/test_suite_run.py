"""Suites on models: what they leave, how they stop and go on, and what they refuse."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from epd_ray.actors.environments import EnvironmentFailure
from epd_ray.backbones.auto import open_backbone
from epd_ray.backbones.simulated import SimulatedBackbone
from epd_ray.config.sections import BackboneConfig
from epd_ray.drawing.worker import RolloutWorker
from epd_ray.errors import (
    ConfigError,
    MetricError,
    ModelError,
    PlacementError,
    PromptError,
    RunDirectoryError,
    TableError,
)
from epd_ray.evaluation.ab.make import make_page
from epd_ray.evaluation.suites.evaluate import evaluate_suite
from epd_ray.evaluation.suites.features import foresee_features
from epd_ray.evaluation.suites.settings import Request, load_settings
from epd_ray.evaluation.suites.solvers import foresee
from epd_ray.solvers import Solver, SolverTable
from tests.fakes import Quiet
from tests.tiny_models import save_clip, save_ddpm, save_flux, save_sd, save_sd3, save_sdxl

IN_DRIVER = ["cluster.rollout_actors=0", "cluster.images_per_job=4"]
SIMULATED = [
    *IN_DRIVER,
    "backbone.family=simulated",
    "rewards={sim: {head: simulated, replicas: 0, options: {target: 0.4}}}",
    "evaluation.baselines=[euler, dpm2]",
    "evaluation.pictures=3",
    "evaluation.tune=false",
]


class Stopping(Quiet):
    """Presses Ctrl-C after so many shards."""

    def __init__(self, after: int | None = None) -> None:
        super().__init__()
        self.after, self.shards = after, 0

    def advance(self, steps: int = 1, /, **numbers: float) -> None:
        if self.stages[-1] == "evaluating":
            self.shards += steps
            if self.shards == self.after:
                raise KeyboardInterrupt


def save_solver(
    folder: Path, intervals: int = 3, position: float = 0.3, afs: bool = False, family: str = "simulated"
) -> str:
    backbone = SimulatedBackbone()
    half = torch.full((intervals, 2), 0.5, dtype=torch.float64)
    table = SolverTable(torch.tensor([[position, 0.7]] * intervals, dtype=torch.float64), half)
    sigmas = backbone.sigmas(intervals)
    form = "ve" if family == "ddpm" else "flow"
    Solver(table, sigmas, form, afs, meta={"backbone": family}).save_pretrained(folder / "solver")
    return str(folder / "solver")


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"thing {i}\n" for i in range(10)))
    return path


@pytest.fixture
def request_of(tmp_path, prompts):  # type: ignore[no-untyped-def]
    solver = save_solver(tmp_path / "mine")
    return Request("prompts", tmp_path / "out", (solver,), prompts=prompts)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """What was drawn: (sampler, seeds), a call each."""
    made: list[tuple[str, tuple[int, ...]]] = []
    draw = RolloutWorker.sample

    def counted(self, sampler, prompts, noise_seeds):  # type: ignore[no-untyped-def]
        made.append((sampler.key, tuple(noise_seeds)))
        return draw(self, sampler, prompts, noise_seeds)

    monkeypatch.setattr(RolloutWorker, "sample", counted)
    return made


def measured(request: Request, *overrides: str, observer: Quiet | None = None) -> list[str]:
    config = load_settings(request.suite, None, [*SIMULATED, *overrides])
    return evaluate_suite(config, request, observer or Quiet())


def scores(out: Path) -> dict[str, list[object]]:
    """Without what differs from run to run."""
    table = pq.read_table(out / "results.parquet")
    return table.drop_columns(["session", "seconds"]).to_pydict()


def test_a_suite_leaves_everything(small_ray, request_of, calls):
    lines = measured(request_of)
    out = request_of.out
    table = pq.read_table(out / "results.parquet").to_pydict()
    assert len(table["sampler"]) == 6 * 10  # ours, two rivals at two costs, 50 steps of Euler's
    assert set(table["sampler"]) == {table["sampler"][0], "euler-6", "dpm2-6", "euler-9", "dpm2-10", "euler-50"}
    assert len(calls) == len(set(calls)) == 6 * 3
    by_sampler = {key: [s for k, seeds in calls if k == key for s in seeds] for key, _ in calls}
    assert all(sorted(seeds) == sorted(by_sampler["euler-50"]) for seeds in by_sampler.values())
    assert [key for key, _ in calls[:6]] != [key for key, _ in calls[6:12]]  # they take turns, also at coming first
    assert {"sim", "sharpness"} <= set(table) and "scene_accuracy" not in table
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1 and "than 50 steps of DDIM / Euler in sim" in page
    assert page.count("data:image/webp") == 6 * 3 and "http" not in page.replace("http://www.w3.org", "")
    (verdict,) = json.loads((out / "results.json").read_text())["verdicts"]
    assert " ".join(lines).startswith(verdict["sentence"]) and verdict["sentence"] in (out / "results.md").read_text()
    assert (
        verdict["sentence"].startswith("On 10 prompts")
        and "than 50 steps of DDIM / Euler in sim" in verdict["sentence"]
    )
    (slow, equal) = verdict["against"]
    assert (slow["solver"], equal["solver"]) == ("euler-50", "euler-9") and slow["speed"]["ratio"] > 0
    assert (out / "results.md").read_text().count("| DDIM / Euler |") == 3
    assert (out / "results.csv").read_text().startswith("method,sampler,")
    make_page(out / "pictures" / "euler-6", out / "pictures" / "dpm2-6", out / "ab", None, None, 0)
    pairs = json.loads((out / "ab" / "key.json").read_text())["pairs"]
    assert {pair["picture"]: pair["prompt"] for pair in pairs} == {f"{i:03d}.png": f"thing {i}" for i in range(3)}


def test_an_interrupted_suite_goes_on_and_draws_nothing_twice(small_ray, request_of, calls, tmp_path):
    measured(replace(request_of, out=tmp_path / "whole"))
    whole, calls[:] = list(calls), []
    with pytest.raises(KeyboardInterrupt):
        measured(request_of, observer=Stopping(after=7))
    kept = {path for path in request_of.out.rglob("scores/*/*.parquet")}
    assert len(kept) == 7
    first, calls[:] = list(calls), []
    measured(request_of)
    assert len(calls) == len(whole) - len(kept)
    assert len({*first[:7], *calls}) == len(first[:7]) + len(calls) == len(whole)
    calls.clear()
    measured(request_of)
    assert calls == []
    assert scores(request_of.out) == scores(tmp_path / "whole")


def test_a_shard_that_was_being_written_is_done_again(small_ray, request_of, calls):
    measured(request_of)
    before = scores(request_of.out)
    victim = request_of.out / "scores" / "euler-9" / "000001.parquet"
    victim.rename(victim.with_name(".000001.parquet.tmp"))  # what a kill in the middle leaves
    calls.clear()
    measured(request_of)
    assert [key for key, _ in calls] == ["euler-9"]
    assert scores(request_of.out) == before


def test_a_solver_is_added_to_what_is_there(small_ray, request_of, calls, tmp_path):
    measured(request_of)
    calls.clear()
    other = save_solver(tmp_path / "other", position=0.2)
    lines = measured(replace(request_of, solvers=(other,)))  # the first one stays, also when it is not named again
    assert len(calls) == 3 and len({key for key, _ in calls}) == 1
    sentences = " ".join(lines).split("On 10 prompts")
    (about,) = [text for text in sentences if "EPD-Solver other (parallel NFE 6" in text]
    assert "their times cannot be compared" in about  # different calls drew them
    (about,) = [text for text in sentences if "EPD-Solver mine (parallel NFE 6" in text]
    assert "per picture against" in about and "cannot be compared" not in about.partition("method")[0]
    calls.clear()
    shutil.rmtree(tmp_path / "mine")
    assert measured(replace(request_of, solvers=(other,))) == lines and calls == []
    names = set(pq.read_table(request_of.out / "results.parquet")["sampler"].to_pylist())
    assert names == {folder.name for folder in (request_of.out / "scores").iterdir()} and len(names) == 7


def test_what_is_not_there_is_said_before_an_actor_starts(request_of, tmp_path, monkeypatch):
    statistics = tmp_path / "reference.npz"
    np.savez(statistics, mu=np.zeros(32), sigma=np.eye(32))
    monkeypatch.setattr("epd_ray.evaluation.suites.evaluate.algorithm", lambda *_: pytest.fail("actors were started"))
    monkeypatch.setattr("epd_ray.evaluation.suites.evaluate.run_session", lambda *_: pytest.fail("Ray was started"))
    monkeypatch.setenv("EPD_RAY_HOME", str(tmp_path / "home"))
    with pytest.raises(TableError, match="'nowhere' is no directory"):
        measured(replace(request_of, solvers=("nowhere",)))
    for reference, said in (
        (Path("real"), "--reference is real, which does not exist: give a folder of pictures"),
        (tmp_path / "mine", "holds no pictures"),
        (request_of.prompts, "prompts.txt cannot be read as statistics"),
    ):
        with pytest.raises(MetricError, match=said):
            measured(replace(request_of, features="shapes-clip", reference=reference))
    with pytest.raises(ConfigError, match=r"--reference .*--features"):
        measured(replace(request_of, reference=statistics))
    with pytest.raises(ConfigError, match=r"--images-per-prompt 4 .*--features"):
        measured(replace(request_of, images_per_prompt=4))
    with pytest.raises(MetricError, match=r"2049 .*2048 .*\b10 "):
        measured(replace(request_of, features="inception", reference=statistics))
    with pytest.raises(EnvironmentFailure, match=r"'fid'.*rewards install fid"):
        measured(replace(request_of, features="inception", images_per_prompt=2))
    assert not request_of.out.exists()


def test_what_the_model_is_not_for_is_said_before_an_actor_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("epd_ray.evaluation.suites.evaluate.run_session", lambda *_: pytest.fail("Ray was started"))
    monkeypatch.setattr("epd_ray.evaluation.suites.evaluate.algorithm", lambda *_: pytest.fail("actors were started"))
    sd, sdxl, sd3, ddpm = (save(tmp_path / save.__name__) for save in (save_sd, save_sdxl, save_sd3, save_ddpm))
    flow = save_solver(tmp_path / "flow", family="sd3")
    statistics = tmp_path / "reference.npz"
    np.savez(statistics, mu=np.zeros(32), sigma=np.eye(32))
    fid = {"table": "cifar10_32", "count": 34, "features": "shapes-clip", "reference": statistics}
    deep = save_solver(tmp_path / "deep", 3, family="ddpm")
    twice = [save_solver(tmp_path / name, 2, p, True, "ddpm") for name, p in (("a", 0.3), ("b", 0.4))]
    own = {"prompts": tmp_path / "own.txt"}
    own["prompts"].write_text("a cat\n")
    for model, suite, overrides, solvers, options, said in (
        (sdxl, "paper", [], (), {}, "no table for sdxl, only for sd and sd3: choose one with --table: sd15_512, "),
        (sd, "paper", ["backbone.resolution=768"], (), {}, "no table for sd at 768 px: choose one with --table"),
        (sd, "paper", [], (flow,), {}, "is for the backbone family sd3, the model is of the family sd"),
        (sd, "paper", [], (flow,), {"table": "sd15_512"}, "is for the backbone family sd3, the model"),
        (ddpm, "paper-fid", [], (deep,), fid, "parallel NFE 6, the FID table has 3, 5, 7, 9"),
        (ddpm, "paper-fid", [], twice, fid, "both have parallel NFE 3, the FID table has room for one"),
        (sd3, "prompts", ["evaluation.baselines=[heun@logsnr]"], (flow,), own, "'heun@logsnr' follows the form ve"),
    ):
        config = load_settings(suite, None, [f"backbone.model={model}", *overrides])
        with pytest.raises((ConfigError, TableError), match=said):
            evaluate_suite(config, Request(suite, tmp_path / "out", tuple(solvers), **options), Quiet())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save", [save_sd, save_sdxl, save_sd3, save_flux, save_ddpm])
def test_an_index_tells_what_the_open_model_is(tmp_path, save):
    model = save(tmp_path / "model")
    foreseen = foresee(BackboneConfig(model=str(model), guidance_scale=None))
    found = open_backbone(model=str(model), device="cpu")
    assert (foreseen.family, foreseen.form) == (found.family, found.form)
    assert (foreseen.guidance_scale, foreseen.classifier_free) == (found.default_guidance, found.classifier_free)


def test_no_room_for_the_extractor_is_said_before_the_model_is_up(small_ray, request_of, monkeypatch):
    monkeypatch.setattr("epd_ray.evaluation.suites.evaluate.algorithm", lambda *_: pytest.fail("actors were started"))
    request = replace(request_of, features="shapes-clip", images_per_prompt=2)
    with pytest.raises(PlacementError, match=r"GPU: 0.2 asked, 0 free"):
        measured(request, "cluster.feature_gpus=0.2", "cluster.placement_timeout_s=0.2")


def test_results_of_something_else_are_refused_not_merged(small_ray, request_of, calls, prompts):
    measured(request_of)
    before = {p: p.read_bytes() for p in request_of.out.rglob("*") if p.is_file() and p.name != ".lock"}
    calls.clear()
    for overrides, said in (
        (["backbone.options.model=another"], 'model.model was "simulated", now "another"'),
        (["cluster.images_per_job=2"], "prompts.images_per_batch was 4, now 2"),
        (["rewards.sim.options.target=0.9"], "heads.sim was"),
    ):
        with pytest.raises(RunDirectoryError, match=f"holds other results: .*{said}"):
            measured(request_of, *overrides)
    prompts.write_text(prompts.read_text().replace("thing 3", "thing three"))
    with pytest.raises(RunDirectoryError, match=r"prompts.prompts_sha256 was"):
        measured(request_of)
    assert calls == []
    assert before == {p: p.read_bytes() for p in request_of.out.rglob("*") if p.is_file() and p.name != ".lock"}


def test_more_prompts_than_there_are(request_of):
    with pytest.raises(PromptError, match=r"\b11 .*\b10 .*--count"):
        measured(replace(request_of, count=11))


def test_head_weights_that_are_missing_leave_nothing(small_ray, request_of, tmp_path):
    head = f"rewards={{clip: {{head: clip, replicas: 0, options: {{model: {tmp_path / 'nowhere'}}}}}}}"
    with pytest.raises(ModelError, match="nowhere"):
        measured(request_of, head)
    assert [path.name for path in request_of.out.iterdir()] == [".lock"]


def test_fewer_pictures_than_the_distance_needs(small_ray, request_of, tmp_path, monkeypatch):
    monkeypatch.setattr("epd_ray.evaluation.suites.evaluate.algorithm", lambda *_: pytest.fail("actors were started"))
    clip, statistics = save_clip(tmp_path / "clip"), tmp_path / "reference.npz"
    np.savez(statistics, mu=np.zeros(32), sigma=np.eye(32))
    request = replace(request_of, features=str(clip), reference=statistics)
    with pytest.raises(MetricError, match=r"\b33 .*\b32 .*\b10 .*--count"):
        measured(request)


def test_diversity_is_seen_by_the_models_own_clip_head(request_of, tmp_path):
    request = replace(request_of, images_per_prompt=4)
    model = f"backbone.model={save_sd(tmp_path / 'sd')}"
    for overrides, options in (
        ([], {"model": "openai/clip-vit-large-patch14"}),
        (["rewards.clip.options={model: a/b, revision: c, batch_size: 8}"], {"model": "a/b", "revision": "c"}),
    ):
        spec = foresee_features(request, load_settings("prompts", None, [model, *overrides]), 40)
        assert (spec.extractor, spec.options) == ("clip", options)
    assert foresee_features(request_of, load_settings("prompts", None, [model]), 10) is None


def test_a_heads_folder_with_another_model_is_refused(small_ray, request_of, tmp_path):
    clip = save_clip(tmp_path / "clip")
    head = f"rewards={{clip: {{head: clip, replicas: 0, options: {{model: {clip}}}}}}}"
    measured(request_of, head, "evaluation.baselines=[]")
    weights = next(clip.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RunDirectoryError, match=r"head_models\.clip"):
        measured(request_of, head, "evaluation.baselines=[]")


def test_a_model_that_lacks_what_a_suite_needs(tmp_path):
    models = {"paper": save_ddpm(tmp_path / "ddpm"), "paper-fid": save_sd(tmp_path / "sd")}
    options = {"paper": {}, "paper-fid": {"table": "cifar10_32", "reference": tmp_path}}
    said = {
        "paper": "takes no prompts, but --suite paper draws them: use --suite paper-fid",
        "paper-fid": "takes prompts, --suite paper-fid is for unconditional ones: use --suite paper",
    }
    for suite, model in models.items():
        config = load_settings(suite, None, [f"backbone.model={model}"])
        with pytest.raises(ConfigError, match=said[suite]):
            evaluate_suite(config, Request(suite, tmp_path / "out", **options[suite]), Quiet())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_with_sigkill_it_goes_on(request_of, tmp_path):
    """The count is of what was kept: a kill loses what was being drawn, and nothing that was scored and kept."""
    command = [sys.executable, "-m", "epd_ray.cli", "evaluate", "--suite", "prompts", str(request_of.prompts)]
    command += ["--solver", request_of.solvers[0], "--out", str(request_of.out)]
    command += [*SIMULATED, "backbone.options.latency=0.05"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list(request_of.out.rglob("scores/*/*.parquet"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in request_of.out.rglob("scores/*/*.parquet")}
    assert 4 <= len(kept) < 18
    subprocess.run(command, check=True, capture_output=True)
    assert len(list(request_of.out.rglob("scores/*/*.parquet"))) == 18
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


# -- real model formats -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_papers_table_for_a_model_of_the_family(small_ray, tmp_path):
    """A tiny random model: the layout and the samplers are the paper's, its figures are not."""
    model, clip = save_sd(tmp_path / "sd"), save_clip(tmp_path / "clip")
    config = load_settings("paper", None, [
        *IN_DRIVER, f"backbone.model={model}",
        f"rewards={{clip: {{head: clip, replicas: 0, options: {{model: {clip}}}}}}}",
    ])  # fmt: skip
    with pytest.raises(ConfigError, match=r"sd at 16 px.*--table"):
        evaluate_suite(config, Request("paper", tmp_path / "out", count=2), Quiet())
    request = Request("paper", tmp_path / "out", table="sd15_512", count=2, images_per_prompt=2)
    lines = evaluate_suite(config, request, Quiet())
    text = "\n".join(lines)
    assert text.count("ours minus paper") == text.count("  paper  ") == 13
    assert "No reward head of the configuration computes HPSv2.1, PickScore, ImageReward, Aesthetic" in text
    said = " ".join(text.split())
    assert "EPD-Solver (parallel NFE 20, 30 evaluations, 60 network passes) is" in said
    assert "50 steps of DDIM / Euler (uniform)" in said and "Intervals are over the prompts alone" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "paper 0.2695" in page and "paper 0.2482" in page
    assert (tmp_path / "out" / "results.csv").read_text().count(",diversity,0.") == 13


@pytest.mark.slow
def test_the_fid_table_for_an_unconditional_model(small_ray, tmp_path):
    model, clip = save_ddpm(tmp_path / "ddpm"), save_clip(tmp_path / "clip")
    solver = save_solver(tmp_path / "mine", 2, afs=True, family="ddpm")
    statistics = tmp_path / "reference.npz"
    np.savez(statistics, mu=np.zeros(32), sigma=np.eye(32))
    overrides = [*IN_DRIVER, f"backbone.model={model}", "cluster.images_per_job=17"]
    options = {"table": "cifar10_32", "count": 34, "features": str(clip), "reference": statistics}
    request = Request("paper-fid", tmp_path / "out", (solver,), **options)
    lines = evaluate_suite(load_settings("paper-fid", None, overrides), request, Quiet())
    text = (tmp_path / "out" / "results.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| EPD-Solver |"))
    assert [cell.strip() != "-" for cell in row.split("|")[2:-1]] == [True, False, False, False]
    assert "| paper | 10.40 | 4.33 | 2.82 | 2.49 |" in text
    assert "| ours minus paper | - | - | - | - |" in text and "is not an FID" in text
    assert any(line.startswith("Only the paper's values are shown") and "ParaDiGMS" in line for line in lines)


ONE_RIVAL = ["rewards.clip.replicas=0", "evaluation.baselines=[euler]", "evaluation.tune=false"]


def test_a_suite_tunes_its_rivals_once(small_ray, request_of):
    tuned = [
        "evaluation.tune=true",
        "evaluation.tune_images=24",
        "evaluation.baselines=[euler]",
        "prompts.validation=6",
    ]
    quiet = Quiet()
    lines = " ".join(measured(request_of, *tuned, observer=quiet))
    assert quiet.stages.count("tuning rivals") == 1
    record = json.loads((request_of.out / "results.json").read_text())
    rows = {row["key"]: row for row in record["solvers"]}
    kept = json.loads((request_of.out / "tuned.json").read_text())["tuned"]
    assert set(kept) == {"euler-6", "euler-9", "euler-50"} and all(0 < one["images"] <= 24 for one in kept.values())
    for key, one in kept.items():
        row = rows.get(f"{key}-tuned", rows.get(key))
        assert row["tuned"] == one and ("tuned" not in row["key"]) == (one["chosen"] == "euler")
    assert record["reference"] in rows and rows[record["reference"]]["intervals"] == 50
    before = scores(request_of.out)
    again = Quiet()
    measured(request_of, *tuned, observer=again)
    assert "tuning rivals" not in again.stages and scores(request_of.out) == before
    assert "validation pictures each" in lines and "DDIM / Euler" in lines


@pytest.mark.slow
def test_the_embedded_suite_prints_what_a_user_gets(small_ray, tmp_path):
    solver = save_solver(tmp_path / "mine", 2, family="sd3")
    config = load_settings("embedded", None, [*IN_DRIVER, *ONE_RIVAL])
    request = Request("embedded", tmp_path / "out", (solver,), count=2, images_per_prompt=2)
    said = " ".join(evaluate_suite(config, request, Quiet()))
    assert all(part in said for part in ("50 steps", "clip (", "scene accuracy (", " points ["))
    table = pq.read_table(tmp_path / "out" / "results.parquet")
    assert set(table["scene_accuracy"].to_pylist()) <= {0.0, 1.0}
    means = json.loads((tmp_path / "out" / "results.json").read_text())["solvers"][0]["metrics"]
    assert {"clip", "scene_accuracy", "sharpness", "diversity"} == set(means)
    (tmp_path / "own.txt").write_text("a cat\n")
    with pytest.raises(ConfigError, match="embedded model"):
        evaluate_suite(config, replace(request, count=None, prompts=tmp_path / "own.txt"), Quiet())
