import codecs
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
        ("a.parquet", {"text": pa.array(["a", "b", "a"]).dictionary_encode()}, ["a", "b", "a"]),
        ("a.parquet", {"prompt": ["a"], "day": pa.array([2**62], pa.timestamp("us"))}, ["a"]),
        # What looks like something else stays text.
        ("a.csv", "prompt\n2024-05-01\n007\nNA\n1e5\nTrue\n", ["2024-05-01", "007", "NA", "1e5", "True"]),
        ("a.jsonl", '{"prompt": "2024-05-01"}\n{"prompt": "null"}\n', ["2024-05-01", "null"]),
        # What other columns hold does not matter.
        ("a.jsonl", '{"text": "a", "x": 1}\n{"text": "b", "x": {"y": 2}}\n{"text": "c", "x": [3]}\n', ["a", "b", "c"]),
        ("a.csv", "x,x,prompt,\n1,2,a,\n", ["a"]),
        # PartiPrompts, whose quotes belong to the prompts; and what a spreadsheet writes.
        ("a.tsv", 'Prompt\tCategory\tNote\nbond\tAbstract\t\nA "b" c.\tArts\tx\n', ["bond", 'A "b" c.']),
        ("a.TSV", 'id\tcaption\r\n1\t"a ""b"" c"\r\n2\t"go" on "now"\r\n', ['a "b" c', '"go" on "now"']),
        ("a.json", '["a, b", "c"]', ["a, b", "c"]),
        ("a.json", '[{"caption": "a", "id": 1}, {"prompt": "b"}, "c"]', ["a", "b", "c"]),
        ("a.json", '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}, {"caption": "b"}]}', ["a", "b"]),
        # Encodings and ends of lines.
        ("a.txt", "\ufeffé\r\nb\rc".encode(), ["é", "b", "c"]),
        ("a.txt", "é\nb\n".encode("utf-16"), ["é", "b"]),
        ("a.txt", codecs.BOM_UTF16_BE + "é\r\nb".encode("utf-16-be"), ["é", "b"]),
        ("a.csv", "prompt,id\r\né,1\r\n".encode("utf-16"), ["é"]),
        ("a.tsv", "prompt\tid\né\t1\n".encode("utf-16"), ["é"]),
        ("a.jsonl", '{"prompt": "é"}\n'.encode("utf-16"), ["é"]),
        ("a.json", '["é"]'.encode("utf-8-sig"), ["é"]),
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
        ("a.csv", b"prompt\na\n\xff\n", r"line 3: not UTF-8 at byte 9 .*save the file as UTF-8"),
        ("a.txt", "\ufeffa\nb".encode() + b"\xe9\n", r"line 2: not UTF-8 at byte 6 "),
        ("a.txt", "ab\n".encode("utf-16-le"), r"the character at byte 1 is zero"),
        ("a.txt", "a\n".encode("utf-16") + b"x", r"not UTF-16 at byte 6 "),
        ("a.txt", "a\n".encode("utf-32"), r"not UTF-8 at byte 0 "),
        ("a.txt", codecs.BOM_UTF16_LE + "ab\0".encode("utf-16-le"), r"the character at byte 6 is zero"),
        ("a.json", b'["\xff"]', r"not UTF-8 at byte 2 "),
        ("a.yaml", "- a\n- b\n", r"of a kind that is not read, expected \.txt, \.csv, \.tsv"),
        ("a.xlsx", "PK", r"of a kind that is not read"),
        ("a.csv", "prompt,Prompt\na,b\n", r"has the columns 'prompt' and 'Prompt'"),
        ("a.csv", "prompt,prompt\na,b\n", r"has the columns 'prompt' and 'prompt'"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', r"line 1 has the columns 'prompt' and 'prompt'"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', r"line 1: 'prompt' is .* half of a character"),
        ("a.jsonl", '{"captions": [1]}\n', r"line 1: 'captions' is int"),
        ("a.jsonl", '{"prompt": []}\n', r"line 1: blank"),
        ("a.tsv", "prompt\tid\na\n", r"line 2: 1 columns, expected 2"),
        ("a.tsv", "A cat on a mat.\nA dog.\n", r"line 1: 'A cat on a mat.' is no column name"),
        ("a.json", '{"x": 1}', r"expected a list of texts or objects, or COCO's annotations"),
        ("a.json", "[1]", r"entry 1: int"),
        ("a.json", "[]", r"is empty"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n', r"belongs into a \.jsonl file\): not JSON"),
        ("a.json", "[" * 200_000, r"not JSON \(maximum recursion"),
        ("a.parquet", {"text": pa.array([2**62], pa.timestamp("us"))}, r"'text' is timestamp"),
        (
            "a.parquet",
            {
                "text": pa.Array.from_buffers(
                    pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
                )
            },
            r"not valid UTF-8",
        ),
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
        ("a.parquet", {"text": [1.5]}, r"'text' is double"),
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


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_picture_beside_the_prompt_does_not_matter(tmp_path: Path, suffix: str) -> None:
    base64 = "x" * 3_000_000
    contents = {
        ".csv": f"b64,prompt\n{base64},a\n",
        ".tsv": f"b64\tprompt\n{base64}\ta\n",
        ".jsonl": json.dumps({"b64": base64, "prompt": "a"}),
    }
    assert read_prompts(write(tmp_path, f"a{suffix}", contents[suffix])) == ["a"]
