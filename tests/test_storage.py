"""Runs on other filesystems, their copies, and who may write to them."""

import errno
import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
import tenacity
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from epd_ray.config.loading import load_config, to_yaml
from epd_ray.errors import EpdRayError, ModelError, RunDirectoryError
from epd_ray.runs.evaluate import evaluate
from epd_ray.runs.lost import lost_iterations
from epd_ray.runs.report import write_report
from epd_ray.runs.train import resume, train
from epd_ray.storage import lock, mirror
from epd_ray.storage.lock import LEASE, Holder, Lease, held
from epd_ray.storage.mirror import Mirror, StorageError, open_filesystem
from epd_ray.storage.places import LocalPlace, RemotePlace, inside, is_uri, place_of
from epd_ray.storage.rollouts import TIMINGS
from epd_ray.storage.run_directory import RunDirectory, write_text
from tests.conftest import TINY
from tests.fakes import Quiet


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(mirror, "WAIT", tenacity.wait_none())
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.1)


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
        self.error: Exception = OSError("the bucket is on fire")

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
            raise self.error
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
    write(folder, stages_json="{}")  # with it, and the report, a run is finished
    copy = Mirror(root, folder, "there", nothing)
    copy.push()
    assert handler.taken[-3:] == ["checkpoints/a.pt", "config.yaml", "stages.json"] and len(handler.taken) == 5
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
    assert handler.taken[:3] == ["-stages.json", "-config.yaml", "-checkpoints/b.pt"]
    assert names(root) == []


@pytest.mark.parametrize("error", [OSError, RuntimeError])  # fsspec's filesystems raise what they like
def test_an_upload_is_repeated_and_then_an_error(tmp_path, error):
    handler, root = fallible(tmp_path)
    handler.error = error("the bucket is on fire")
    folder = tmp_path / "folder"
    write(folder, config_yaml="c", checkpoints__a_pt="1")
    copy = Mirror(root, folder, "there", nothing)
    handler.refuse, handler.times = "checkpoints", mirror.ATTEMPTS - 1
    copy.push()
    assert len(handler.taken) == 2
    write(folder, config_yaml="changed", checkpoints__a_pt="changed")
    handler.times = mirror.ATTEMPTS
    with pytest.raises(StorageError, match=r"there.*the bucket is on fire$"):
        copy.push()
    assert read(root, "checkpoints/a.pt") == b"1" and read(root, "config.yaml") == b"c"  # the state before, whole
    copy.push()
    assert read(root, "checkpoints/a.pt") == read(root, "config.yaml") == b"changed"


def test_files_that_go_while_they_are_saved_end_nothing(tmp_path, monkeypatch):
    handler, root = fallible(tmp_path)
    folder = tmp_path / "folder"
    write(folder, config_yaml="c", early_txt="seen, then gone", late_txt="listed, then gone")
    stamp = Mirror._stamp

    def gone(self: Mirror, path: str) -> tuple[int, int]:
        if path == "early.txt":
            (folder / path).unlink()
        return stamp(self, path)

    monkeypatch.setattr(Mirror, "_stamp", gone)
    copy = Mirror(root, folder, "there", nothing)
    listed = copy._stamps()
    assert set(listed) == {"config.yaml", "late.txt"}
    (folder / "late.txt").unlink()
    monkeypatch.setattr(copy, "_stamps", lambda: listed)
    copy.push()
    assert handler.taken == ["config.yaml"]


def test_what_others_have_written_is_seen():
    class Remembering(MemoryFileSystem):
        cachable = False
        seen: dict[str, object] = {}  # noqa: RUF012

        def info(self, path, **kwargs):
            return self.seen.setdefault(path, super().info(path, **kwargs))

        def invalidate_cache(self, path=None):
            self.seen.clear()

    root, path = fs.PyFileSystem(mirror.Fresh(Remembering())), f"bucket-{time.time_ns()}"
    for text in ("one", "three"):
        MemoryFileSystem().pipe(path, text.encode())
        assert root.get_file_info(path).size == len(text)


