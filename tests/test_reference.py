"""Files of the reference's structure are pickled for real, read back, and attacked."""

import builtins
import io
import os
import pickle
import struct
import sys
import tracemalloc
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from epd_ray.errors import TableError
from epd_ray.solvers import Solver, reference
from epd_ray.solvers.reference import MAX_BYTES, read_reference

SOURCE = "raise SystemExit('the file ran its source text')\n"
SD15 = {"guidance_rate": 7.5, "schedule_type": "discrete", "schedule_rho": 1.0, "backend_config": {"resolution": 1024}}
SD3 = {
    "guidance_rate": 4.5,
    "schedule_type": "flowmatch",
    "schedule_rho": 1.0,
    "backend": "sd3",
    "backend_config": {"model_name_or_path": "owner/sd3", "resolution": 512, "sigma_max": 1.0, "torch_dtype": None},
}


@contextmanager
def reference_modules() -> Iterator[types.ModuleType]:
    """The reference's modules by name, gone again afterwards: only what is pickled stays."""
    persistence, package = types.ModuleType("torch_utils.persistence"), types.ModuleType("torch_utils")
    dnnlib, util = types.ModuleType("dnnlib"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("the reference's own code ran")

    class EasyDict(dict[str, Any]):
        pass

    for module, thing in ((persistence, _reconstruct_persistent_obj), (util, EasyDict)):
        thing.__module__, thing.__qualname__ = module.__name__, thing.__name__
        setattr(module, thing.__name__, thing)
    modules = {m.__name__: m for m in (persistence, package, dnnlib, util)}
    sys.modules.update(modules)
    try:
        yield persistence
    finally:
        for name in modules:
            del sys.modules[name]


class Predictor(nn.Module):
    """The reference's EPD_predictor, pickled as torch_utils.persistence does it."""

    class_name = "EPD_predictor"

    def __init__(self, intervals: int, points: int, **facts: Any) -> None:
        super().__init__()
        self.num_steps, self.num_points = intervals + 1, points
        self.dataset_name, self.sampler_stu, self.sampler_tea, self.M = "ms_coco", "epd", "dpm2", 3
        self.guidance_type, self.afs, self.fcn, self.max_order, self.alpha = "cfg", False, False, None, 10
        self.scale_dir, self.scale_time, self.backend = 0, 0, "ldm"
        self._init_args, self._init_kwargs = (), {"num_points": points}
        for name, value in facts.items():
            setattr(self, name, value)
        generator = torch.Generator().manual_seed(0)
        for name in ("r_params", "scale_dir_params", "scale_time_params", "weight_s"):
            self.register_parameter(name, nn.Parameter(torch.randn(intervals, points, generator=generator)))
        self.sigmoid, self.softmax = nn.Sigmoid(), nn.Softmax(dim=-1)

    def __reduce__(self) -> tuple[Any, ...]:
        state = super().__reduce__()[2]  # type: ignore[misc]
        easy = sys.modules["dnnlib.util"].EasyDict(state)
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name, "state": easy}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)

    def forward(self, batch: int, step: int) -> dict[str, Tensor]:
        """The published formulas, in float64."""
        found = {"r": torch.sigmoid(self.r_params.double()[step]), "w": torch.softmax(self.weight_s.double()[step], -1)}
        for name, m in (("scale_dir", self.scale_dir), ("scale_time", self.scale_time)):
            value = getattr(self, f"{name}_params").double()[step]
            found[name] = 2 * torch.sigmoid(0.5 * value) * m + (1 - m)
        return {name: value.repeat(batch, 1) for name, value in found.items()}


