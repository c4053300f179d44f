"""Runs on other filesystems, their copies, and who may write to them."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
import tenacity
from pyarrow import fs

from epd_ray import lock, mirror
from epd_ray.config import load_config
from epd_ray.errors import ModelError, RunDirectoryError
from epd_ray.lock import LEASE, Holder, Lease, held
from epd_ray.mirror import Mirror, StorageError, open_filesystem
from epd_ray.report import write_report
from epd_ray.rollout_files import TIMINGS
from epd_ray.run import evaluate, resume, train
from epd_ray.storage import RemotePlace, inside, is_uri, place_of
from tests.fakes import Quiet
from tests.test_run import TINY


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(mirror, "WAIT", tenacity.wait_none())
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def temporary(monkeypatch, tmp_path_factory):
    """The copies' home, which every test leaves empty unless it says otherwise."""
    home = tmp_path_factory.mktemp("copies")
    monkeypatch.setattr("tempfile.tempdir", str(home))
    return home


class Fallible(fs.FileSystemHandler):
    """A disk below a folder that refuses to take some files, a number of times, and notes what it took."""

    def __init__(self, folder: Path) -> None:
        self.disk = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
        self.refuse, self.times, self.taken = "", 0, []

    def get_type_name(self):
        return "fallible"

    def get_file_info(self, paths):
        return self.disk.get_file_info(paths)

    def get_file_info_selector(self, selector):
        return self.disk.get_file_info(selector)

    def create_dir(self, path, recursive):
        self.disk.create_dir(path, recursive=recursive)

    def delete_dir(self, path):
        self.disk.delete_dir(path)

    def delete_dir_contents(self, path, missing_dir_ok=False):
        self.disk.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self):
        self.disk.delete_dir_contents("", accept_root_dir=True)

    def delete_file(self, path):
        self.disk.delete_file(path)
        self.taken.append(f"-{path}")

    def move(self, src, dest):
        if self.times and self.refuse in dest:
            self.times -= 1
            raise OSError("the bucket is on fire")
        self.disk.move(src, dest)
        self.taken.append(dest)

    def copy_file(self, src, dest):
        self.disk.copy_file(src, dest)

    def open_input_stream(self, path):
        return self.disk.open_input_stream(path)

    def open_input_file(self, path):
        return self.disk.open_input_file(path)

    def open_output_stream(self, path, metadata):
        return self.disk.open_output_stream(path)

    def open_append_stream(self, path, metadata):
        raise NotImplementedError

    def normalize_path(self, path):
        return path


@pytest.fixture(params=["local", "mock", "memory", "python"])
def root(request, tmp_path):
    """An empty folder on each kind of filesystem."""
    made = {
        "local": lambda: (fs.LocalFileSystem(), str(tmp_path / "remote")),
        "mock": lambda: (fs._MockFileSystem(), "bucket/run"),
        "memory": lambda: open_filesystem(f"memory://bucket-{time.time_ns()}/run"),
        "python": lambda: (fs.PyFileSystem(Fallible(tmp_path)), "remote"),
    }
    filesystem, path = made[request.param]()
    filesystem.create_dir(path, recursive=True)
    return fs.SubTreeFileSystem(path, filesystem)


def names(root: fs.FileSystem) -> list[str]:
    found = root.get_file_info(fs.FileSelector("", recursive=True))
    return sorted(info.path for info in found if info.type == fs.FileType.File)


def read(root: fs.FileSystem, path: str) -> bytes:
    with root.open_input_stream(path) as stream:
        return stream.read()


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def nothing() -> None: ...


def test_a_mirror_follows_and_comes_back(root, tmp_path):
    folder = tmp_path / "folder"
    write(
        folder, config_yaml="seed: 1", checkpoints__a_pt="one", images__samples__b_png="two", metrics_jsonl="x" * 10**5
    )
    write(folder, _lock="held", rollouts___c_tmp="half")  # .lock, rollouts/.c.tmp
    first = Mirror(root, folder, "there", nothing)
    first.push()
    assert names(root) == ["checkpoints/a.pt", "config.yaml", "images/samples/b.png", "metrics.jsonl"]
    (folder / "checkpoints" / "a.pt").unlink()
    write(folder, checkpoints__b_pt="three", config_yaml="seed: 2")
    first.push()
    assert names(root) == ["checkpoints/b.pt", "config.yaml", "images/samples/b.png", "metrics.jsonl"]
    assert read(root, "config.yaml") == b"seed: 2"

    other = tmp_path / "other"
    second = Mirror(root, other, "there", nothing)
    second.pull(["images"])
    assert (other / "metrics.jsonl").read_text() == "x" * 10**5 and (
        other / "checkpoints" / "b.pt"
    ).read_text() == "three"
    assert not (other / "images").exists()
    (other / "metrics.jsonl").unlink()
    second.push()
    assert names(root) == ["checkpoints/b.pt", "config.yaml", "images/samples/b.png"]  # what was left out is left alone


