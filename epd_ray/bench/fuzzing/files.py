"""Kinds of files that are not, or not alone, text of this project: prompts, pictures, tars, tables and tensors."""

import csv
import functools
import io
import json
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save

from epd_ray.bench.fuzzing.importer import Importer, writes
from epd_ray.evaluation.metrics.frechet import Gaussian
from epd_ray.evaluation.metrics.reference import read_statistics, write_statistics
from epd_ray.evaluation.validation import Curve, Validation, read_curve, write_curve
from epd_ray.prompts.files import read_prompts
from epd_ray.rewards.checkpoints import read_tensors
from epd_ray.score.inputs import read_index
from epd_ray.score.names import named_prompts
from epd_ray.score.output import ScoreDirectory
from epd_ray.score.rows import decode, score_column
from epd_ray.storage.checkpoint import FORMAT, read_checkpoint, save_checkpoint
from epd_ray.storage.pictures import decode_picture
from epd_ray.storage.rollouts import read_rollouts, rollout_table, write_rollouts

Rows = Sequence[Sequence[str]]
"""The cells of a table, row by row; the first row holds the names of the columns."""


# -- tables of text ---------------------------------------------------------------------------------------------------


def _csv(rows: Rows, delimiter: str = ",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    return text.getvalue().encode()


def _records(rows: Rows) -> list[dict[str, str]]:
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def _jsonl(rows: Rows) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in _records(rows))


def _parquet(rows: Rows) -> bytes:
    return _parquet_file(pa.table(dict(zip(rows[0], map(list, zip(*rows[1:], strict=True)), strict=True))))


def _parquet_file(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2)
    return sink.getvalue()


ENCODE: dict[str, Callable[[Rows], bytes]] = {
    "csv": _csv,
    "tsv": lambda rows: _csv(rows, "\t"),
    "jsonl": _jsonl,
    "json": lambda rows: json.dumps(_records(rows)).encode(),
    "parquet": _parquet,
    "txt": lambda rows: "\n".join(row[0] for row in rows[1:]).encode(),
}


def _prompts(numbers: list[int]) -> list[str]:
    return [f'a blue square, "{i}" and {n} é' for i, n in enumerate(numbers)]


def _prompt_kind(ending: str) -> Importer:
    encode = ENCODE[ending]

    def make(numbers: list[int]) -> tuple[bytes, Any]:
        return encode([["prompt"], *([text] for text in _prompts(numbers))]), _prompts(numbers)

    def writable(found: list[str]) -> bytes:
        return encode([["prompt"], *([text] for text in found)])

    # a prompt of a cell may have line breaks or tabs, which text files and .tsv files cannot hold
    write = writes(f"a.{ending}", writable) if ending not in ("txt", "tsv") else None
    return Importer(make, read_prompts, f"a.{ending}", write=write, holds=_are_prompts)


def _are_prompts(found: list[str], path: Path) -> bool:
    return len(found) > 0 and all(text == text.strip() != "" and text.encode() for text in found)


NAMES = [f"{i}.png" for i in range(4)]


def _named_kind(ending: str) -> Importer:
    def make(numbers: list[int]) -> tuple[bytes, Any]:
        rows = zip(NAMES, _prompts(numbers), strict=True)
        return ENCODE[ending]([["file_name", "prompt"], *map(list, rows)]), _prompts(numbers)

    def read(path: Path) -> list[str | None]:
        return [None if named is None else named.prompt for named in named_prompts(path, NAMES)]

    def one_each(found: list[str | None], path: Path) -> bool:
        return len(found) == len(NAMES) and any(text is not None for text in found)

    return Importer(make, read, f"a.{ending}", holds=one_each)


# -- pictures ---------------------------------------------------------------------------------------------------------

SIZES = [(8, 8), (5, 9), (16, 3), (1, 1)]  # width and height
PICTURES: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 90},
    "WEBP": {"lossless": True},
    "BMP": {},
    "TIFF": {},
    "GIF": {},
}


def png(numbers: list[int]) -> bytes:
    """A picture of a size and colours that the numbers choose."""
    return _encoded(numbers, "PNG")


def _encoded(numbers: list[int], name: str) -> bytes:
    width, height = SIZES[numbers[1] % len(SIZES)]
    pixels = (np.arange(height * width * 3) * (numbers[0] + 1) % 256).astype(np.uint8).reshape(height, width, 3)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, name, **PICTURES[name])
    return stream.getvalue()


