import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
from typer.testing import CliRunner, Result

from epd_ray import cli
from epd_ray.config.run_config import RunConfig
from epd_ray.errors import (
    ClusterError,
    ConfigError,
    ModelError,
    PlacementError,
    PromptError,
    RewardError,
    TaskError,
)
from epd_ray.evaluation.suites import evaluate as suite
from epd_ray.evaluation.suites.settings import Request
from epd_ray.runs import doctor, report, sample
from epd_ray.runs import evaluate as again
from epd_ray.runs import train as run
from epd_ray.runs.describe import describe
from epd_ray.telemetry.progress import LineObserver


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train(monkeypatch) -> Mock:
    fake = create_autospec(run.train, return_value=["reward 0.7 -> 0.8"])
    monkeypatch.setattr(run, "train", fake)
    return fake


def test_help_imports_nothing_heavy_and_is_quick():
    script = (
        "import sys\nfrom epd_ray.cli import main\ntry:\n    main()\nfinally:\n"
        "    print({'torch', 'ray', 'numpy', 'pydantic', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules))"
        "\n    from tqdm import tqdm\n    list(tqdm([1]))"
    )
    root, seconds = Path(cli.__file__).parents[1], []
    for _ in range(3):
        start = time.perf_counter()
        shown = subprocess.run(
            [sys.executable, "-c", script, "--help"], cwd=root, capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert shown.stdout.endswith("set()\n") and shown.stderr == ""  # no bar of the libraries either
    assert min(seconds) < 1.5
    for command in ("train", "sample", "evaluate", "report", "doctor"):
        assert command in shown.stdout


def test_the_list_of_keys_wraps_and_imports_neither_torch_nor_ray():
    script = "import sys\nfrom epd_ray.cli import main\ntry:\n    main('config')\nfinally:\n"
    script += "    print({'torch', 'ray', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules))"
    shown = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(cli.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "60"},
    )
    lines = shown.stdout.splitlines()
    assert lines[-1] == "set()" and max(map(len, lines)) <= 60
    assert "rdpo.lr: number, default 0.001" in lines and any(line.startswith("tracking.mlflow.") for line in lines)


def test_an_unknown_section_is_one_line_and_exit_code_2():
    result = invoke("config", "rpdo")
    assert (result.exit_code, result.stdout) == (2, "") and "'rdpo'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_train_says_what_it_will_do_and_what_came_of_it(train):
    result = invoke("train", "rdpo.lr=1e-3", "--out", "mine", "seed=7")
    assert result.exit_code == 0, result.output
    config, out, observer = train.call_args.args
    assert (config.rdpo.lr, config.seed, out) == (1e-3, 7, Path("mine"))
    assert isinstance(observer, LineObserver)
    *plan, headline, page, solver = result.stdout.splitlines()
    assert plan == list(describe(config))
    assert (headline, page, solver) == ("reward 0.7 -> 0.8", "report: mine/report.html", "solver: mine/solver")


