"""Throws damaged documents at the importers and counts how each ends: `python -m epd_ray.bench.fuzzing [count]`.

A document is made valid by a hypothesis strategy and then changed in at most one place. The count is the number of
documents of each kind. The command ends with code 1 if an importer crashed, hung, or read a wrong value.
"""

import base64
import io
import json
import logging
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from epd_ray.backbones.index import INDEX, read_index
from epd_ray.config.loading import load_config
from epd_ray.errors import EpdRayError
from epd_ray.evaluation.records import read_evaluation
from epd_ray.prompts.files import read_prompts
from epd_ray.rewards.requests import BadRequestError, Limits, read_request
from epd_ray.runs.saved import read_splits
from epd_ray.solvers import Solver
from epd_ray.solvers.presets import PRESETS
from epd_ray.solvers.reference import read_reference
from epd_ray.storage.pictures import decode_picture
from epd_ray.telemetry.provenance import MADE_BY, Provenance, signed_by

log = logging.getLogger(__name__)

COUNT = 400
DEADLINE = 5.0  # seconds
MOST_CHARS = 2000  # of a line of a message
OUTCOMES = ("accepted", "rejected cleanly", "crashed", "hung", "silently wrong")
BAD = OUTCOMES[2:]
TOKENS = (
    b"NaN", b"-1e999", b"null", b"true", b"[]", b"{}", b'""', b"9" * 5000, b"[" * 300, b"\xff\xfe", b"\x00", b"\n",
    b"\t", b"*a", b"&a ", b"!!python/name:os.system", b"0", b"-1", b'"\\ud800"', b",", b'"', b":", b"1" * 30,
)  # fmt: skip


@dataclass(frozen=True)
class Importer:
    """One kind of document.

    Attributes:
        make: a valid document of some whole numbers, and the value that must be read from it.
        read: reads a document from a file.
        name: of the file.
    """

    make: Callable[[list[int]], tuple[bytes, Any]]
    read: Callable[[Path], Any]
    name: str


class _Hung(BaseException):
    """The deadline is over; no importer catches it."""


def fuzz(count: int = COUNT) -> dict[str, Counter[str]]:
    """Try documents of every kind.

    Args:
        count: the number of documents of each kind, at least 1.

    Returns:
        The number of documents by kind and outcome, one of OUTCOMES.

    Raises:
        EpdRayError: hypothesis is not installed.
    """
    return {kind: _tried(kind, importer, count) for kind, importer in IMPORTERS.items()}


def _tried(kind: str, importer: Importer, count: int) -> Counter[str]:
    try:
        from hypothesis import HealthCheck, Phase, given, settings
        from hypothesis import strategies as st
    except ImportError as error:
        raise EpdRayError("the package hypothesis is not installed: pip install 'epd-ray[test]'") from error
    found: Counter[str] = Counter()
    changes = st.tuples(
        st.sampled_from(["none", "flip", "cut", "insert", "token", "repeat", "raw"]),
        st.floats(0, 1), st.floats(0, 1), st.sampled_from(TOKENS), st.binary(max_size=64),
    )  # fmt: skip

    @settings(
        max_examples=count, database=None, deadline=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(st.integers(0, 1000), min_size=4, max_size=4), changes)
    def attempt(numbers: list[int], change: tuple[str, float, float, bytes, bytes]) -> None:
        whole, value = importer.make(numbers)
        data = _changed(whole, *change)
        outcome, why = _outcome(importer, data, value if data == whole else None)
        found[outcome] += 1
        if outcome in BAD and found[outcome] <= 3:
            log.error("%s: %s: %s: %r", kind, outcome, why, data[:300])

    attempt()
    return found


def _changed(data: bytes, how: str, begin: float, end: float, token: bytes, raw: bytes) -> bytes:
    a, b = sorted((int(begin * len(data)), int(end * len(data))))
    made: Mapping[str, Callable[[], bytes]] = {
        "none": lambda: data,
        "flip": lambda: data[:a] + bytes([data[a] ^ (1 << (b % 8))]) + data[a + 1 :] if a < len(data) else data,
        "cut": lambda: data[:a] + data[b:],
        "insert": lambda: data[:a] + raw + data[a:],
        "token": lambda: data[:a] + token + data[min(b, a + 8) :],
        "repeat": lambda: data[:b] + data[a:b] * 3 + data[b:],
        "raw": lambda: raw,
    }
    return made[how]()