def _picture(numbers: list[int], name: str) -> tuple[bytes, Any]:
    data = _encoded(numbers, name)
    return data, np.asarray(Image.open(io.BytesIO(data), formats=[name]).convert("RGB")).tolist()


def _has_its_size(found: Image.Image, path: Path) -> bool:
    """Whether a picture is RGB, and a PNG has the size that its header says, maybe turned."""
    data = path.read_bytes()
    said = struct.unpack(">II", data[16:24]) if data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR") else found.size
    return found.mode == "RGB" and found.size in (said, said[::-1])


def _picture_kind(name: str) -> Importer:
    return Importer(
        functools.partial(_picture, name=name), decode_picture, f"a.{name.lower()}",
        lambda found: np.asarray(found).tolist(), holds=_has_its_size,
    )  # fmt: skip


def _tar(numbers: list[int]) -> tuple[bytes, Any]:
    sink = io.BytesIO()
    members: dict[str, bytes] = {}
    for i, text in enumerate(_prompts(numbers)):
        members |= {f"{i}.png": png([numbers[i]] * 4)}
        members |= {f"{i}.txt": text.encode()} if i % 2 else {f"{i}.json": json.dumps({"caption": text}).encode()}
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return sink.getvalue(), [(f"a.tar/{i}", text) for i, text in enumerate(_prompts(numbers))]


def _source(numbers: list[int]) -> tuple[bytes, Any]:
    pictures = [{"bytes": png([n] * 4), "path": f"{n}.png"} for n in numbers]
    table = pa.table({"id": NAMES, "image": pictures, "prompt": _prompts(numbers)})
    return _parquet_file(table), list(zip(NAMES, _prompts(numbers), strict=True))


def _scored_rows(path: Path) -> list[dict[str, Any]]:
    return [row for table in decode(read_index(str(path))) for row in table.to_pylist()]


def _are_rows(rows: list[dict[str, Any]], path: Path) -> bool:
    """Whether each row has either an error or a prompt with as many pixels as its size says."""
    whole = [r for r in rows if r["error"] is None]
    sizes = all(len(r["pixels"]) == r["height"] * r["width"] * 3 > 0 and r["prompt"] for r in whole)
    return sizes and len({row["id"] for row in rows}) == len(rows)


def _ids_and_prompts(rows: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["id"], row["prompt"]) for row in rows]


# -- files of runs ----------------------------------------------------------------------------------------------------


