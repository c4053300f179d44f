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
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from epd_ray.errors import SHOWN_CHARS, ScheduleError, TableError, first_problem, importing, shown
from epd_ray.solvers.reference_facts import MAX_INTERVALS, MAX_POINTS, ReferenceFacts, reference_solver
from epd_ray.solvers.solver import REFERENCE_SUFFIX, Solver
from epd_ray.solvers.table import SolverTable

SUFFIX = REFERENCE_SUFFIX
MAX_BYTES = 4 << 20  # a released file has about 10 KiB

_MAX_OPCODES = 100_000  # a released file has some hundred
_MAX_UNFOLDED = 10_000  # values in one tuple, shared parts counted as often as they appear
_MAX_DEPTH = 100  # of tuples in tuples
_MAX_UNPACKED = 16 * MAX_BYTES  # bytes of all tensors together
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

_FILLS = frozenset(["APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"])


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
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise TableError(f"{file}: {error.strerror or error} (pass a {SUFFIX} of the reference)") from error
    if len(data) > MAX_BYTES:
        raise TableError(f"{file}: more than {MAX_BYTES} bytes (a solver file holds a small table)")
    try:
        with importing(TableError, "it"):
            return _solver(file.name, data)
    except (TableError, ScheduleError) as error:
        raise TableError(f"{file}: {error}") from error


def _solver(name: str, data: bytes) -> Solver:
    state = _predictor_state(_unpickle(data))
    try:
        facts = ReferenceFacts.model_validate({k: state[k] for k in ReferenceFacts.model_fields if k in state})
    except ValidationError as error:
        raise TableError(first_problem(error)) from error
    parameters = state.get("_parameters", state)
    table = _table(parameters if isinstance(parameters, dict) else {}, facts)
    return reference_solver(table, facts, {"file": name}, hashlib.sha256(data).hexdigest())


def _table(parameters: Mapping[str, Any], facts: ReferenceFacts) -> SolverTable:
    """The table as the reference's forward pass computes it from its parameters, sorted by position."""
    shape = (facts.num_steps - 1, facts.num_points)

    def raw(name: str) -> Tensor:
        found = parameters.get(name)
        if not isinstance(found, _Matrix):
            raise TableError(f"{name} is {type(found).__name__}, expected a tensor {list(shape)}")
        values = found.values
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


# Tuples, because a pickle may change objects of other kinds after it has made them.


class _Persistent(NamedTuple):
    """A stand-in for an object that the reference would rebuild by running the source text in its file."""

    class_name: str
    state: dict[str, Any]


class _Storage(NamedTuple):
    values: Tensor


class _Matrix(NamedTuple):
    values: Tensor


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
            raise TableError(
                f"names {shown(f'{module}.{name}')}, which no solver file needs: refused, nothing of it was run"
            )
        return found


def _unpickle(data: bytes) -> object:
    try:
        _check_pickle(io.BytesIO(data), _OPCODES)
        return _Reader(data).load()
    except _UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:SHOWN_CHARS]
        raise TableError(f"cannot be read ({reason}): damaged, or no file of the reference") from error


class _Size(NamedTuple):
    """Of a value on the pickle machine's stack. A list, dict or set has that of one value: nothing goes through it."""

    unfolded: int = 1
    depth: int = 1


def _check_pickle(stream: io.BytesIO, allowed: frozenset[str], largest: float = inf) -> None:
    """Walk through one pickle without running it, and refuse one that would take much more memory than its file.

    The pickle module allocates as much as an opcode claims, and takes exponential time to hash nested tuples that share
    their parts, and a stack as deep as the nesting.

    Args:
        stream: at the start of the pickle; afterwards at its end.
        allowed: names of opcodes.
        largest: the largest integer that it may hold.
    """
    stack: list[_Size | None] = []  # None is a mark
    memo: list[_Size | None] = []
    for count, (op, arg, _) in enumerate(pickletools.genops(stream)):
        if op.name not in allowed:
            raise TableError(f"has the pickle opcode {op.name}, which no solver file needs: refused")
        if count >= _MAX_OPCODES:
            raise TableError(f"has more than {_MAX_OPCODES} pickle opcodes: refused")
        if isinstance(arg, int) and arg > largest:
            raise TableError(f"claims {shown(arg)} values, which is more than its bytes: refused")
        if op.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            if op.name != "MEMOIZE" and arg != len(memo):
                raise TableError(f"writes memo entry {arg} after {len(memo)} others: refused")
            memo.append(stack[-1])
        elif op.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(arg or 0)])
        elif op.name == "MARK":
            stack.append(None)
        else:
            taken = _taken(op, stack)
            size = _Size(1 + sum(part.unfolded for part in taken), 1 + max((part.depth for part in taken), default=0))
            if size.unfolded > _MAX_UNFOLDED or size.depth > _MAX_DEPTH:
                raise TableError(
                    f"unfolds to more than {_MAX_UNFOLDED} values, or to more than {_MAX_DEPTH} tuples in each other: "
                    "refused"
                )
            stack += [size] * len(op.stack_after)


