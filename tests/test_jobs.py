"""jobs/*.py, submitted to a head with token authentication: logs, exit codes, and what a stopped job leaves behind."""

import json
import runpy
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env.packaging import create_package

from tests.ray_head import Head, clean_env, ray_head
from tests.test_readme import commands

ROOT = Path(__file__).parent.parent
JOBS = ("train", "distill", "evaluate", "sample", "score", "sweep")
TOKEN = "c3" * 16
SECONDS = 300  # for a job, on a busy machine

SIMULATED = ["backbone.family=simulated", "rewards={sim: {head: simulated}}", "solver.intervals=3"]
SIMULATED += ["cluster.rollout_actors=1", "cluster.learner_actors=0", "prompts.validation=4", "prompts.test=4"]
SIMULATED += [
    "evaluation.pictures=2",
    "evaluation.baselines=[euler]",
    "evaluation.tune=false",
    "rdpo.prompts_per_iteration=2",
    "rdpo.minibatch_size=8",
]
EMBEDDED = ["distill.prompts=4", "distill.grid=3", "distill.teacher_steps=2", "prompts.validation=2"]
EMBEDDED += ["cluster.rollout_actors=1", "evaluation.baselines=[euler]", "evaluation.tune=false"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_its_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    job = ROOT / "jobs" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(job), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(job), run_name="__main__")
    assert ended.value.code == 0 and f"epd-ray {name} " in capsys.readouterr().out
    assert len(job.read_text().splitlines()) <= 6


def written_by_the_documents() -> set[str]:
    """Where the documented commands write, in a clone in which they run one after the other."""
    given = {command[i + 1] for command in commands() for i, word in enumerate(command) if word == "--out"}
    return {place.rstrip("/") for place in given if not place.startswith("/") and "://" not in place}


