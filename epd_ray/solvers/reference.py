"""Import of the solver files (*.pkl) of the EPD authors' code, without running anything that the files contain.

Source: github.com/BeierZhu/EPD, training/networks.py (EPD_predictor) and torch_utils/persistence.py.
"""

import hashlib
import io
import os
import pickle
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, ValidationError
from torch import Tensor

from epd_ray.errors import ScheduleError, TableError
from epd_ray.solvers.reference_facts import MAX_INTERVALS, MAX_POINTS, ReferenceFacts, reference_solver
from epd_ray.solvers.solver import REFERENCE_SUFFIX, Solver
from epd_ray.solvers.table import SolverTable

SUFFIX = REFERENCE_SUFFIX
MAX_BYTES = 4 << 20  # a released file has about 10 KiB

_MAX_VALUES = 100_000  # in one object, shared parts counted as often as they appear
_NEEDED = (
    "PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 "
    "LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD"
)
_OPCODES = frozenset(_NEEDED.split())
_UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions that pickle and torch raise for damaged or forged files."""

_Weights = list[int | None]  # of the values on the pickle machine's stack; None is a mark


def read_reference(path: str | os.PathLike[str]) -> Solver:
    """Read a solver from a *.pkl of the reference: its table, the sigmas that its code would use, and its origin.

    Args:
        path: the file. Nothing in it is executed: every class that it names is replaced by a stand-in, or refused.

    Returns:
        The solver, float64, with the meta of a preset.

    Raises:
        TableError: the file is absent, too large, damaged, of another kind, or names an unknown class.
    """
    file = Path(path)
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise TableError(f"{file}: {size} bytes, expected at most {MAX_BYTES} (a solver file holds a small table)")
        data = file.read_bytes()
    except OSError as error:
        raise TableError(f"{file}: {error.strerror or error} (pass a {SUFFIX} of the reference)") from error
    try:
        state = _predictor_state(_unpickle(data))
        facts = ReferenceFacts.model_validate({k: state[k] for k in ReferenceFacts.model_fields if k in state})
        parameters = state.get("_parameters", state)
        table = _table(parameters if isinstance(parameters, dict) else {}, facts)
        source: dict[str, JsonValue] = {"file": file.name}
        return reference_solver(table, facts, source, hashlib.sha256(data).hexdigest())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise TableError(f"{file}: {where}: {first['msg']} (given: {str(first['input'])[:60]})") from error
    except (TableError, ScheduleError) as error:
        raise TableError(f"{file}: {error}") from error


def _table(parameters: Mapping[str, Any], facts: ReferenceFacts) -> SolverTable:
    """The table as the reference's forward pass computes it from its parameters, sorted by position."""
    shape = (facts.num_steps - 1, facts.num_points)

    def raw(name: str) -> Tensor:
        values = parameters.get(name)
        if not isinstance(values, Tensor):
            raise TableError(f"{name} is {type(values).__name__}, expected a tensor {list(shape)}")
        if tuple(values.shape) != shape:
            raise TableError(
                f"{name} has shape {list(values.shape)}, expected [num_steps - 1, num_points] = {list(shape)}"
            )
        return values.double()

    def scale(name: str, range_: float) -> Tensor | None:
        return 2 * (raw(name) / 2).sigmoid() * range_ + (1 - range_) if range_ else None

    scale_dir = scale("scale_dir_params", facts.scale_dir)
    if scale_dir is not None and facts.fcn:
        scale_dir[-1] = 1  # its solver leaves the last interval's directions alone
    scale_time = scale("scale_time_params", facts.scale_time)
    positions, weights = raw("r_params").sigmoid(), raw("weight_s").softmax(-1)
    return SolverTable.from_unsorted(positions, weights, scale_dir=scale_dir, scale_time=scale_time)


@dataclass(frozen=True, slots=True)
class _Persistent:
    """A stand-in for an object that the reference would rebuild by running the source text in its file."""

    class_name: str
    state: dict[str, Any]


def _predictor_state(snapshot: object) -> dict[str, Any]:
    model = snapshot.get("model") if isinstance(snapshot, dict) else snapshot
    if not isinstance(model, _Persistent) or model.class_name != "EPD_predictor":
        found = model.class_name if isinstance(model, _Persistent) else type(model).__name__
        raise TableError(f"holds {found}, expected the reference's EPD_predictor")
    return model.state