def _taken(op: pickletools.OpcodeInfo, stack: list[_Size | None]) -> list[_Size]:
    """The sizes of what an opcode takes from the stack and puts into what it returns."""
    taken: list[_Size] = []
    takes = len(op.stack_before)
    if pickletools.markobject in op.stack_before:
        while (top := stack.pop()) is not None:
            taken.append(top)
        takes = op.stack_before.index(pickletools.markobject)
    below = [stack.pop() or _Size() for _ in range(takes)]
    return [] if op.name in _FILLS else taken + below


def _stand_ins() -> dict[tuple[str, str], Callable[..., Any]]:
    """The stand-in of each allowed global name. They are made anew for each file, because a pickle may change them."""

    spent = 0

    def spend(count: int) -> None:
        nonlocal spent
        spent += count
        if spent > _MAX_UNPACKED:
            raise TableError(f"its tensors have more than {_MAX_UNPACKED} bytes together: refused")

    class Sealed(type):
        """The type of classes that a pickle cannot change."""

        def __setattr__(cls, name: str, value: object) -> None:
            raise AttributeError(f"{cls.__name__} cannot be changed")

    class Inert(metaclass=Sealed):
        """A module without parameters."""

        def __setstate__(self, state: object) -> None:
            pass

    class Fields(dict[str, Any], metaclass=Sealed):
        """The reference's EasyDict, which is made empty and filled then."""

        def __init__(self) -> None:
            super().__init__()

    def persistent(meta: object) -> _Persistent:
        state = meta.get("state") if isinstance(meta, dict) else None
        name = meta.get("class_name") if isinstance(meta, dict) else None
        if not isinstance(state, dict) or not isinstance(name, str):
            raise TableError("its persistent object has no state, expected one that torch_utils.persistence wrote")
        return _Persistent(shown(name).strip("'"), state)

    def parameter(data: _Matrix, requires_grad: bool, hooks: object) -> _Matrix:
        if not isinstance(data, _Matrix):
            raise TableError(f"a parameter is {type(data).__name__}, expected a tensor")
        return data

    def storage(data: object) -> _Storage:
        spend(len(data) if isinstance(data, bytes) else 0)
        return _storage(data)

    def tensor(*args: Any) -> _Matrix:
        made = _tensor(*args)
        spend(made.values.nbytes)
        return made

    return {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("dnnlib.util", "EasyDict"): Fields,
        ("collections", "OrderedDict"): lambda: OrderedDict(),
        ("builtins", "set"): lambda empty=(): _empty_set(empty),
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch.storage", "_load_from_bytes"): storage,
        ("torch.nn.modules.activation", "Sigmoid"): Inert,
        ("torch.nn.modules.activation", "Softmax"): Inert,
    }


def _empty_set(items: object) -> set[object]:
    if items != [] and items != ():
        raise TableError("a set is filled, which no solver file needs: refused")
    return set()


def _storage(data: object) -> _Storage:
    """The values of a pickled torch storage, as one row."""
    if not isinstance(data, bytes):
        raise TableError(f"a storage is {type(data).__name__}, expected bytes")
    stream = io.BytesIO(data)
    for part in ("magic number", "version", "machine", "storage", "keys"):
        _check_pickle(stream, _OPCODES | {"BINPERSID"}, len(data) if part == "storage" else inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch wishes that nobody used typed storages
        try:
            storage = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:  # torch's own message recommends to trust the file
            raise TableError("a storage holds more than numbers: refused, nothing of it was run") from error
        if not isinstance(storage, torch.storage.TypedStorage):
            raise TableError(f"a storage holds {type(storage).__name__}, expected numbers")
        return _Storage(torch.tensor(storage.tolist(), dtype=storage.dtype))


def _tensor(
    storage: object, offset: object, size: object, stride: object, requires_grad: object = False, *_: object
) -> _Matrix:
    """A matrix [N, K] over a storage."""
    if not isinstance(storage, _Storage) or storage.values.dtype not in (torch.float32, torch.float64):
        raise TableError("a tensor is not made of 32 or 64-bit floating-point numbers")
    shape = [*size, *stride, offset] if isinstance(size, tuple) and isinstance(stride, tuple) else []
    if len(shape) != 5 or not all(type(n) is int and 0 <= n <= MAX_INTERVALS * MAX_POINTS for n in shape):
        where = f"size {shown(size)}, stride {shown(stride)} and offset {shown(offset)}"
        raise TableError(f"a tensor has {where}, expected those of [N, K]")
    if not (0 < shape[0] <= MAX_INTERVALS and 0 < shape[1] <= MAX_POINTS):
        raise TableError(f"a tensor has shape {shape[:2]}, expected at most [{MAX_INTERVALS}, {MAX_POINTS}]")
    return _Matrix(storage.values.as_strided(shape[:2], shape[2:4], shape[4]).clone())