def remote(tmp_path: Path) -> tuple[Fallible, RemotePlace]:
    handler = Fallible(tmp_path)
    return handler, RemotePlace("fire://bucket/mine", fs.PyFileSystem(handler), "mine")


def test_a_remote_place_knows_whose_rollouts_it_holds(tmp_path):
    _, place = remote(tmp_path)
    assert place.rollouts_elsewhere() == set() and LocalPlace(tmp_path).rollouts_elsewhere() is None
    folder = tmp_path / "mine" / "rollouts"
    folder.mkdir(parents=True)
    for name, text in (("1", "x"), ("2", ""), ("3", "x")):  # an empty file holds no rollouts
        (folder / f"iteration-00000{name}.parquet").write_text(text)
    (folder / "iteration-4.parquet").write_text("x")
    assert place.rollouts_elsewhere() == {1, 3}
    run = RunDirectory(tmp_path)
    run.metrics.write_text("".join(f'{{"iteration": {i}}}\n' for i in range(4)))
    assert lost_iterations(run, 3, place.rollouts_elsewhere()) == [2] and lost_iterations(run, 3) == [1, 2, 3]


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
    assert "on fire" in (caplog.records[0].message if interrupted else str(said.value))
    assert caplog.records[-1].message == f"fire://bucket/mine was not saved whole: its copy stays in {folder}"
    assert (folder / "config.yaml").read_text() == "c"


@pytest.mark.parametrize("inside", [KeyboardInterrupt, None])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_whatever_ends_the_last_save_the_copy_stays(tmp_path, caplog, monkeypatch, temporary, inside, error):
    def end(self: Mirror, path: str) -> None:
        raise error

    _, place = remote(tmp_path)
    monkeypatch.setattr(Mirror, "_upload", end)
    with pytest.raises((KeyboardInterrupt, SystemExit, StorageError)), place.claimed() as folder:
        write(folder, config_yaml="c")
        if inside:
            raise inside
    assert caplog.records[-1].message.endswith(f"its copy stays in {folder}")
    assert (folder / "config.yaml").read_text() == "c"


def damage(run: Path, what: str) -> None:
    prompts = json.dumps({"train": ["a"], "validation": ["b"], "test": ["c"]})
    write(run, config_yaml=to_yaml(load_config(None, TINY)), versions_json="{}", prompts_json=prompts)
    if what == "checkpoints":
        write(run, checkpoints__iteration_000001_pt="none")
        (run / "checkpoints" / "iteration.000001.pt").rename(run / "checkpoints" / "iteration-000001.pt")
    elif what == "config":
        write(run, config_yaml="format: 99")
    else:
        (run / f"{what}.json").unlink()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("versions", "{} is not a run directory: versions.json missing"),
        ("config", "{}/config.yaml was written by a newer epd_ray"),
        ("prompts", "{}/prompts.json cannot be read"),
        ("checkpoints", "all 1 checkpoints in {}/checkpoints are damaged"),
    ],
)
def test_what_is_wrong_with_a_remote_run_is_said_of_it(tmp_path, temporary, what, said):
    uri = f"file://{tmp_path}/run"
    damage(tmp_path / "run", what)
    with pytest.raises(EpdRayError) as raised:
        resume(uri, Quiet())
    assert str(raised.value).startswith(said.format(uri)) and str(temporary) not in str(raised.value)


def test_a_place_that_is_not_free_is_refused(tmp_path, temporary):
    uri = f"file://{tmp_path}/run"
    place = place_of(uri)
    assert not place.begun()
    place.require_new()
    with pytest.raises(RunDirectoryError, match=r"config\.yaml"):
        place.require_run()
    write(tmp_path / "run", notes_txt="mine")
    with pytest.raises(RunDirectoryError, match=rf"^{uri} .*'notes\.txt'"):
        place.require_new()
    write(tmp_path / "run", config_yaml="")
    with pytest.raises(RunDirectoryError, match=rf"^{uri} .*another run"):
        place.require_new()
    assert place.begun() and list(temporary.iterdir()) == []