def test_train_says_what_it_will_do_before_it_imports_ray():
    script = (
        "import sys\nsys.modules['epd_ray.runs.train'] = None\nfrom epd_ray.cli import main\ntry:\n    main('train')\n"
        "except ImportError:\n    print({'ray', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(cli.__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines() == [*describe(RunConfig()), "set()"]


LOST = "backbone.model=/nowhere/at/all"
ABSENT = {
    ("train", "backbone.model=models/sd15/bse"): "'models/sd15/bse'.*; did you mean 'models/sd15/base'",
    ("train", "backbone.model=./models/sd15"): "'./models/sd15' has no model_index.json",
    ("train", LOST): "'/nowhere/at/all'.*no folder '/nowhere/at'",
    ("train", "backbone.model=shape"): "did you mean 'shapes'",
    ("train", "backbone.model=./video"): "'./video' is a WanImageToVideoPipeline.*StableDiffusionPipeline",
    ("distill", LOST): "no folder",
    ("fetch", LOST): "no folder",
    ("sweep", "sweep.space={rdpo.lr: [0.001, 0.002]}", LOST): "no folder",
    ("evaluate", "--suite", "prompts", "lines.txt", "--solver", "sd15-rl", "--out", "run", LOST): "no folder",
    ("sample", "--solver", "sd15-rl", "--prompt", "a", "--model", "/nowhere/at/all"): "no folder",
    ("train", "rewards={web: {head: http, options: {url: 'http://127.0.0.1:9/a'}}}"): "'web'.*http://127.0.0.1:9/a",
}
EACH = """
import json, sys
from typer.testing import CliRunner
from epd_ray.cli import app
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, command)
    print(json.dumps([done.exit_code, done.stderr, done.stdout]))
print({'torch', 'ray', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules))
"""


def test_what_is_not_there_is_named_before_torch_and_ray_are_imported(tmp_path):
    (tmp_path / "models" / "sd15" / "base").mkdir(parents=True)
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / "model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}')
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env["PYTHONPATH"] = str(Path(cli.__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(list(ABSENT))], capture_output=True, text=True, env=env, check=True
    )
    *answers, imported = run.stdout.splitlines()
    for (command, said), answer in zip(ABSENT.items(), answers, strict=True):
        code, line, printed = json.loads(answer)
        head = command[1].startswith("rewards")
        where = "reward head" if head else "--model: " if command[0] == "sample" else "backbone.model: "
        assert (code, printed) == (5 if head else 3, ""), command
        assert re.fullmatch(f"error: {where}.*{said}.*\n", line), command
    assert imported == "set()" and sorted(path.name for path in tmp_path.iterdir()) == ["models", "video"]


def commands(app: Any, *path: str) -> Iterator[tuple[str, ...]]:
    for info in app.registered_commands:
        yield (*path, info.name or info.callback.__name__)
    for group in app.registered_groups:
        yield from commands(group.typer_instance, *path, group.name)


@pytest.mark.parametrize("command", [(), *commands(cli.app)], ids=" ".join)
def test_help_shows_flags_as_flags_and_a_sentence_for_each_option(command):
    shown = invoke(*command, "--help").stdout
    rows = [line.strip("│ ") for line in shown.splitlines() if line.startswith("│")]
    assert "--help" in shown and "<bool>" not in shown
    sentences = [row for row in rows if row.startswith(("-", "*    -"))]
    assert sentences and all(re.search(r"\w\.( |$)", " ".join(rows[rows.index(row) :])) for row in sentences)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(["a: is 0"]), 2),
        (PromptError("p.txt is empty"), 2),
        (ModelError("no model"), 3),
        (PlacementError("no room"), 4),
        (ClusterError("the raylet died"), 4),
        (TaskError("failed 3 times"), 4),
        (RewardError("clip", "is NaN"), 5),
    ],
)
def test_the_exit_code_says_the_kind_of_error(train, error, code):
    train.side_effect = error
    result = invoke("train")
    assert result.exit_code == code and result.stderr.splitlines()[-1] == f"error: {error}"
    assert f"{code} " in invoke("--help").stdout.partition("Exit codes")[2]


def test_train_names_a_new_directory(train):
    assert invoke("train", "name=first").exit_code == 0
    assert re.fullmatch(r"runs/\d{8}-\d{6}-first", str(train.call_args.args[1]))
    assert train.call_args.args[0] == RunConfig(name="first")