def fallible(tmp_path: Path) -> tuple[Fallible, fs.FileSystem]:
    (tmp_path / "remote").mkdir()
    handler = Fallible(tmp_path / "remote")
    return handler, fs.PyFileSystem(handler)


def test_only_what_changed_is_uploaded_and_in_an_order_that_may_break_off(tmp_path):
    handler, root = fallible(tmp_path)
    folder = tmp_path / "folder"
    write(folder, config_yaml="c", checkpoints__a_pt="1", rollouts__1_parquet="r", solver__solver_json="s")
    copy = Mirror(root, folder, "there", nothing)
    copy.push()
    assert handler.taken[-2:] == ["checkpoints/a.pt", "config.yaml"] and len(handler.taken) == 4
    handler.taken.clear()
    copy.push()
    assert handler.taken == []
    write(folder, checkpoints__b_pt="2", rollouts__2_parquet="r2")
    (folder / "checkpoints" / "a.pt").unlink()
    copy.push()
    assert handler.taken == ["rollouts/2.parquet", "checkpoints/b.pt", "-checkpoints/a.pt"]
    handler.taken.clear()
    shutil.rmtree(folder)
    copy.push()
    assert handler.taken[:2] == ["-config.yaml", "-checkpoints/b.pt"]
    assert names(root) == []


def test_an_upload_is_repeated_and_then_an_error(tmp_path):
    handler, root = fallible(tmp_path)
    folder = tmp_path / "folder"
    write(folder, config_yaml="c", checkpoints__a_pt="1")
    copy = Mirror(root, folder, "there", nothing)
    handler.refuse, handler.times = "checkpoints", mirror.ATTEMPTS - 1
    copy.push()
    assert len(handler.taken) == 2
    write(folder, config_yaml="changed", checkpoints__a_pt="changed")
    handler.times = mirror.ATTEMPTS
    with pytest.raises(StorageError, match=r"^cannot write to there: the bucket is on fire$"):
        copy.push()
    assert read(root, "checkpoints/a.pt") == b"1" and read(root, "config.yaml") == b"c"  # the state before, whole
    copy.push()
    assert read(root, "checkpoints/a.pt") == read(root, "config.yaml") == b"changed"


def remote(tmp_path: Path) -> tuple[Fallible, RemotePlace]:
    handler = Fallible(tmp_path)
    return handler, RemotePlace("fire://bucket/mine", fs.PyFileSystem(handler), "mine")


def test_a_failed_save_is_made_good_by_the_next(tmp_path, caplog, temporary):
    handler, place = remote(tmp_path)
    with place.claimed() as folder:
        assert folder.name == "mine"
        write(folder, config_yaml="c")
        place.save()
        handler.refuse, handler.times = "checkpoints", mirror.ATTEMPTS
        write(folder, checkpoints__a_pt="1")
        place.save()
        said = "cannot write to fire://bucket/mine: the bucket is on fire: it is tried again at the next checkpoint"
        assert [r.message for r in caplog.records] == [said]
        place.save()
        assert "checkpoints/a.pt" in names(place._root)
    assert list(temporary.iterdir()) == []
    assert names(place._root) == ["checkpoints/a.pt", "config.yaml"]  # no lease


@pytest.mark.parametrize("interrupted", [False, True])
def test_what_cannot_be_saved_in_the_end_stays_here(tmp_path, caplog, temporary, interrupted):
    handler, place = remote(tmp_path)
    with pytest.raises(KeyboardInterrupt if interrupted else StorageError) as said, place.claimed() as folder:
        write(folder, config_yaml="c")
        handler.refuse, handler.times = "config", mirror.ATTEMPTS
        if interrupted:
            raise KeyboardInterrupt
    told = caplog.records[0].message if interrupted else str(said.value)
    assert str(folder) in told and "on fire" in told and "\n" not in told
    assert (folder / "config.yaml").read_text() == "c"