def dump(path: Path, content: Any, protocol: int = 4) -> Path:
    with reference_modules():
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def expected(predictor: Predictor, name: str) -> Tensor:
    rows = []
    for step in range(predictor.num_steps - 1):
        found = {key: value[0] for key, value in predictor(1, step).items()}
        rows.append(found[name][found["r"].argsort()])
    return torch.stack(rows).detach()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_reads_a_table_as_the_reference_would(tmp_path: Path, protocol: int) -> None:
    predictor = Predictor(10, 2, scale_dir=0.1, scale_time=0.05, **SD15)
    solver = read_reference(dump(tmp_path / "a.pkl", {"model": predictor, "options": {"lr": 1e-3}}, protocol))
    assert (expected(predictor, "r").diff() > 0).all() and (predictor.r_params.diff() < 0).any(), "needs sorting"
    for ours, name in (
        (solver.table.positions, "r"),
        (solver.table.weights, "w"),
        (solver.table.scale_dir, "scale_dir"),
        (solver.table.scale_time, "scale_time"),
    ):
        assert ours is not None
        torch.testing.assert_close(ours, expected(predictor, name), rtol=0, atol=1e-15)
    assert (solver.form, solver.afs, solver.order) == ("ve", False, 1)
    assert solver.meta["resolution"] == 512 and solver.meta["source"] == {"file": "a.pkl"}
    again = Solver.from_pretrained(solver.save_pretrained(tmp_path / "out").parent)
    assert torch.equal(again.table.positions, solver.table.positions) and again.meta == solver.meta