SECRETS = (
    "s3://key:5ecret@bucket/run",
    "s3://key:5e/cret@bucket/run",  # AWS's may have a slash
    "abfs://container@account.dfs.core.windows.net/run?client_id=me&client_secret=5ecret",
    "memory://bucket/run?sig=5ecret",
)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("nosuch://bucket/run", "cannot open nosuch://bucket/run: Unrecognized filesystem type in URI.*nosuch"),
        ("s3://[b/run", r"cannot open s3://\[b/run: Cannot parse URI"),
        *((uri, "holds a secret key: leave it out, credentials come from the environment") for uri in SECRETS),
    ],
)
def test_filesystems_that_cannot_be(uri, said):
    with pytest.raises(StorageError, match=said) as raised:
        place_of(uri)
    assert "\n" not in str(raised.value) and "5ecret" not in str(raised.value)


@pytest.mark.parametrize(
    "uri", ["abfs://container@account.dfs.core.windows.net/x", "s3://b/x?endpoint_override=a:9000"]
)
def test_what_is_no_secret_passes(uri):
    assert not mirror.SECRET.search(uri)


def test_names_for_people():
    assert is_uri("s3://a/b") and not is_uri(Path("runs/x")) and not is_uri("c:/x")
    assert inside(Path("runs/x"), "report.html") == "runs/x/report.html"
    assert inside("s3://b/x/?region=eu", Path("a/b.html")) == "s3://b/x/a/b.html"