def test_train_reports_all_problems_and_writes_nothing(tmp_path, train):
    (tmp_path / "run.yaml").write_text("rdpo: {group_size: 1}\nsolvr: {points: 3}\n")
    before = sorted(tmp_path.iterdir())
    result = invoke("train", "--config", "run.yaml", "solver.points=0", "solver.intervals=0", "--out", "mine")
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split(":")[1] for line in lines] == [
        " solver.intervals",
        " solver.points",
        " rdpo.group_size",
        " solvr",
    ]
    assert all(line.startswith("error: ") for line in lines)
    assert lines[-1].endswith("did you mean 'solver'?")
    assert not train.called
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trian",), "Did you mean 'train'?"),
        (("train", "--confg", "x"), "--config"),
        (("train", "--config", "absent.yaml"), "error: cannot read the configuration absent.yaml"),
        (("train", "--resume", "mine", "seed=1"), "error: --resume continues with the configuration of the run"),
        (("train", "--resume", "mine"), "error: mine is not a directory"),
        (("train", "--resume", ""), "error: . is not a run directory"),
        (("train", "--resume", "", "seed=1"), "error: --resume continues with the configuration of the run"),
        (("distill", "--out", "s3://b/x"), "s3://b/x is a URI"),
        (("sweep", "--out", "s3://b/x"), "s3://b/x is a URI"),
        (("sweep", "--resume", "s3://b/x"), "s3://b/x is a URI"),
        (("score", "pictures", "--out", "s3://b/x"), "s3://b/x is a URI"),
        (("sample", "--solver", "x", "--prompt", "a", "--out", "s3://b/x.png"), "s3://b/x.png is a URI"),
        (("tables", "convert", "sd15-rl", "--out", "s3://b/x"), "s3://b/x is a URI"),
        (("sample", "--prompt", "a star"), "--solver"),
        (("evaluate", "mine", "--count", 0), "--count"),
        (("evaluate",), "error: give one RUN, which takes --count"),
        (("evaluate", "mine", "--solver", "x"), "error: give one RUN, which takes --count"),
        (("evaluate", "--suite", "papers"), "'paper'"),
        (("evaluate", "--suite", "paper"), "error: --suite paper needs --out DIR"),
        (("evaluate", "--suite", "paper", "file.txt", "--out", "x"), "error: 'file.txt': with --suite paper expected"),
        (("evaluate", "--suite", "embedded", "--out", "x"), "error: --suite embedded compares a learned solver"),
        (("evaluate", "--suite", "paper-fid", "--out", "x"), "error: --suite paper-fid needs --table: cifar10_32"),
        (("evaluate", "--suite", "paper", "--out", "s3://b/x"), "s3://b/x is a URI"),
        (("evaluate", "mine", "--split", "train"), "validation"),
        (("evaluate", "mine"), "error: mine is not a directory"),
        (("report", "mine"), "error: mine holds no run"),
    ],
)
def test_bad_input_is_exit_code_2_without_a_traceback(arguments, said):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"a\n\n", "blank"), (b"\xff\n", "not UTF-8")])
def test_bad_prompt_file_stops_before_anything_is_written(tmp_path, content, said):
    (tmp_path / "prompts.txt").write_bytes(content)
    result = invoke("train", "prompts.train=prompts.txt", "--out", "mine")
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tmp_path / "mine").exists()


def test_users_errors_have_a_line_each(train):
    train.side_effect = RewardError("clip", "gave nan", ["r1", "r2"])
    result = invoke("train")
    assert (result.exit_code, result.stderr) == (5, "error: reward head 'clip': gave nan (rollouts r1, r2)\n")


def test_other_errors_keep_their_traceback(train):
    train.side_effect = ZeroDivisionError("a bug")
    assert isinstance(invoke("train").exception, ZeroDivisionError)


@pytest.mark.parametrize("begun", [True, False])
def test_interrupt_says_how_to_continue(tmp_path, train, begun):
    def interrupted(config, out, observer, again, accept):
        if begun:
            out.mkdir()
            (out / "config.yaml").touch()
        raise KeyboardInterrupt

    train.side_effect = interrupted
    result = invoke("train", "--out", "my run")
    assert result.exit_code == 130
    assert result.stderr == ("stopped; continue with: epd-ray train --resume 'my run'\n" if begun else "stopped\n")