class _Reader(pickle.Unpickler):
    """An unpickler for which every global name is either a stand-in or an error."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._stand_ins = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        if (found := self._stand_ins.get((module, name))) is None:
            raise TableError(f"names {module}.{name}, which no solver file needs: refused, nothing of it was run")
        return found


def _unpickle(data: bytes) -> object:
    try:
        _check_pickle(io.BytesIO(data), _OPCODES)
        return _Reader(data).load()
    except _UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TableError(f"cannot be read ({reason}): damaged, or no file of the reference") from error


def _check_pickle(stream: io.BytesIO, allowed: frozenset[str]) -> None:
    """Walk through one pickle without running it, and refuse one that would take much more memory than its file.

    The pickle module allocates as much as an opcode claims, and takes exponential time to hash nested tuples that share
    their parts.
    """
    stack: _Weights = []
    memo: _Weights = []
    for op, arg, _ in pickletools.genops(stream):
        if op.name not in allowed:
            raise TableError(f"has the pickle opcode {op.name}, which no solver file needs: refused")
        if op.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            if op.name != "MEMOIZE" and arg != len(memo):
                raise TableError(f"writes memo entry {arg} after {len(memo)} others: refused")
            memo.append(stack[-1])
        elif op.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(arg or 0)])
        elif op.name == "MARK":
            stack.append(None)
        else:
            weight = 1
            takes = len(op.stack_before)
            if pickletools.markobject in op.stack_before:
                while (top := stack.pop()) is not None:
                    weight += top
                takes = op.stack_before.index(pickletools.markobject)
            for _taken in range(takes):
                weight += stack.pop() or 0
            if weight > _MAX_VALUES:
                raise TableError(f"unfolds to more than {_MAX_VALUES} values: refused")
            stack += [weight] * len(op.stack_after)


def _stand_ins() -> dict[tuple[str, str], Callable[..., Any]]:
    """The stand-in of each allowed global name. They are made anew for each file, because a pickle may change them."""

    class Inert:
        """A module without parameters."""

        def __setstate__(self, state: object) -> None:
            pass

    class Fields(dict[str, Any]):
        """The reference's EasyDict."""

    def persistent(meta: object) -> _Persistent:
        if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
            raise TableError("its persistent object has no state, expected one that torch_utils.persistence wrote")
        return _Persistent(str(meta.get("class_name"))[:60], meta["state"])

    def parameter(data: Tensor, requires_grad: bool, hooks: object) -> Tensor:
        return data

    return {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("dnnlib.util", "EasyDict"): Fields,
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _tensor(*args),
        ("torch.storage", "_load_from_bytes"): lambda data: _storage(data),
        ("torch.nn.modules.activation", "Sigmoid"): Inert,
        ("torch.nn.modules.activation", "Softmax"): Inert,
    }


def _storage(data: object) -> Tensor:
    """The values of a pickled torch storage, as one row."""
    if not isinstance(data, bytes):
        raise TableError(f"a storage is {type(data).__name__}, expected bytes")
    stream = io.BytesIO(data)
    for _ in range(5):  # magic number, version, machine, storage, keys
        _check_pickle(stream, _OPCODES | {"BINPERSID"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch wishes that nobody used typed storages
        try:
            storage = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:  # torch's own message recommends to trust the file
            raise TableError("a storage holds more than numbers: refused, nothing of it was run") from error
        if not isinstance(storage, torch.storage.TypedStorage):
            raise TableError(f"a storage holds {type(storage).__name__}, expected numbers")
        return torch.tensor(storage.tolist(), dtype=storage.dtype)


def _tensor(
    storage: object, offset: object, size: object, stride: object, requires_grad: object = False, *_: object
) -> Tensor:
    """A matrix [N, K] over a storage."""
    if not isinstance(storage, Tensor) or storage.dtype not in (torch.float32, torch.float64):
        raise TableError("a tensor is not made of 32 or 64-bit floating-point numbers")
    shape = [*size, *stride, offset] if isinstance(size, tuple) and isinstance(stride, tuple) else []
    if len(shape) != 5 or not all(type(n) is int and 0 <= n <= MAX_INTERVALS * MAX_POINTS for n in shape):
        raise TableError(f"a tensor has size {str(size)[:60]} and stride {str(stride)[:60]}, expected those of [N, K]")
    if not (0 < shape[0] <= MAX_INTERVALS and 0 < shape[1] <= MAX_POINTS):
        raise TableError(f"a tensor has shape {shape[:2]}, expected at most [{MAX_INTERVALS}, {MAX_POINTS}]")
    return storage.as_strided(shape[:2], shape[2:4], shape[4]).clone()