def _outcome(importer: Importer, data: bytes, value: Any) -> tuple[str, str]:
    """The outcome of one document; `value` is what must be read, or None where that is not known."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, importer.name)
        path.write_bytes(data)
        try:
            with _deadline():
                read = importer.read(path)
        except (EpdRayError, BadRequestError) as error:
            lines = getattr(error, "problems", None) or [str(error)]
            if any(len(line) > MOST_CHARS or "\n" in line for line in lines):
                return "crashed", "a message that is too long or has several lines"
            if value is not None:
                return "silently wrong", f"a valid document was refused: {lines[0]}"
            if {found.name for found in Path(folder).iterdir()} != {importer.name}:
                return "crashed", "a file was written"
            return "rejected cleanly", ""
        except _Hung:
            return "hung", f"{DEADLINE} seconds"
        except Exception as error:
            return "crashed", f"{type(error).__name__}: {str(error)[:200]}"
    if value is not None and read != value:
        return "silently wrong", f"read {str(read)[:200]}"
    return "accepted", ""


@contextmanager
def _deadline() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- the kinds of documents -------------------------------------------------------------------------------------------


def _config(numbers: list[int]) -> tuple[bytes, Any]:
    a, b, c, d = numbers
    value = {"seed": a, "name": f"run{b}", "rdpo": {"iterations": c + 1, "lr": (d + 1) / 1e5}}
    return yaml.safe_dump(value).encode(), (a, f"run{b}", c + 1, (d + 1) / 1e5)


def _read_config(path: Path) -> Any:
    config = load_config(path)
    return config.seed, config.name, config.rdpo.iterations, config.rdpo.lr


def _read_override(path: Path) -> int:
    return load_config(None, [path.read_bytes().decode(errors="surrogateescape")]).seed


def _solver(numbers: list[int]) -> tuple[bytes, Any]:
    record = json.loads(next(iter(PRESETS.values())).read_text(encoding="utf-8"))
    record["meta"]["note"] = numbers
    return json.dumps(record).encode(), [record["sigmas"], record["positions"], numbers]


def _read_solver(path: Path) -> Any:
    solver = Solver.from_pretrained(path)
    return [solver.sigmas.tolist(), solver.table.positions.tolist(), solver.meta.get("note")]


def _read_pickle(path: Path) -> Any:
    return read_reference(path).table.positions.tolist()


def _pickle(numbers: list[int]) -> tuple[bytes, Any]:
    raw = {"r_params": [n / 100 - 5 for n in numbers[:2]], "weight_s": [n / 500 for n in numbers[2:]]}
    facts = {"num_steps": 2, "num_points": 2, "guidance_rate": 7.5, "schedule_type": "discrete", "schedule_rho": 1.0}
    parts = [_text(key) + _plain(value) for key, value in facts.items()]
    parts += [_text(key) + _parameter(values) for key, values in raw.items()]
    state = _text("class_name") + _text("EPD_predictor") + _text("state") + b"}(" + b"".join(parts) + b"u"
    positions = torch.tensor([raw["r_params"]], dtype=torch.float64).sigmoid().sort().values
    start = b"\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n}("
    return start + state + b"u\x85R.", positions.tolist()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _plain(value: object) -> bytes:
    if isinstance(value, str):
        return _text(value)
    return b"K%c" % value if isinstance(value, int) else b"G" + struct.pack(">d", value)


def _parameter(values: list[float]) -> bytes:
    """A pickled parameter [1, K], as the reference's files hold it."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch wishes that nobody used typed storages
        storage = torch.tensor(values, dtype=torch.float64).storage()
        torch.save(storage, stream, _use_new_zipfile_serialization=False)
    data, count = stream.getvalue(), len(values)
    loaded = b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(data)) + data + b"\x85R"
    shape = b"K\x00K\x01K%c\x86K%cK\x01\x86\x89NtR" % (count, count)
    return b"ctorch._utils\n_rebuild_parameter\n(ctorch._utils\n_rebuild_tensor_v2\n(" + loaded + shape + b"\x89NtR"


def _splits(numbers: list[int]) -> tuple[bytes, Any]:
    texts = [f"a red circle {n} é" for n in numbers]
    value = {"train": texts[:2], "validation": texts[2:3], "test": texts[3:]}
    return json.dumps(value).encode(), value