def test_flow_models_and_plugins(tmp_path: Path) -> None:
    solver = read_reference(dump(tmp_path / "a.pkl", {"model": Predictor(10, 3, **SD3)}))
    assert (solver.form, solver.table.scale_dir, solver.meta["model_id"]) == ("flow", None, "owner/sd3")
    assert solver.meta["resolution"] == 512 and solver.meta["schedule"] == {"kind": "flowmatch", "shift": 3.0}
    plugin = Predictor(5, 2, afs=True, fcn=True, scale_dir=0.2, sampler_stu="ipndm", max_order=3, **SD15)
    solver = read_reference(dump(tmp_path / "b.pkl", plugin))
    assert (solver.afs, solver.order, solver.parallel_nfe) == (True, 3, 9)
    assert solver.table.scale_dir is not None
    assert torch.equal(solver.table.scale_dir[-1], torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(solver.table.scale_dir[:-1], expected(plugin, "scale_dir")[:-1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["polynomial", "logsnr", "time_uniform"])
def test_other_schedules_span_the_same_sigmas(tmp_path: Path, kind: str) -> None:
    solver = read_reference(dump(tmp_path / "a.pkl", Predictor(4, 1, **SD15 | {"schedule_type": kind})))
    ends = [14.614641229333643, 0.029167158151720367]
    assert solver.sigmas[[0, -1]].tolist() == pytest.approx(ends, rel=1e-9)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"num_steps": 9}, r"r_params has shape \[4, 2\], expected \[num_steps - 1, num_points\] = \[8, 2\]"),
        ({"num_points": 3}, r"r_params has shape \[4, 2\]"),
        ({"num_steps": "5"}, r"num_steps: Input should be a valid integer"),
        ({"guidance_rate": None}, r"guidance_rate: Input should be a valid number"),
        ({"schedule_type": "flowmatch"}, r"schedule_type is 'flowmatch', which the backend 'ldm' does not have"),
        ({"schedule_type": "cosine"}, r"schedule_type: Input should be 'polynomial'"),
        ({"schedule_rho": None}, r"schedule_rho is absent"),
        ({"dataset_name": "cifar10"}, r"dataset_name: Input should be 'ms_coco' \(given: 'cifar10'\)"),
        ({"backend": "pixart"}, r"backend: Input should be 'ldm', 'sd3' or 'flux'"),
        ({"sampler_stu": "ipndm"}, r"max_order is absent"),
        (SD3 | {"afs": True}, r"afs is true"),
        ({"scale_time": 2.0}, r"scale_time: Input should be less than or equal to 1"),
    ],
)
def test_facts_that_do_not_fit(tmp_path: Path, facts: dict[str, Any], said: str) -> None:
    path = dump(tmp_path / "a.pkl", {"model": Predictor(4, 2, **SD15 | facts)})
    with pytest.raises(TableError, match=said) as raised:
        read_reference(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    def read(name: str, values: Any) -> str:
        predictor = Predictor(4, 2, **SD15)
        predictor.register_parameter(name, nn.Parameter(values, requires_grad=False))
        with pytest.raises(TableError) as raised:
            read_reference(dump(tmp_path / "a.pkl", predictor))
        return str(raised.value)

    assert "weight_s has shape [2, 4], expected [num_steps" in read("weight_s", torch.ones(2, 4))
    assert "expected those of [N, K]" in read("weight_s", torch.ones(4, 2, 1))
    assert "floating-point" in read("weight_s", torch.ones(4, 2, dtype=torch.int64))
    assert "at most [1000, 64]" in read("r_params", torch.ones(4, 65))
    assert "expected a finite number" in read("weight_s", torch.full((4, 2), float("nan")))
    predictor = Predictor(4, 2, **SD15)
    del predictor.r_params
    with pytest.raises(TableError, match=r"r_params.*NoneType"):
        read_reference(dump(tmp_path / "a.pkl", predictor))


@pytest.mark.parametrize(
    ("content", "said"),
    [({}, "holds NoneType"), ([1], "holds list"), ({"model": 3}, "holds int"), (None, "holds NoneType")],
)
def test_files_of_another_kind(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(TableError, match=rf"{said}.*EPD_predictor"):
        read_reference(dump(tmp_path / "a.pkl", content))


def test_other_persistent_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictor, "class_name", "AMED_predictor")
    with pytest.raises(TableError, match="holds AMED_predictor"):
        read_reference(dump(tmp_path / "a.pkl", Predictor(2, 2, **SD15)))


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.parts


def storage_bytes(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def zip_bytes() -> bytes:
    stream = io.BytesIO()
    torch.save(torch.zeros(1 << 16), stream)
    return stream.getvalue()


LOAD, REBUILD = torch.storage._load_from_bytes, torch._utils._rebuild_tensor_v2
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # torch wishes that nobody made typed storages
    STORAGE = torch.storage.TypedStorage(wrap_storage=torch.zeros(8).untyped_storage(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Call(os.system, "touch RAN"), r"names '(posix|nt)\.system'"),
        (Call(eval, "open('RAN', 'w')"), r"names 'builtins\.eval"),
        (Call(builtins.getattr, {}, "keys"), r"names 'builtins\.getattr"),
        (Call(LOAD, storage_bytes(Call(os.system, "touch RAN"))), r"more than numbers: refused"),
        (Call(LOAD, pickle.dumps(Call(os.system, "touch RAN"))), r"(?i)refused|cannot be read"),
        (Call(LOAD, zip_bytes()), r"opcode PERSID|cannot be read \('ascii'"),
        (Call(LOAD, storage_bytes({"a": torch.zeros(2)})), r"a storage holds dict"),
        (Call(LOAD, b""), r"cannot be read"),
        (Call(LOAD, "text"), r"a storage is str, expected bytes"),
        (Call(LOAD, b"a", b"b"), r"cannot be read \(.*argument"),
        (Call(REBUILD, STORAGE), r"cannot be read \(.*argument"),
        (Call(REBUILD, "storage", 0, (2, 2), (2, 1), False, {}), r"not made of 32 or 64-bit"),
        (Call(REBUILD, STORAGE, 0, (5, 2), (2, 1), False, {}), r"cannot be read \(setStorage"),
        (Call(REBUILD, STORAGE, 0, (4, 2), (-2, 1), False, {}), r"expected those of \[N, K\]"),
        (Call(REBUILD, STORAGE, 0, (10**9, 2), (0, 0), False, {}), r"expected those of \[N, K\]"),
        (Call(REBUILD, STORAGE, 0, (2**15, 2), (0, 0), False, {}), r"at most \[1000, 64\]"),
        (b"x" * 10, r"holds bytes"),
    ],
)  # fmt: skip
def test_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = dump(tmp_path / "a.pkl", {"model": content})
    with pytest.raises(TableError, match=said) as raised:
        read_reference(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pkl"], "something ran"
    assert "\n" not in str(raised.value)


def test_the_stand_in_of_the_persistent_object_is_strict(tmp_path: Path) -> None:
    with reference_modules() as persistence:
        for argument in ("text", {}, {"state": 1}):
            (tmp_path / "a.pkl").write_bytes(pickle.dumps(Call(persistence._reconstruct_persistent_obj, argument)))
            with pytest.raises(TableError, match="has no state"):
                read_reference(tmp_path / "a.pkl")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


NESTED_KEY = b"\x80\x04})" + b"".join(b"\x94h%c\x86" % i for i in range(60)) + b"K\x01s."  # 2 ** 60 to hash
EASY = b"cdnnlib.util\nEasyDict\n"
REBUILD_NAME = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x80\x04]r\xff\xff\xff\x7f.", r"memo entry 2147483647 after 0 others"),
        (b"\x80\x04\x8e\x00\x00\x00\x00\x00\x01\x00\x00.", r"cannot be read"),
        (b"\x80\x04\x8b\xff\xff\xff\x7f1.", r"cannot be read|opcode LONG4"),
        (NESTED_KEY, r"unfolds to more than 10000 values"),
        (b"cos\nsystem\n.", r"names 'os\.system'"),
        (b"(S'touch RAN'\nios\nsystem\n.", r"opcode STRING"),
        (b"\x80\x04P0\n.", r"opcode PERSID"),
        (b"\x80\x02\x82\x01.", r"opcode EXT1"),
        (b"\x80\x04" + REBUILD_NAME + b"}" + text("__code__") + b"K\x01s\x86b.", r"cannot be read|holds"),
        (b"\x80\x04ccollections\nOrderedDict\n)}" + text("a") + b"K\x01s\x86b.", r"cannot be read"),
        (b"\x80\x04" + b")" + b"\x85" * 200_000 + b".", r"tuples in each other|opcodes"),
        (b"\x80\x04}" + b")" + b"\x85" * 200 + b"K\x01s.", r"more than 100 tuples in each other"),
        (b"\x80\x04(" + b"\x8f" * 200_000 + b"l.", r"more than 100000 pickle opcodes|opcode LIST"),
        (b"\x80\x04\x8c\x01a\x94" + EASY + b")\x81}" + text("a") + b"K\x01sb.", r"holds|cannot be read"),
        (b"\x80\x04" + EASY + b"}" + text("get") + EASY + b"s\x86N\x86b.", r"cannot be read|holds type"),
        (b"\x80\x04ctorch._utils\n_rebuild_parameter\n(K\x01K\x02K\x03tR.", r"a parameter is int"),
        (b"\x80\x04cbuiltins\nset\n(](K\x01K\x02e\x85R.", r"set is filled|cannot be read"),
        (b"\x80\x040.", r"opcode POP"),
        (b"\x80\x04t.", r"cannot be read"),
        (b"not a pickle", r"opcode|cannot be read"),
        (b"", r"cannot be read \(.*exhausted"),
    ],
)
def test_forged_files(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(TableError, match=said):
        read_reference(tmp_path / "a.pkl")


def nested(opening: bytes, closing: bytes, times: int) -> bytes:
    """Containers that each hold the next one ten times; all are memoized before they are filled."""
    data = b"K\x01"
    for i in reversed(range(times)):
        again = b"h%c" % (i + 1) if i + 1 < times else b"K\x01"
        keys = [b"K%c" % n if opening == b"}" else b"" for n in range(10)]
        data = opening + b"q%c(" % i + keys[0] + data + b"".join(key + again for key in keys[1:]) + closing
    return data


LISTS, DICTS = nested(b"]", b"e", 30), nested(b"}", b"u", 30)
SELF = b"]q\x00h\x00a"
PERSISTENT = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"


VALUES = [LISTS, DICTS, SELF, text("x" * 10**6), b"\x8a\xff" + b"\x7f" * 255]


@pytest.mark.parametrize("value", VALUES, ids=["lists", "dicts", "itself", "text", "integer"])
def test_what_unfolds_makes_neither_the_message_nor_the_memory_large(tmp_path: Path, value: bytes) -> None:
    name, state = text("class_name") + text("EPD_predictor"), text("state")
    for key in ("num_steps", "guidance_rate", "backend_config"):
        said = message_of(tmp_path, PERSISTENT + b"}(" + name + state + b"}(" + text(key) + value + b"uu\x85R")
        assert key in said
    message_of(tmp_path, value)
    message_of(tmp_path, PERSISTENT + b"}(" + state + b"}" + text("class_name") + value + b"u\x85R")
    message_of(tmp_path, REBUILD_NAME + b"(NK\x00" + value + b"NtR")


def message_of(folder: Path, pickled: bytes) -> str:
    (folder / "a.pkl").write_bytes(b"\x80\x02" + pickled + b".")
    tracemalloc.start()
    try:
        with pytest.raises(TableError) as raised:
            read_reference(folder / "a.pkl")
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
    assert len(str(raised.value)) < 1000 and "\n" not in str(raised.value)
    return str(raised.value)


def test_what_is_rebuilt_again_and_again_is_bounded(tmp_path: Path) -> None:
    whole = storage_bytes(STORAGE)
    load = b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(whole)) + whole + b"\x85Rq\x00"
    rebuild = REBUILD_NAME + b"(h\x00K\x00M\xe8\x03K\x40\x86K\x00K\x00\x86\x89NtR"  # size (1000, 64), stride (0, 0)
    assert "its tensors have more than" in message_of(tmp_path, b"(" + load + rebuild * 300 + b"t")
    assert "holds tuple" in message_of(tmp_path, b"(" + load + rebuild * 4 + b"t")


