"""Changes of a valid document in one place: of its bytes, or within its form, so that much of it is still read."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TOKENS = (
    b"NaN", b"-1e999", b"null", b"true", b"[]", b"{}", b'""', b"9" * 5000, b"[" * 300, b"\xff\xfe", b"\x00", b"\n",
    b"\t", b"*a", b"&a ", b"!!python/name:os.system", b"0", b"-1", b'"\\ud800"', b",", b'"', b":", b"1" * 30,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1e308,
    10**30,
    "",
    "x",
    "é\u2028",
    "a\nb",
    [],
    {},
    [[]],
    {"a": None},
    0.5,
    "../a",
    "NaN",
)
WAYS = ("none", "flip", "cut", "insert", "token", "repeat", "raw", "form", "form", "form")


def changed(name: str, data: bytes, how: str, begin: float, end: float, token: int, raw: bytes) -> bytes:
    """A document with one change.

    Args:
        name: of its file, whose ending says the form.
        data: the document.
        how: one of WAYS.
        begin: where the change begins, as a share of the document, in [0, 1].
        end: where it ends, in the same way.
        token: a number that chooses what is put in its place, at least 0.
        raw: other bytes.
    """
    a, b = sorted((int(begin * len(data)), int(end * len(data))))
    word = TOKENS[token % len(TOKENS)]
    made: Mapping[str, Callable[[], bytes]] = {
        "none": lambda: data,
        "flip": lambda: data[:a] + bytes([data[a] ^ (1 << (b % 8))]) + data[a + 1 :] if a < len(data) else data,
        "cut": lambda: data[:a] + data[b:],
        "insert": lambda: data[:a] + raw + data[a:],
        "token": lambda: data[:a] + word + data[min(b, a + 8) :],
        "repeat": lambda: data[:b] + data[a:b] * 3 + data[b:],
        "raw": lambda: raw,
        "form": lambda: _FORMS.get(Path(name).suffix, _lines)(data, begin, end, token),
    }
    return made[how]()


def _lines(data: bytes, begin: float, end: float, token: int) -> bytes:
    """Lines in another order, one of them twice or not at all."""
    lines = data.split(b"\n")
    a, b = (min(int(share * len(lines)), len(lines) - 1) for share in (begin, end))
    kinds = (
        lambda: [*lines[:a], *lines[a + 1 :]],
        lambda: [*lines[:a], lines[a], *lines[a:]],
        lambda: [*lines[:a], lines[b], *lines[a + 1 :]],
        lambda: [*lines[:a], lines[a].rstrip() + b"\r", *lines[a + 1 :]],
        lambda: [*lines[:a], b"", *lines[a:]],
    )
    return b"\n".join(kinds[token % len(kinds)]())


def _json(data: bytes, begin: float, end: float, token: int) -> bytes:
    """A value in a JSON document set to another one, removed, or stored under another key."""
    document = json.loads(data)
    places = list(_places(document))
    holder, key = places[min(int(begin * len(places)), len(places) - 1)]
    new = VALUES[token % len(VALUES)]
    if end < 0.6:
        holder[key] = new
    elif end < 0.75 or isinstance(holder, list):
        del holder[key]
    else:
        holder[str(new)] = holder.pop(key)
    return json.dumps(document).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    parts = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [place for key, part in parts for place in ((value, key), *_places(part))]


def _table(data: bytes, begin: float, end: float, token: int) -> bytes:
    """A Parquet file with a column or a row missing or twice, or with a column of another type or without a value."""
    table = pq.read_table(pa.BufferReader(data))
    i = min(int(begin * table.num_columns), table.num_columns - 1)
    row = min(int(end * len(table)), len(table) - 1)
    name, column = table.column_names[i], table.column(i)

    def put(values: list[Any], kind: pa.DataType | None = None) -> pa.Table:
        return table.set_column(i, pa.field(name, kind or column.type), pa.array(values, kind or column.type))

    cells = column.to_pylist()
    kinds: list[Callable[[], pa.Table]] = [
        lambda: table.drop_columns(name),
        lambda: table.append_column(name, column),
        lambda: table.rename_columns({name: f"{name} "}) if token % 2 else table.rename_columns({name: name.upper()}),
        lambda: put([*cells[:row], None, *cells[row + 1 :]]),
        lambda: put([str(cell) for cell in cells], pa.string()),
        lambda: put([cells[row]] * len(cells)),
        lambda: put([b"\xff\xfe"] * len(cells), pa.binary()),
        lambda: pa.concat_tables([table, table.slice(row, 1)]),
        lambda: table.slice(row),
        lambda: table.slice(0, 0),
        lambda: table.replace_schema_metadata({key: b"[5]" for key in table.schema.metadata or {}}),
        lambda: put([[cell] for cell in cells], pa.list_(column.type)),
    ]
    sink = io.BytesIO()
    pq.write_table(kinds[token % len(kinds)](), sink, row_group_size=1 + token % 3)
    return sink.getvalue()


def _tar(data: bytes, begin: float, end: float, token: int) -> bytes:
    """A tar with a member that is missing, twice, renamed, of another kind or with other content."""
    with tarfile.open(fileobj=io.BytesIO(data)) as old:
        members = [(member, old.extractfile(member).read()) for member in old]  # type: ignore[union-attr]
    i = min(int(begin * len(members)), len(members) - 1)
    member, content = members[i]
    names = (
        f"._{member.name}",
        f"{member.name}.gz",
        f"a/{member.name}",
        member.name.upper(),
        "é/\udcff.png",
        "../b.png",
    )
    match token % 5:
        case 0:
            del members[i]
        case 1:
            members.append((member, content))
        case 2:
            member.name = names[int(end * (len(names) - 1))]
        case 3:
            member.type, member.linkname = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE)[int(end * 2)], "b.png"
        case _:
            members[i] = member, (b"", b"\xff", b"{}", b"[" * 2000, content[:-3])[int(end * 4)]
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as new:
        for one, held in members:
            one.size = len(held) if one.isreg() else 0
            new.addfile(one, io.BytesIO(held))
    return sink.getvalue()


def _http(data: bytes, begin: float, end: float, token: int) -> bytes:
    """A request with a value of its JSON changed and its length mended, or with its lines changed."""
    head, _, body = data.partition(b"\r\n\r\n")
    if token % 3 == 0:
        return _lines(data, begin, end, token // 3)
    new = _json(body, begin, end, token)
    head = head.replace(b"Content-Length: %d" % len(body), b"Content-Length: %d" % len(new))
    return head + b"\r\n\r\n" + new


_FORMS: Mapping[str, Callable[[bytes, float, float, int], bytes]] = {
    ".json": _json,
    ".parquet": _table,
    ".tar": _tar,
    ".http": _http,
}