def _made_by(numbers: list[int]) -> tuple[bytes, Any]:
    machine: dict[str, Any] = {"cores": 2, "cpu": "x", "gpus": [], "versions": {"python": "3"}}
    commands = tuple(f"epd-ray bench {n}" for n in numbers)
    return json.dumps(Provenance(commands, machine).record()).encode(), (commands, machine)


def _read_made_by(path: Path) -> Any:
    found = signed_by(path.parent)
    return (found.commands, found.machine) if found.where else None


def _evaluation(numbers: list[int]) -> tuple[bytes, Any]:
    mean = {"mean": numbers[0] / 8, "low": 0.0, "high": 1.0}
    solver = {"key": "euler", "label": "Euler", "kind": "euler", "intervals": 4, "parallel_nfe": 4, "model_evals": 4}
    record = {"split": "test", "prompts": 4, "metrics": ["clip"], "solvers": [{**solver, "metrics": {"clip": mean}}]}
    return json.dumps(record).encode(), [numbers[0] / 8]


def _read_evaluation(path: Path) -> list[float]:
    return [interval.mean for solver in read_evaluation(path).solvers for interval in solver.metrics.values()]


def _index(numbers: list[int]) -> tuple[bytes, Any]:
    value = {"_class_name": f"Pipeline{numbers[0]}", "vae": ["diffusers", "AutoencoderKL"], "unet": [None, None]}
    return json.dumps(value).encode(), (value["_class_name"], {"vae": True, "unet": False})


def _read_model(path: Path) -> Any:
    found = read_index(str(path.parent), None)
    return found.class_name, found.components


def _lines(numbers: list[int]) -> tuple[bytes, Any]:
    texts = [f"a blue square, {i} and {n}" for i, n in enumerate(numbers)]
    return "\n".join(texts).encode(), texts


def _csv(numbers: list[int]) -> tuple[bytes, Any]:
    _, texts = _lines(numbers)
    return "\n".join(["prompt", *(f'"{text}"' for text in texts)]).encode(), texts


def _jsonl(numbers: list[int]) -> tuple[bytes, Any]:
    _, texts = _lines(numbers)
    return "\n".join(json.dumps({"prompt": text}) for text in texts).encode(), texts


def _png(numbers: list[int]) -> bytes:
    pixels = (np.arange(8 * 8 * 3) * (numbers[0] + 1) % 256).astype(np.uint8).reshape(8, 8, 3)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _picture(numbers: list[int]) -> tuple[bytes, Any]:
    data = _png(numbers)
    return data, np.asarray(Image.open(io.BytesIO(data), formats=["PNG"])).tolist()


def _request(numbers: list[int]) -> tuple[bytes, Any]:
    image = base64.b64encode(_png(numbers)).decode()
    prompts = [f"a red circle {numbers[1]}"]
    return json.dumps({"images": [image], "format": "png", "prompts": prompts}).encode(), prompts


IMPORTERS = {
    "configuration": Importer(_config, _read_config, "run.yaml"),
    "override": Importer(lambda numbers: (b"seed=%d" % numbers[0], numbers[0]), _read_override, "override"),
    "solver.json": Importer(_solver, _read_solver, "solver.json"),
    "reference table": Importer(_pickle, _read_pickle, "a.pkl"),
    INDEX: Importer(_index, _read_model, INDEX),
    "prompts.json": Importer(_splits, lambda path: vars(read_splits(path)), "prompts.json"),
    MADE_BY: Importer(_made_by, _read_made_by, MADE_BY),
    "evaluation.json": Importer(_evaluation, _read_evaluation, "evaluation.json"),
    "prompts, txt": Importer(_lines, read_prompts, "prompts.txt"),
    "prompts, csv": Importer(_csv, read_prompts, "prompts.csv"),
    "prompts, jsonl": Importer(_jsonl, read_prompts, "prompts.jsonl"),
    "picture": Importer(_picture, lambda path: np.asarray(decode_picture(path)).tolist(), "a.png"),
    "reward request": Importer(_request, lambda path: read_request(path.read_bytes(), Limits()).prompts, "body"),
}


def main() -> int:
    found = fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else COUNT)
    table = Table("kind", "inputs", *OUTCOMES)
    for kind, outcomes in {**found, "all": sum(found.values(), Counter())}.items():
        table.add_row(kind, str(outcomes.total()), *(str(outcomes[name]) for name in OUTCOMES))
    Console(width=120).print(table)
    return int(any(outcomes[name] for outcomes in found.values() for name in BAD))


if __name__ == "__main__":
    sys.exit(main())