def test_a_place_that_is_not_free_is_refused(tmp_path, temporary):
    uri = f"file://{tmp_path}/run"
    place = place_of(uri)
    assert not place.begun()
    place.require_new()
    with pytest.raises(RunDirectoryError, match=r"run is not a run directory: config\.yaml missing"):
        place.require_run()
    write(tmp_path / "run", notes_txt="mine")
    with pytest.raises(RunDirectoryError, match=rf"^{uri} is not empty \(it holds 'notes.txt'\): name a new"):
        place.require_new()
    write(tmp_path / "run", config_yaml="")
    with pytest.raises(RunDirectoryError, match=rf"^{uri} holds another run: resume it"):
        place.require_new()
    assert place.begun() and list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nosuch://bucket/run", "cannot open nosuch://bucket/run: Unrecognized filesystem type in URI.*nosuch"),
        ("s3://key:secret@bucket/run", "holds a secret key: leave it out, credentials come from the environment"),
    ],
)
def test_filesystems_that_cannot_be(uri, said):
    with pytest.raises(StorageError, match=said) as raised:
        place_of(uri)
    assert "\n" not in str(raised.value) and "key:secret" not in str(raised.value)


def test_names_for_people():
    assert is_uri("s3://a/b") and not is_uri(Path("runs/x")) and not is_uri("c:/x")
    assert inside(Path("runs/x"), "report.html") == "runs/x/report.html"
    assert inside("s3://b/x/?region=eu", Path("a/b.html")) == "s3://b/x/a/b.html"