def test_resume(monkeypatch):
    fake = create_autospec(run.resume, return_value=["better"])
    monkeypatch.setattr(run, "resume", fake)
    result = invoke("train", "--resume", "mine")
    assert result.stdout.splitlines() == ["better", "report: mine/report.html", "solver: mine/solver"]
    assert fake.call_args.args[0] == Path("mine")
    last = invoke("train", "--resume", "s3://b/mine").stdout.splitlines()[-1]
    assert last == "solver: s3://b/mine/solver (copy it to a disk to sample with it)"


def test_sample(monkeypatch):
    fake = create_autospec(sample.sample)
    monkeypatch.setattr(sample, "sample", fake)
    result = invoke("sample", "--solver", "mine/solver", "--prompt", "a star", "--prompt", "a cross", "--seed", 3)
    assert (result.exit_code, result.stdout) == (0, "picture: sample.png\n")
    fake.assert_called_once_with("mine/solver", ["a star", "a cross"], 3, Path("sample.png"), sample.SampleOptions())


def test_evaluate(monkeypatch):
    fake = create_autospec(again.evaluate, return_value=["better"])
    monkeypatch.setattr(again, "evaluate", fake)
    result = invoke("evaluate", "mine", "--count", 64, "--prompts", "held.txt", "--split", "validation")
    assert result.stdout.splitlines() == ["better"]
    assert fake.call_args.args[:4] == (Path("mine"), 64, Path("held.txt"), "validation")


def test_evaluate_names_the_users_error(monkeypatch):
    fake = create_autospec(again.evaluate, side_effect=PromptError("held.txt is empty"))
    monkeypatch.setattr(again, "evaluate", fake)
    assert invoke("evaluate", "mine").stderr == "error: held.txt is empty\n"


def test_a_suite(monkeypatch):
    fake = create_autospec(suite.evaluate_suite, return_value=["better"])
    monkeypatch.setattr(suite, "evaluate_suite", fake)
    options = ("--solver", "a/solver", "--solver", "b/solver", "--out", "mine", "--images-per-prompt", 2, "--count", 9)
    result = invoke("evaluate", "--suite", "prompts", "own.txt", "--model", "shapes", "seed=3", *options)
    assert result.stdout.splitlines() == ["better"], result.output
    config, request, _ = fake.call_args.args
    assert (config.backbone.model, config.backbone.guidance_scale, config.seed) == ("shapes", None, 3)
    assert request == Request(
        "prompts", Path("mine"), ("a/solver", "b/solver"), count=9, prompts=Path("own.txt"), images_per_prompt=2
    )


def test_an_interrupted_suite_says_how_to_go_on(monkeypatch):
    monkeypatch.setattr(suite, "evaluate_suite", create_autospec(suite.evaluate_suite, side_effect=KeyboardInterrupt))
    result = invoke("evaluate", "--suite", "embedded", "--solver", "a", "--out", "mine")
    assert (result.exit_code, result.stderr) == (130, "stopped: what was scored is in mine; the same command goes on\n")


def test_report(monkeypatch):
    fake = create_autospec(report.write_report, return_value=Path("mine/report.html"))
    monkeypatch.setattr(report, "write_report", fake)
    assert invoke("report", "mine").stdout == "report: mine/report.html\n"


def test_doctor_finds_a_missing_model_and_package(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(bytes(2**20))
    monkeypatch.setattr(doctor, "EMBEDDED", {"whole": tmp_path, "absent": tmp_path / "nowhere"})
    monkeypatch.setattr(doctor, "PACKAGES", {"torch": "Tensor", "no_such_package": "x"})
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "1.0 MiB" in result.stdout
    assert "model absent: reinstall epd-ray, or run jobs/build_shapes.py" in result.stdout
    assert "no_such_package: pip install epd-ray installs it" in result.stdout


def test_doctor_is_content(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("torch", "2.13.0")])
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "2.13.0" in result.stdout