# -- one writer --------------------------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_and_ends_with_its_process(tmp_path):
    path = tmp_path / ".lock"
    code = (
        "import sys, time; from pathlib import Path; from epd_ray.storage.lock import held\n"
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


def test_a_claim_that_is_refused_leaves_the_lock_of_another(tmp_path):
    place = place_of(tmp_path / "a")
    with place.claimed() as folder:
        with pytest.raises(RunDirectoryError, match="in use by"), place.claimed():
            pass
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_lock_whose_file_was_removed_while_it_was_opened_locks_nothing(tmp_path, monkeypatch):
    path, locked = tmp_path / ".lock", lock._locked
    removed = []

    def remove(descriptor: int, name: str) -> bool:
        """As the holder before does at its end, between this one's opening and locking the file."""
        if not removed:
            removed.append(path.unlink())
        return locked(descriptor, name)

    monkeypatch.setattr(lock, "_locked", remove)
    with held(path, "runs/x"):
        assert removed and path.is_file()
        with pytest.raises(RunDirectoryError, match="in use by"), held(path, "runs/x"):
            pass


def test_two_claims_of_which_one_ends_with_the_others_beginning(tmp_path, monkeypatch):
    place, other, locked = place_of(tmp_path / "a"), place_of(tmp_path / "a"), lock._locked
    first = place.claimed()
    first.__enter__()

    def end_first(descriptor: int, name: str) -> bool:
        monkeypatch.setattr(lock, "_locked", locked)
        first.__exit__(None, None, None)
        assert not (tmp_path / "a").exists()
        return locked(descriptor, name)

    monkeypatch.setattr(lock, "_locked", end_first)
    with other.claimed(), pytest.raises(RunDirectoryError, match="in use by"), place_of(tmp_path / "a").claimed():
        pass


def test_what_is_removed_in_the_end_is_ones_own_lock(tmp_path):
    place = place_of(tmp_path / "a")
    with place.claimed() as folder:
        shutil.rmtree(folder)
        with place_of(folder).claimed():
            pass
        folder.mkdir()
        (folder / ".lock").touch()  # of another by now
    assert (folder / ".lock").is_file()


def test_a_disk_that_cannot_sync_directories_will_do(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "a.txt", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def holder(**changes: object) -> Holder:
    now = time.time()
    return replace(Holder("elsewhere", "another", 7, now - 60, now, "theirs"), **changes)  # type: ignore[arg-type]


def put(root: fs.FileSystem, other: Holder) -> None:
    with root.open_output_stream(LEASE) as stream:
        stream.write(json.dumps(asdict(other)).encode())


@pytest.fixture
def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


class Clock:
    """The clocks of this machine: `monotonic` goes on with `sleep`, then calls `hook`; `time` is wrong."""

    def __init__(self, skew: float) -> None:
        self.now, self.skew, self.hook = 0.0, skew, lambda: None
        self.strftime, self.gmtime = time.strftime, time.gmtime

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time() + self.skew

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.hook()


@pytest.fixture(params=[0.0, 1e6, -1e6], ids=["right", "ahead", "behind"])  # seconds
def clock(request, monkeypatch):
    for name in ("SETTLE_SECONDS", "POLL_SECONDS", "WATCH_SECONDS"):
        monkeypatch.setattr(lock, name, {"SETTLE": 1.0, "POLL": 5.0, "WATCH": 70.0}[name.partition("_")[0]])
    made = Clock(request.param)
    monkeypatch.setattr(lock, "time", made)
    return made


def test_a_lease_is_held_by_one(root, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 60.0)
    with Lease(root, "s3://b/x").held():
        mine = json.loads(read(root, LEASE))
        assert (mine["host"], mine["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(RunDirectoryError) as said, Lease(root, "s3://b/x").held():
            pass
        assert str(said.value).startswith(
            f"s3://b/x is in use by process {os.getpid()} on {socket.gethostname()} since "
        )
        assert json.loads(read(root, LEASE) or b"{}").get("token", mine["token"]) == mine["token"]
    assert names(root) == []


@pytest.mark.parametrize("renewal", [20.0, 60.0])  # the latter after two that failed
def test_a_live_holder_is_refused_whatever_the_clocks_say(root, clock, renewal, caplog):
    first = holder()
    put(root, first)
    clock.hook = lambda: put(root, replace(first, renewed=first.renewed + clock.now // renewal))
    with (
        pytest.raises(RunDirectoryError, match=r"^x is in use by process 7 on elsewhere since"),
        Lease(root, "x").held(),
    ):
        pass
    assert renewal <= clock.now <= renewal + 5
    said = "x is leased to process 7 on elsewhere since .*: it is watched for 70 s, and taken over if no sign of life"
    assert len(caplog.messages) == 1 and re.match(said, caplog.messages[0])


def test_a_silent_holder_is_taken_over_whatever_the_clocks_say(root, clock):
    put(root, holder())
    with Lease(root, "x").held():
        assert json.loads(read(root, LEASE))["pid"] == os.getpid()
        assert 70 <= clock.now <= 80


def test_an_answer_that_takes_long_is_no_sign_of_death(root, clock, monkeypatch):
    first = holder()
    put(root, first)
    answer = Lease._read

    def slow(self: Lease) -> Holder | None:
        found = answer(self)
        clock.now += 100
        put(root, replace(first, renewed=first.renewed + clock.now))
        return found

    monkeypatch.setattr(Lease, "_read", slow)
    with pytest.raises(RunDirectoryError, match="in use by process 7"), Lease(root, "x").held():
        pass


def test_who_is_taken_over_meanwhile_is_refused_too(root, clock):
    put(root, holder())
    clock.hook = lambda: put(root, holder(token="a third", pid=8))
    with pytest.raises(RunDirectoryError, match="in use by process 8 on elsewhere"), Lease(root, "x").held():
        pass


def test_a_lease_that_is_given_up_meanwhile_is_free(root, clock):
    put(root, holder())
    clock.hook = lambda: root.delete_file(LEASE) if names(root) and clock.now == 5 else None
    with Lease(root, "x").held():
        assert clock.now == 6


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(root, dead_process, clock):
    put(root, holder(machine=lock._machine(), pid=dead_process))
    with Lease(root, "x").held():
        assert clock.now == 1


def test_a_process_of_another_machine_with_the_same_name_is_not_dead(root, dead_process, clock):
    first = holder(host=socket.gethostname(), pid=dead_process)
    put(root, first)
    clock.hook = lambda: put(root, replace(first, renewed=first.renewed + 20))
    with pytest.raises(RunDirectoryError, match="is in use by"), Lease(root, "x").held():
        pass


def test_a_lease_that_is_half_written_is_one(root, clock):
    with root.open_output_stream(LEASE) as stream:
        stream.write(json.dumps(asdict(holder())).encode()[:20])
    clock.hook = lambda: put(root, holder(renewed=clock.now))
    with pytest.raises(RunDirectoryError, match="is in use by"), Lease(root, "x").held():
        pass


@pytest.mark.parametrize("text", ["hello", "[" * 10**5, "5", json.dumps(asdict(holder(renewed="now")))])
def test_a_lease_that_is_none_is_taken_over(root, text):
    with root.open_output_stream(LEASE) as stream:
        stream.write(text.encode())
    with Lease(root, "x").held():
        pass


def test_a_lease_is_renewed_until_it_ends(root, monkeypatch, request):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    with Lease(root, "x").held():
        first = json.loads(read(root, LEASE))["renewed"]
        deadline = time.monotonic() + 60
        renewed = first
        while renewed <= first:
            assert time.monotonic() < deadline
            text = read(root, LEASE)
            assert text or "memory" in request.node.name  # whole at any time; only the stand-in's are empty before
            renewed = json.loads(text)["renewed"] if text else first
    assert names(root) == []


@pytest.mark.parametrize(
    ("done", "said"), [(False, "by process 7 on elsewhere since"), (True, r"\(its lease.json is gone\)")]
)
def test_who_was_taken_over_writes_no_more(tmp_path, temporary, done, said):
    _, place = remote(tmp_path)
    with pytest.raises(RunDirectoryError, match=f"was taken over {said}"), place.claimed() as folder:
        write(folder, config_yaml="c")
        put(place._root, holder())
        if done:
            place._root.delete_file(LEASE)
        place.save()
    assert names(place._root) == ([] if done else [LEASE])  # theirs
    assert (folder / "config.yaml").is_file()


# -- whole runs --------------------------------------------------------------------------------------------------------


def rollouts(run: Path):
    return pq.read_table(run / "rollouts").drop_columns(TIMINGS)


@pytest.mark.slow
def test_a_run_by_uri_is_the_same_as_a_local_one(finished, tmp_path, temporary):
    whole, _ = finished
    there = tmp_path / "bucket" / "run"
    uri = f"file://{there}"
    with pytest.raises(KeyboardInterrupt):
        train(load_config(None, TINY), uri, Quiet(interrupt_after=3))
    assert (there / "checkpoints" / "iteration-000003.pt").is_file() and not (there / LEASE).exists()
    ids = pq.read_table(there / "rollouts", columns=["rollout_id"]).column(0).to_pylist()
    assert len(ids) == len(set(ids)) == 3 * 32
    lines = resume(uri, Quiet())
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
def test_a_run_in_fsspecs_memory(finished, temporary, caplog):
    uri = f"memory://bucket-{time.time_ns()}/runs/mine"
    train(load_config(None, TINY), uri, Quiet())
    memory = fsspec.filesystem("memory")
    path = uri.removeprefix("memory://")
    assert memory.cat(f"{path}/report.html").startswith(b"<!")
    newest = f"{path}/checkpoints/iteration-000006.pt"
    memory.pipe(newest, memory.cat(newest)[:99])  # damaged there: the one before, and the same end
    memory.rm(f"{path}/stages.json")  # the mark of a finished run
    good = memory.cat(f"{path}/solver/solver.json")
    resume(uri, Quiet())
    assert json.loads(memory.cat(f"{path}/solver/solver.json")) == json.loads(good)
    assert len(memory.cat(newest)) > 99 and list(temporary.iterdir()) == []
    lost = f"{path}/rollouts/iteration-000006.parquet"
    rows, _ = memory.cat(lost), memory.rm(lost)
    memory.rm(f"{path}/stages.json")
    resume(uri, Quiet())
    assert "rollouts of iteration 6 are missing or damaged: they are made again" in caplog.text
    again, before = (pq.read_table(io.BytesIO(data)).drop_columns(TIMINGS) for data in (memory.cat(lost), rows))
    assert again == before


@pytest.mark.slow
def test_a_model_that_cannot_be_opened_leaves_nothing_there(small_ray, tmp_path, temporary):
    broken = [*TINY, "backbone.family=auto", "backbone.model=/nowhere/at/all"]
    with pytest.raises(ModelError, match="no directory"):
        train(load_config(None, broken), f"file://{tmp_path}/run", Quiet())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [] and list(temporary.iterdir()) == []