# -- one writer --------------------------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_and_ends_with_its_process(tmp_path):
    path = tmp_path / ".lock"
    code = (
        "import sys, time; from pathlib import Path; from epd_ray.lock import held\n"
        "with held(Path(sys.argv[1]), 'x'):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError) as said, held(path, "runs/x"):
            pass
        who = f"runs/x is in use by process {process.pid} on {socket.gethostname()} since 20"
        assert str(said.value).startswith(who) and "\n" not in str(said.value)
    finally:
        process.kill()
        process.wait()
    with held(path, "runs/x"):
        assert f"process {os.getpid()} " in path.read_text()
    with held(path, "runs/x"), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError


def test_a_claim_that_comes_to_nothing_leaves_nothing(tmp_path):
    place = place_of(tmp_path / "a" / "b")
    with pytest.raises(ZeroDivisionError), place.claimed() as folder:
        assert [path.name for path in folder.iterdir()] == [".lock"]
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def holder(**changes: object) -> Holder:
    now = time.time()
    return replace(Holder("elsewhere", 7, now - 60, now, "theirs"), **changes)  # type: ignore[arg-type]


def put(root: fs.FileSystem, other: Holder) -> None:
    with root.open_output_stream(LEASE) as stream:
        stream.write(json.dumps(asdict(other)).encode())


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_lease_is_held_by_one(root):
    with Lease(root, "s3://b/x").held(wait=False):
        mine = json.loads(read(root, LEASE))
        assert (mine["host"], mine["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(RunDirectoryError) as said, Lease(root, "s3://b/x").held(wait=False):
            pass
        assert str(said.value).startswith(
            f"s3://b/x is in use by process {os.getpid()} on {socket.gethostname()} since "
        )
        assert "wait 1" in str(said.value) and "or delete lease.json there" in str(said.value)
        assert json.loads(read(root, LEASE)) == mine
    assert names(root) == []


@pytest.mark.parametrize(
    "changes",
    [{"renewed": 0.0}, {"host": socket.gethostname(), "pid": dead_process()}],
    ids=["silent", "dead"],
)
def test_a_dead_holders_lease_is_taken_over(root, changes):
    put(root, holder(**changes))
    with Lease(root, "x").held(wait=False):
        assert json.loads(read(root, LEASE))["pid"] == os.getpid()


def test_a_lease_that_is_none_is_taken_over(root):
    with root.open_output_stream(LEASE) as stream:
        stream.write(b"hello")
    with Lease(root, "x").held(wait=False):
        pass


def test_waiting_for_a_silent_holder(root, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.5)
    put(root, holder())
    with Lease(root, "x").held(wait=True):
        assert json.loads(read(root, LEASE))["pid"] == os.getpid()


def test_waiting_ends_with_a_sign_of_life(root, monkeypatch):
    put(root, holder())

    def sign_of_life(seconds: float) -> None:
        put(root, holder())

    monkeypatch.setattr(lock.time, "sleep", sign_of_life)
    with pytest.raises(RunDirectoryError, match="in use by process 7 on elsewhere"), Lease(root, "x").held(wait=True):
        pass


def test_a_lease_is_renewed_until_it_ends(root, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    with Lease(root, "x").held(wait=False):
        first = json.loads(read(root, LEASE))["renewed"]
        deadline = time.monotonic() + 60
        while json.loads(read(root, LEASE) or b'{"renewed": 0}')["renewed"] <= first:
            assert time.monotonic() < deadline
    assert names(root) == []


def test_who_was_taken_over_writes_no_more(tmp_path, temporary):
    _, place = remote(tmp_path)
    with pytest.raises(RunDirectoryError, match="was taken over by process 7 on elsewhere"), place.claimed() as folder:
        write(folder, config_yaml="c")
        put(place._root, holder())
        place.save()
    assert names(place._root) == [LEASE]  # theirs


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(small_ray, tmp_path_factory):
    out = tmp_path_factory.mktemp("local") / "run"
    return out, train(load_config(None, TINY), out, Quiet())


def rollouts(run: Path):
    return pq.read_table(run / "rollouts").drop_columns(TIMINGS)


@pytest.mark.slow
def test_a_run_by_uri_is_the_same_as_a_local_one(local, tmp_path, temporary):
    whole, lines = local
    there = tmp_path / "bucket" / "run"
    uri = f"file://{there}"
    with pytest.raises(KeyboardInterrupt):
        train(load_config(None, TINY), uri, Quiet(interrupt_after=3))
    assert (there / "checkpoints" / "iteration-000003.pt").is_file() and not (there / LEASE).exists()
    ids = pq.read_table(there / "rollouts", columns=["rollout_id"]).column(0).to_pylist()
    assert len(ids) == len(set(ids)) == 3 * 32
    assert resume(uri, Quiet()) == lines
    assert rollouts(there) == rollouts(whole)
    own = (
        "tensorboard",
        "checkpoints",
        ".lock",
    )  # event files have the time in their names; 3.pt came to the interrupt
    files = {part for path in whole.rglob("*") if (part := path.relative_to(whole)).parts[0] not in own}
    assert files <= {path.relative_to(there) for path in there.rglob("*")}
    *_, report = evaluate(uri, 4, None, "validation", Quiet())
    assert report == f"report: {uri}/evaluations/validation-4/report.html"
    assert (there / "evaluations" / "validation-4" / "report.html").is_file()
    assert train(load_config(None, TINY), uri, Quiet(), again=True) == lines
    with place_of(uri).visited() as folder:
        assert not (folder / "checkpoints").exists() and write_report(folder).is_file()
    with pytest.raises(RunDirectoryError, match="holds another run: resume it"):
        train(load_config(None, TINY), uri, Quiet())
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_run_in_fsspecs_memory(local, temporary):
    _, lines = local
    uri = f"memory://bucket-{time.time_ns()}/runs/mine"
    assert train(load_config(None, TINY), uri, Quiet()) == lines
    memory = fsspec.filesystem("memory")
    path = uri.removeprefix("memory://")
    assert memory.cat(f"{path}/report.html").startswith(b"<!")
    newest = f"{path}/checkpoints/iteration-000006.pt"
    memory.pipe(newest, memory.cat(newest)[:99])  # damaged there: the one before, and the same end
    assert resume(uri, Quiet()) == lines
    assert len(memory.cat(newest)) > 99 and list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_model_that_cannot_be_opened_leaves_nothing_there(small_ray, tmp_path, temporary):
    broken = [*TINY, "backbone.family=auto", "backbone.model=/nowhere/at/all"]
    with pytest.raises(ModelError, match="no directory"):
        train(load_config(None, broken), f"file://{tmp_path}/run", Quiet())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [] and list(temporary.iterdir()) == []