def test_what_the_commands_write_is_not_uploaded(tmp_path: Path) -> None:
    """In Ray's own package of a clone, of which a dashboard refuses 100 MB."""
    clone = tmp_path / "clone"
    tracked = ["epd_ray/bench/cases.py", "epd_ray/solvers/solver.py", "jobs/configs/sweeps/embedded.yaml"]
    for name in (".gitignore", *tracked):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    defaults = {"runs/20260101-000000-shapes", "solvers/20260101-000000-shapes", "sweeps/20260101-000000-shapes"}
    written = written_by_the_documents()
    assert {"results/mine", "scores"} <= written
    for name in written | defaults | {"results", "bench"}:
        (clone / name).mkdir(parents=True, exist_ok=True)
        (clone / name / "data.parquet").write_bytes(bytes(1000))
    (clone / "sample.png").write_bytes(bytes(1000))
    create_package(str(clone), package := tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(package) as packed:
        assert {name for name in packed.namelist() if not name.endswith("/")} == {".gitignore", *tracked}


# -- on a head ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cli:
    """`ray job ...` against a head, as a person types it."""

    head: Head

    def _ray(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "job", arguments[0], "--address", self.head.dashboard, *arguments[1:]]
        env = {**self.head.env, "NO_COLOR": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=SECONDS + 60, check=False
        )

    def submit(self, name: str, *entrypoint: str, runtime_env: Mapping[str, object] | None = None) -> None:
        """Submit a job under a name and do not wait for it."""
        more = ["--runtime-env-json", json.dumps(runtime_env)] if runtime_env else []
        line = [sys.executable, *entrypoint]
        done = self._ray("submit", "--working-dir", ".", "--no-wait", "--submission-id", name, *more, "--", *line)
        assert done.returncode == 0, done.stdout + done.stderr

    def _ask(self, path: str, method: str = "GET") -> dict[str, Any]:
        """The dashboard's own answer: what `ray job status`, `logs` and `stop` show, without starting Python."""
        token = {"Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(f"{self.head.dashboard}/api/jobs/{path}", method=method, headers=token)
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def status(self, name: str) -> str:
        return str(self._ask(name)["status"])

    def message(self, name: str) -> str:
        return str(self._ask(name)["message"])

    def logs(self, name: str) -> str:
        return str(self._ask(f"{name}/logs")["logs"])

    def stop(self, name: str) -> None:
        assert self._ask(f"{name}/stop", "POST")["stopped"]

    def ended(self, name: str) -> str:
        """Wait for the end: the status."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            status = self.status(name)
            if status in ("SUCCEEDED", "FAILED", "STOPPED"):
                return status
            time.sleep(1)
        raise AssertionError(f"job {name} did not end:\n{self.logs(name)}")

    def done(self, name: str, *entrypoint: str) -> str:
        """Submit, wait, and give the logs of a job that succeeded."""
        self.submit(name, *entrypoint)
        status, logs = self.ended(name), self.logs(name)
        assert status == "SUCCEEDED", logs
        return logs


@pytest.fixture(scope="module")
def cli() -> Iterator[Cli]:
    with ray_head(token=TOKEN, num_cpus=8, env={"RAY_JOB_STOP_WAIT_TIME_S": "30"}) as head:
        yield Cli(head)


def solver_of(run: Path) -> str:
    return (run / "solver" / "solver.json").read_text()


@pytest.mark.slow
def test_nobody_submits_without_the_token(cli: Cli) -> None:
    stranger = Cli(Head(cli.head.address, cli.head.dashboard, cli.head.folder, clean_env() | {"HOME": "/nowhere"}, 0))
    refused = stranger._ray("list")
    assert refused.returncode != 0 and "oken" in refused.stdout + refused.stderr
    assert TOKEN not in refused.stdout + refused.stderr


@pytest.mark.slow
def test_train_evaluate_and_sample_as_jobs(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    logs = cli.done(
        "train", "jobs/train.py", "--out", str(run), *SIMULATED, "distill.enabled=false", "rdpo.iterations=2"
    )
    for line in ("starting actors 1/1", "fine-tuning 2/2, reward", "EPD + RDPO", f"report: {run}/report.html"):
        assert line in logs
    assert "Traceback" not in logs and (run / "report.html").is_file()
    logs = cli.done("evaluate", "jobs/evaluate.py", str(run), "--split", "validation")
    assert "EPD + RDPO" in logs and list((run / "evaluations").iterdir())
    picture = tmp_path / "picture.png"
    logs = cli.done(
        "sample", "jobs/sample.py", "--solver", str(run / "solver"), "--prompt", "any", "--out", str(picture)
    )
    assert f"picture: {picture}" in logs and picture.stat().st_size > 50


@pytest.mark.nightly
def test_distill_the_embedded_model_as_a_job(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "distilled"
    logs = cli.done("distill", "jobs/distill.py", "--out", str(out), *EMBEDDED)
    assert "from the teacher's pictures" in logs and f"solver: {out}" in logs
    assert (out / "solver.json").is_file()


@pytest.mark.slow
def test_wrong_settings_fail_the_job_with_a_line(cli: Cli, tmp_path: Path) -> None:
    cli.submit("misspelt", "jobs/train.py", "--out", str(tmp_path / "run"), "rdpo.learning_rate=1")
    assert cli.ended("misspelt") == "FAILED"
    logs = cli.logs("misspelt")
    assert "error: rdpo.learning_rate" in logs and "Traceback" not in logs and not (tmp_path / "run").exists()
    assert "exit code 2" in cli.message("misspelt")


@pytest.mark.nightly
def test_resources_that_are_not_there_fail_the_job_and_are_named(cli: Cli, tmp_path: Path) -> None:
    asked = [*SIMULATED, "cluster.rollout_gpus=1", "rewards.sim.resources={reward: 1}"]
    cli.submit("large", "jobs/train.py", "--out", str(tmp_path / "run"), *asked)
    assert cli.ended("large") == "FAILED"
    (line,) = [line for line in cli.logs("large").splitlines() if line.startswith("error: ")]
    assert line.startswith("error: no room for the actors after 30 s (GPU: 1 asked, 0 free, reward: 1 asked, 0 free)")
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_a_hook_of_the_jobs_own_is_refused_with_a_line(cli: Cli, tmp_path: Path) -> None:
    own = {"worker_process_setup_hook": "os.getpid", "env_vars": {"MY_VARIABLE": "set"}}
    arguments = [*SIMULATED, "cluster.env=[HOME]"]
    cli.submit("hooked", "jobs/train.py", "--out", str(tmp_path / "run"), *arguments, runtime_env=own)
    assert cli.ended("hooked") == "FAILED"
    assert "error: the job has its own worker_process_setup_hook, but Ray takes only one" in cli.logs("hooked")


@pytest.mark.slow
def test_a_stopped_job_leaves_a_checkpoint_and_goes_on_to_the_same_end(cli: Cli, tmp_path: Path) -> None:
    """No checkpoint is due before the end but that of the start: what is there later was made by the stop."""
    settings = [*SIMULATED, "distill.enabled=false", "rdpo.iterations=30", "checkpoint.every=1000"]
    settings += ["backbone.options={latency: 0.05}"]  # 0.3 s an iteration
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    cli.submit("stopped", "jobs/train.py", "--out", str(stopped), *settings)
    wait_for(lambda: len(list(stopped.glob("rollouts/*.parquet"))) >= 3, cli, "stopped")
    cli.stop("stopped")
    assert cli.ended("stopped") == "STOPPED"
    done = iterations(stopped)
    assert 3 <= done < 30
    assert newest_checkpoint(stopped) in (done, done - 1)
    assert not (stopped / "report.html").exists()
    cli.submit("whole", "jobs/train.py", "--out", str(whole), *settings)
    logs = cli.done("resumed", "jobs/train.py", "--resume", str(stopped))
    assert f"fine-tuning {newest_checkpoint_of_log(logs)}/30" in logs
    assert cli.ended("whole") == "SUCCEEDED"
    assert solver_of(stopped) == solver_of(whole)
    assert iterations(stopped) == iterations(whole) == 30


def wait_for(condition, cli: Cli, name: str) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end and cli.status(name) not in ("FAILED", "SUCCEEDED"), cli.logs(name)
        time.sleep(0.2)


def iterations(run: Path) -> int:
    return len(list(run.glob("rollouts/*.parquet")))


def newest_checkpoint(run: Path) -> int:
    return max(int("".join(filter(str.isdigit, path.name))) for path in run.glob("checkpoints/iteration-*.pt"))


def newest_checkpoint_of_log(logs: str) -> int:
    """Where fine-tuning went on: the second of its lines, the first being 0."""
    counts = [line.split()[1] for line in logs.splitlines() if line.startswith("fine-tuning ")]
    return int(counts[1].split("/")[0])