def test_a_storage_whose_description_claims_more_than_it_has(tmp_path: Path) -> None:
    whole = storage_bytes(STORAGE)
    claimed = whole.replace(b"K\x08", b"J\x00\x00\x00\x70", 1)
    assert claimed != whole
    dump(tmp_path / "a.pkl", {"model": Call(LOAD, claimed)})
    with pytest.raises(TableError, match=f"claims {0x70000000} values"):
        read_reference(tmp_path / "a.pkl")


@pytest.mark.parametrize("shape", [(1001, 64), (1000, 65), (0, 2), (2, 0)])
def test_a_tensor_of_more_than_the_largest_table_is_never_made(shape: tuple[int, int], monkeypatch: Any) -> None:
    monkeypatch.setattr(Tensor, "as_strided", lambda *_: pytest.fail("it was made"))
    for strides in ((0, 0), (1, 1)):
        with pytest.raises(TableError, match=rf"\[{shape[0]}, {shape[1]}\].*1000, 64"):
            reference._tensor(reference._Storage(torch.zeros(8)), 0, shape, strides)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((4, 2), (64001, 1), 0), ((4, 2), (1, 64001), 0), ((4, 2), (1, 1), 64001), ((64001, 1), (0, 0), 0)],
)
def test_strides_have_the_same_bound(size: Any, stride: Any, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "as_strided", lambda *_: pytest.fail("it was made"))
    with pytest.raises(TableError, match="64001"):
        reference._tensor(reference._Storage(torch.zeros(8)), offset, size, stride)


def test_damaged_files(tmp_path: Path) -> None:
    path = dump(tmp_path / "a.pkl", {"model": Predictor(4, 2, **SD15)})
    whole = path.read_bytes()
    for end in range(0, len(whole), 37):
        path.write_bytes(whole[:end])
        with pytest.raises(TableError, match="cannot be read"):
            read_reference(path)


def test_a_storage_that_claims_more_than_it_has(tmp_path: Path) -> None:
    with reference_modules():
        whole = pickle.dumps({"model": Predictor(4, 2, **SD15)}, protocol=4)
    claim = struct.pack("<q", 8) + torch.zeros(0).numpy().tobytes()
    assert claim in whole
    (tmp_path / "a.pkl").write_bytes(whole.replace(claim, struct.pack("<q", 1 << 40), 1))
    with pytest.raises(TableError, match="cannot be read"):
        read_reference(tmp_path / "a.pkl")


def test_sizes_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(bytes(MAX_BYTES + 1))
    with pytest.raises(TableError, match=rf"more than {MAX_BYTES} bytes"):
        read_reference(tmp_path / "a.pkl")
    for path in (tmp_path / "absent.pkl", tmp_path):
        with pytest.raises(TableError, match=r"No such file|Is a directory"):
            read_reference(path)
