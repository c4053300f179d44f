import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from epd_ray.errors import PromptError
from epd_ray.prompts.files import SUFFIXES, read_prompts


def write(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\ntwo, three\none\n", ["one", "two, three", "one"]),
        ("a", "one\n", ["one"]),
        # Columns of public COCO caption files.
        ("a.csv", "image_id,text\n42,A cat.\n43,\"Two dogs, one bone.\n\"\n", ["A cat.", "Two dogs, one bone."]),
        ("a.csv", "uid,caption\n346904_mscoco_0,A bus.\n", ["A bus."]),
        ("a.CSV", "\ufeffcaptions,file_name\nA bus.,x.jpg\n", ["A bus."]),
        ("a.csv", "text, Prompt\nwrong,right\n", ["right"]),
        ("a.csv", "sentence\r\nA bus.\r\n\"He said \"\"go\"\".\"\r\n", ["A bus.", 'He said "go".']),
        ("a.csv", 'caption,id\n"two\nlines",1\nlast,2\n', ["two\nlines", "last"]),
        ("a.jsonl", '{"prompt": "a", "id": 1}\n{"caption": "b"}\n{"text": "\\u00e9"}\n"p"\n', ["a", "b", "é", "p"]),
        ("a.jsonl", '{"captions": ["first", "second"]}\n', ["first"]),
        ("a.parquet", {"id": [1, 2], "caption": ["a", "b"]}, ["a", "b"]),
        ("a.parquet", {"captions": [["a", "b"], ["c"]]}, ["a", "c"]),
        ("a.parquet", {"anything": ["a"]}, ["a"]),
    ],
)  # fmt: skip
def test_reads(tmp_path: Path, name: str, content: Any, expected: list[str]) -> None:
    assert read_prompts(write(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "prompt\n", "is empty"),
        ("a.csv", "id,file\n1,2\n", r"has the columns id, file, expected one of prompt, caption, text"),
        ("a.csv", "A cat on a mat.\nA dog.\n", r"line 1: 'A cat on a mat.' is no column name"),
        ("a.csv", "prompt,id\na,1\nb, c,2\n", r"line 3: 3 columns, expected 2 \(quote"),
        ("a.csv", "prompt,id\na,1\n ,2\n", r"line 3: blank"),
        ("a.csv", 'prompt,id\n"two\nlines",1\n,2\n', r"line 4: blank"),
        ("a.csv", b"prompt\na\n\xff\n", r"line 3: not UTF-8"),
        ("a.csv", 'prompt\n"a\n', r"line 2: not CSV"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"line 2: not JSON"),
        ("a.csv", "id;caption\n1;a cat\n", r"line 1: 'id;caption' is one column \(separate columns with commas\)"),
        ("a.csv", "id\tcaption\n1\ta cat\n", r"line 1: 'id\\tcaption' is one column"),
        ("a.jsonl", "[" * 200_000, r"line 1: not JSON \(maximum recursion"),
        ("a.jsonl", "9" * 5000, r"line 1: not JSON \(Exceeds the limit"),
        ("a.jsonl", '{"prompt": "a"}\n\n', r"line 2: blank"),
        ("a.jsonl", '{"x": 1, "y": 2}\n', r"line 1 has the columns x, y, expected one of"),
        ("a.jsonl", "{}\n", r"line 1 has the columns \(none\)"),
        ("a.jsonl", "[1]\n", r"line 1: list, expected an object with a key 'prompt'"),
        ("a.jsonl", '{"prompt": 3}\n', r"line 1: 'prompt' is int, expected text"),
        ("a.parquet", b"not parquet", r"not Parquet"),
        ("a.parquet", {"x": [1], "y": [2]}, r"has the columns x, y"),
        ("a.parquet", {"text": ["a", None]}, r"row 2: blank|line 2: blank"),
        ("a.parquet", {"text": [1.5]}, r"row 1: 'text' is float"),
        ("a.parquet", {"text": pa.array([], pa.string())}, r"is empty"),
    ],
)
def test_names_what_is_wrong(tmp_path: Path, name: str, content: Any, said: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(PromptError, match=said) as raised:
        read_prompts(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_absent_files(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(PromptError, match="No such file"):
        read_prompts(tmp_path / f"absent{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(PromptError, match="is a directory"):
        read_prompts(tmp_path / f"folder{suffix}")


def test_json_lines_keep_unusual_separators(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", json.dumps({"prompt": "a \u2028 b"}, ensure_ascii=False) + "\n")
    assert read_prompts(path) == ["a \u2028 b"]