def _file_of(write: Callable[[Path], object], name: str) -> bytes:
    """The content of the file of this name that `write` writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return Path(folder, name).read_bytes()


def _checkpoint(numbers: list[int]) -> tuple[bytes, Any]:
    state = {"policy": {"weight": np.array(numbers, np.float32) / 8}, "rng": [1, 2, numbers[0]], "note": "é"}
    data = _file_of(lambda folder: save_checkpoint(folder, numbers[0], state, 1), f"iteration-{numbers[0]:06d}.pt")
    return data, _plain({"format": FORMAT, "iteration": numbers[0], **state})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _rollouts(numbers: list[int]) -> tuple[bytes, Any]:
    table = _rollout_rows(numbers)
    return _file_of(lambda folder: write_rollouts(folder, 3, table), "iteration-000003.parquet"), table.to_pylist()


def _rollout_rows(numbers: list[int]) -> pa.Table:
    rows = [
        {
            "rollout_id": f"r{i}", "group_id": f"g{i % 2}", "iteration": 3, "prompt": text, "noise_seed": n,
            "action_seed": i, "policy_version": 2, "action": [0.5, 0.5, 1.0], "positions": [0.5], "weights": [1.0],
            "scale_dir": None, "scale_time": [n / 8], "grid": [1.0], "history": None, "guidance": [n / 8],
            "log_prob": n / 8, "reward": n / 8, "advantage": -n / 8, "generate_seconds": 0.5,
            "score_seconds": 0.25, "image": None, "rewards": {"clip": n / 8},
        }
        for i, (n, text) in enumerate(zip(numbers, _prompts(numbers), strict=True))
    ]  # fmt: skip
    return rollout_table(rows)


def _is_one_iteration(table: pa.Table, path: Path) -> bool:
    return len(set(table["iteration"].to_pylist())) == 1 and table.num_rows > 0


HEADS = {"clip": {"head": "clip", "backend": "actors", "options": {}}}
PART = "part-000001.parquet"


def _scores(numbers: list[int]) -> tuple[bytes, Any]:
    cells = {"id": NAMES, "prompt": _prompts(numbers), "error": pa.nulls(4, pa.string())}
    table = pa.table({**cells, score_column("clip"): pa.array([n / 8 for n in numbers], pa.float32())})
    data = _file_of(lambda folder: ScoreDirectory(folder, HEADS).add([table], {"clip": "m"}), PART)
    mean = sum(numbers) / 8 / 4
    return data, (4, 0, round(mean, 6))


def _totals(path: Path) -> Any:
    found = ScoreDirectory(path.parent, HEADS).totals()
    return found.rows, found.errors, None if (mean := found.mean["clip"]) is None else round(mean, 6)


def _curve(numbers: list[int]) -> tuple[bytes, Any]:
    curve = Curve(tuple(_prompts(numbers)), tuple(numbers), ("clip",))
    for iteration in range(2):
        reward = np.array([(n + iteration) / 8 for n in numbers], np.float32)
        curve = curve.extended(Validation(iteration, reward, {"clip": reward, "aesthetic": -reward}))
    return _file_of(lambda folder: write_curve(folder / "v.parquet", curve), "v.parquet"), curve.metrics()


def _curve_seen(curve: Curve) -> Any:
    numbers = curve.metrics()
    return numbers if all(np.isfinite([*numbers.values()])) else str(numbers)  # NaN is not equal to itself


# -- weights and statistics -------------------------------------------------------------------------------------------


def _weights(numbers: list[int]) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.tensor([numbers], dtype=torch.float32), "a.bias": torch.tensor(numbers[:1])}


def _safetensors(numbers: list[int]) -> tuple[bytes, Any]:
    return save(_weights(numbers)), _tensors_seen(_weights(numbers))


def _pt(numbers: list[int]) -> tuple[bytes, Any]:
    sink = io.BytesIO()
    torch.save({"state_dict": _weights(numbers)}, sink)
    return sink.getvalue(), _tensors_seen(_weights(numbers))


def _tensors_seen(tensors: dict[str, torch.Tensor]) -> Any:
    return {name: (list(tensor.shape), str(tensor.tolist())) for name, tensor in sorted(tensors.items())}


def _write_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(save(tensors))


def _statistics(numbers: list[int]) -> tuple[bytes, Any]:
    found = Gaussian(np.array(numbers, np.float64), np.diag(np.array(numbers, np.float64)), 9)
    return _file_of(lambda folder: write_statistics(folder / "a.npz", found), "a.npz"), _statistics_seen(found)


def _statistics_seen(found: Gaussian) -> Any:
    return found.mean.tolist(), found.covariance.tolist(), found.count


FILES = {
    **{f"prompts, {ending}": _prompt_kind(ending) for ending in ENCODE},
    **{f"score table, {ending}": _named_kind(ending) for ending in ("csv", "jsonl", "parquet")},
    **{f"picture, {name}": _picture_kind(name) for name in PICTURES},
    "tar with captions": Importer(_tar, _scored_rows, "a.tar", _ids_and_prompts, holds=_are_rows),
    "pictures in parquet": Importer(_source, _scored_rows, "a.parquet", _ids_and_prompts, holds=_are_rows),
    "checkpoint": Importer(_checkpoint, read_checkpoint, "a.pt", _plain, sealed=True),
    "rollouts": Importer(
        _rollouts, read_rollouts, "iteration-000003.parquet", lambda table: table.to_pylist(), holds=_is_one_iteration
    ),
    "scores": Importer(_scores, _totals, PART),
    "validation curve": Importer(
        _curve, read_curve, "v.parquet", _curve_seen, lambda found, folder: write_curve(folder / "v.parquet", found)
    ),
    "weights, safetensors": Importer(_safetensors, read_tensors, "a.safetensors", _tensors_seen, _write_tensors),
    "weights, pt": Importer(_pt, read_tensors, "a.pt", _tensors_seen),
    "FID statistics": Importer(
        _statistics, read_statistics, "a.npz", _statistics_seen,
        lambda found, folder: write_statistics(folder / "a.npz", found), sealed=True,
    ),
}  # fmt: skip
