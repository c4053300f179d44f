"""Indexes of pictures from folders, tars and Parquet, and their bytes on the way to pixels; no Ray."""

import io
import json
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from epd_ray.errors import EpdRayError, PromptError
from epd_ray.evaluation.metrics.pictures import picture_files
from epd_ray.prompts.panel import Panel
from epd_ray.score.inputs import read_index
from epd_ray.score.rows import ROWS_PER_TASK, decode, pieces
from epd_ray.storage.pictures import FORMATS, in_order


def png(brightness: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    Image.new(mode, size, brightness if mode.startswith("I") else (brightness,) * 3).save(data, "PNG")
    return data.getvalue()


def folder_of(path: Path, names: list[str], prompts: bool = True) -> Path:
    for i, name in enumerate(names):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(10 * i))
        if prompts:
            file.with_suffix(".txt").write_text(f"prompt {i}\n")
    return path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def parquet_of(path: Path, columns: dict[str, object], row_group_size: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def pixels_of(index: pa.Table) -> dict[str, object]:
    """Id -> brightness of the first pixel, or the error."""
    found = {}
    for piece in pieces(index):
        for row in (row for table in decode(piece) for row in table.to_pylist()):
            found[row["id"]] = row["error"] or np.frombuffer(row["pixels"], np.uint8)[0]
    return found


def prompts_of(index: pa.Table) -> dict[str, str]:
    return dict(zip(index["id"].to_pylist(), index["prompt"].to_pylist(), strict=True))


def test_a_folder_with_texts_beside_its_pictures(tmp_path):
    index = read_index(str(folder_of(tmp_path, ["b.png", "deep/a.PNG", "a.png"])))
    assert prompts_of(index) == {"a.png": "prompt 2", "b.png": "prompt 0", "deep/a.PNG": "prompt 1"}
    assert pixels_of(index) == {"a.png": 20, "b.png": 0, "deep/a.PNG": 10}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_folder_with_a_table_of_prompts(tmp_path, suffix):
    rows = [{"file_name": "./007.png", "caption": "seven, or 007"}, {"file_name": "gone.png", "caption": "x"}]
    table = tmp_path / f"prompts{suffix}"
    match suffix:
        case ".csv":
            table.write_text('file_name,caption\n./007.png,"seven, or 007"\ngone.png,x\n')
        case ".jsonl":
            table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), table)
    index = read_index(str(folder_of(tmp_path / "images", ["007.png", "8.png"], prompts=False)), table)
    assert prompts_of(index) == {"007.png": "seven, or 007", "8.png": ""}
    assert index["error"].to_pylist() == [None, "no prompt"]
    assert pixels_of(index) == {"007.png": 0, "8.png": "no prompt"}


def test_a_folder_with_a_prompt_a_line(tmp_path):
    folder_of(tmp_path / "images", ["2.png", "1.png"], prompts=False)
    lines = tmp_path / "lines.txt"
    lines.write_text("one\ntwo\n")
    assert prompts_of(read_index(str(tmp_path / "images"), lines)) == {"1.png": "one", "2.png": "two"}


def test_numbers_are_in_the_order_of_their_values(tmp_path):
    names = ["2.png", "10.png", "99.png", "100.png", "999.png", "1000.png"]
    images = folder_of(tmp_path / "images", names[::-1], prompts=False)
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"prompt of {name}\n" for name in names))
    for source in (str(images), str(images / "*.png")):
        assert prompts_of(read_index(source, lines)) == {name: f"prompt of {name}" for name in names}
    assert [path.name for path in picture_files(images)] == names


def test_equal_numbers_are_in_one_order(tmp_path):
    names = ["001.png", "01.png", "1.png", "a/01.png", "a/1.png"]
    for shuffled in (names, names[::-1]):
        assert in_order(tmp_path, [tmp_path / name for name in shuffled]) == [tmp_path / name for name in names]


def test_tars(tmp_path):
    tar_of(tmp_path / "00.tar", {"a.txt": b"first", "a.png": png(1), "b.png": png(2), "b.json": b'{"caption": "two"}'})
    tar_of(tmp_path / "sub/01.tar", {"x/a.jpg": png(3), "x/a.txt": b"third", "c.png": png(4), "c.json": b"[not json"})
    whole = read_index(str(tmp_path))
    assert prompts_of(whole) == {"00.tar/a": "first", "00.tar/b": "two", "sub/01.tar/x/a": "third", "sub/01.tar/c": ""}
    assert pixels_of(whole) == {"00.tar/a": 1, "00.tar/b": 2, "sub/01.tar/x/a": 3, "sub/01.tar/c": "no prompt"}
    assert list(prompts_of(read_index(str(tmp_path / "0*.tar")))) == ["00.tar/a", "00.tar/b"]


@pytest.mark.parametrize("hugging_face", [False, True])
def test_parquet(tmp_path, hugging_face):
    data = [png(1), png(2), b"no picture", None, png(5)]
    images = [{"bytes": d, "path": None} for d in data] if hugging_face else data
    parquet_of(tmp_path / "a.parquet", {"image": images, "text": ["one", "two", "three", "four", " "]})
    index = read_index(str(tmp_path / "a.parquet"))
    assert prompts_of(index)["a.parquet:1"] == "two"
    assert pixels_of(index) == {
        "a.parquet:0": 1,
        "a.parquet:1": 2,
        "a.parquet:2": "picture cannot be decoded: no known image format, expected one of " + ", ".join(FORMATS),
        "a.parquet:3": "no picture",
        "a.parquet:4": "no prompt",
    }
    assert pixels_of(index.slice(1, 1)) == {"a.parquet:1": 2}


def test_parquet_with_ids(tmp_path):
    parquet_of(tmp_path / "a.parquet", {"image": [png(1)], "prompt": [["first", "second"]], "id": [7]})
    assert prompts_of(read_index(str(tmp_path))) == {"7": "first"}


def test_a_row_group_is_read_once(tmp_path):
    rows = ROWS_PER_TASK * 2 + 10
    columns = {"image": [png(0)] * rows, "prompt": ["x"] * rows}
    index = read_index(str(parquet_of(tmp_path / "a.parquet", columns, row_group_size=100)))
    assert [len(piece) for piece in pieces(index)] == [300, rows - 300]
    one_group = read_index(str(parquet_of(tmp_path / "b.parquet", columns, row_group_size=rows)))
    assert [len(piece) for piece in pieces(one_group)] == [rows]


def test_pictures_that_are_none_keep_their_reason(tmp_path):
    folder_of(tmp_path, ["cut.png", "deep.png", "gone.png"])
    (tmp_path / "cut.png").write_bytes(png(1, (64, 64))[:60])
    (tmp_path / "deep.png").write_bytes(png(1000, mode="I;16"))
    index = read_index(str(tmp_path))
    (tmp_path / "gone.png").unlink()
    found = pixels_of(index)
    assert found["cut.png"].startswith("picture cannot be decoded: ")
    assert "mode I;16, expected 8 bits a channel" in found["deep.png"]
    assert found["gone.png"] == "picture cannot be read: No such file or directory"


def test_a_parquet_file_that_breaks_keeps_the_reason_in_its_rows(tmp_path):
    noise = np.random.default_rng(0).bytes(5000)
    file = parquet_of(tmp_path / "a.parquet", {"image": [png(1), noise], "prompt": ["one", "two"]}, row_group_size=1)
    index = read_index(str(file))
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(file.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    file.write_bytes(data)
    found = pixels_of(index)
    assert found["a.parquet:0"] == 1
    assert found["a.parquet:1"].startswith("picture cannot be read: ")


def damaged_tar(path: Path, how: str) -> None:
    whole = tar_of(path, {f"{i}.{end}": data for i in range(3) for end, data in (("png", png(i)), ("txt", b"x"))})
    data = bytearray(whole.read_bytes())
    match how:
        case "cut":
            data = data[:1100]
        case "header":
            data[2048:2100] = b"\xff" * 52
        case "noise":
            data = bytearray(b"no tar at all " * 100)
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "header", "noise"])
def test_a_damaged_tar_is_named(tmp_path, how):
    damaged_tar(tmp_path / "a.tar", how)
    with pytest.raises(EpdRayError, match=r"a\.tar"):
        read_index(str(tmp_path))


def test_what_cannot_be_a_source_is_named(tmp_path):
    folder_of(tmp_path / "bare", ["a.png", "b.png"], prompts=False)
    folder_of(tmp_path / "both", ["a.png"])
    tar_of(tmp_path / "both/a.tar", {})
    tar_of(tmp_path / "no.tar", {"a.txt": b"no picture"})
    tar_of(tmp_path / "bare.tar", {"a.png": png(0)})
    tar_of(tmp_path / "twice.tar", {"a.png": png(0), "a.txt": b"x", "a.jpg": png(0)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").touch()
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    parquet_of(tmp_path / "other.parquet", {"photo": [png(0)], "prompt": ["x"]})
    parquet_of(tmp_path / "words.parquet", {"image": ["a.png"], "prompt": ["x"]})
    parquet_of(tmp_path / "alone.parquet", {"image": [png(0)]})
    parquet_of(tmp_path / "many.parquet", {"image": [png(0)], "a": ["x"], "b": ["y"]})
    parquet_of(tmp_path / "ids.parquet", {"image": [png(0)] * 3, "prompt": ["x"] * 3, "id": ["p", "q", "q"]})
    expected = {
        "nowhere": "nowhere: no such file or folder",
        "none*.tar": r"none\*.tar: no such file or folder",
        "empty": "empty holds nothing to score, expected .png",
        "notes.md": "expected a folder of images, .tar or .parquet, not .md",
        "both": r"holds tars and images: choose by a pattern, such as '.*/both/\*.tar'",
        "bare": "has 2 pictures and no prompt: give --prompts FILE, or put x.txt beside x.png",
        "no.tar": "holds no pictures",
        "bare.tar": "has 1 pictures and no prompt: put key.txt beside key.png",
        "twice.tar": "has the id 'twice.tar/a' 2 times",
        "torn.parquet": "torn.parquet cannot be read as Parquet: ",
        "other.parquet": "has the columns photo, prompt, expected 'image' and a prompt",
        "words.parquet": "column 'image' is string, expected bytes",
        "alone.parquet": "has no column of prompts",
        "many.parquet": "has the columns a, b, expected one of prompt",
        "ids.parquet": "has the id 'q' 2 times",
    }
    for name, said in expected.items():
        with pytest.raises(EpdRayError, match=said) as caught:
            read_index(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_what_cannot_be_prompts_is_named(tmp_path):
    folder = folder_of(tmp_path / "images", ["a.png", "b.png"], prompts=False)
    tar_of(tmp_path / "a.tar", {"a.png": png(0), "a.txt": b"x"})
    for name, content, said in [
        ("lines.txt", "one\n", "has 1 prompts for 2 pictures"),
        ("other.csv", "name,prompt\na.png,x\n", "has the columns name, prompt, expected the file's name in one of"),
        ("twice.csv", "file,prompt\na.png,x\na.png,y\n", "names 'a.png' twice"),
        ("none.csv", "file,prompt\nc.png,x\n", "names none of the pictures, such as 'a.png'"),
        ("empty.csv", "", "is empty"),
        ("torn.parquet", "PAR1", "not Parquet"),
        ("torn.jsonl", "{", "line 1: not JSON"),
        ("prompts.xlsx", "", "expected .txt, .csv, .tsv, .parquet, .jsonl, .json"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(EpdRayError, match=said) as caught:
            read_index(str(folder), tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(EpdRayError, match=r"gone\.csv"):
        read_index(str(folder), tmp_path / "gone.csv")
    with pytest.raises(EpdRayError, match="--prompts"):
        read_index(str(tmp_path / "a.tar"), tmp_path / "lines.txt")


# -- tables of names --------------------------------------------------------------------------------------------------


def table_prompts(root: Path, text: str, suffix: str = ".csv") -> dict[str, str]:
    table = root.parent / f"table{suffix}"
    table.write_text(text)
    return prompts_of(read_index(str(root), table))


def test_names_agree_over_unicode_slashes_and_headers(tmp_path):
    nfd, nfc = (unicodedata.normalize(form, "café.png") for form in ("NFD", "NFC"))
    root = folder_of(tmp_path / "images", [nfd, "sub/a b.png", "A%20#:.PNG"], prompts=False)
    expected = {nfd: "1", "sub/a b.png": "2", "A%20#:.PNG": "3"}
    rows = f"{nfc},1\nsub\\a b.png,2\n./A%20#:.PNG,3\n"
    assert table_prompts(root, f"file_name,prompt\n{rows}") == expected
    assert table_prompts(root, f"\ufeffFile_Name, Prompt \r\n{rows}") == expected
    assert table_prompts(root, f"file_name\tprompt\n{rows.replace(',', chr(9))}\n\n", ".tsv") == expected
    records = [{"file_name": name, "prompt": text} for name, text in expected.items()]
    assert table_prompts(root, json.dumps(records), ".json") == expected


def test_a_folder_that_all_names_share_may_be_left_out(tmp_path, caplog):
    root = folder_of(tmp_path / "images", ["a.png", "sub/b.png"], prompts=False)
    for start in ("images/", "images\\", "/data/images/", "C:\\data\\images\\", "other/"):
        caplog.clear()
        found = table_prompts(root, f"file_name,prompt\n{start}a.png,1\n{start}sub/b.png,2\n")
        assert found == {"a.png": "1", "sub/b.png": "2"}
        assert start.replace("\\", "/") in caplog.text
    for text in ("x/a.png,1\ny/sub/b.png,2\n", "images/c.png,1\n"):
        with pytest.raises(EpdRayError, match="names none of the pictures"):
            table_prompts(root, f"file_name,prompt\n{text}")


def test_a_name_that_stands_for_two_is_refused_by_both(tmp_path):
    nfd, nfc = (unicodedata.normalize(form, "é.png") for form in ("NFD", "NFC"))
    root = folder_of(tmp_path / "images", ["a.png", "A.PNG", "x/x/b.png", "x/b.png", "b.png"], prompts=False)
    header = "file_name,prompt\n"
    assert table_prompts(root, f"{header}a.png,1\nA.PNG,2\n")["A.PNG"] == "2"  # case does matter
    for text, said in [
        ("file_name,prompt\nx/b.png,1\nx\\b.png,2\n", r"'x/b.png' and 'x\\\\b.png' twice"),
        ("file_name,File_Name,prompt\na.png,a.png,1\n", "'file_name' and 'File_Name'"),
        ("file_name,prompt,Prompt\na.png,1,2\n", "'prompt' and 'Prompt'"),
        ("file_name,prompt\n,1\n", "line 2: the prompt '1' has no file name"),
        ("file_name,prompt\ny/x/x/b.png,1\n", "without 'y' and 'y/x'"),
    ]:
        with pytest.raises(EpdRayError, match=said):
            table_prompts(root, text)
    (root / nfd).write_bytes(png(1))
    (root / nfc).write_bytes(png(2))
    with pytest.raises(EpdRayError, match="have names that agree: rename one"):
        table_prompts(root, f"{header}{nfd},1\n")


def test_texts_beside_pictures(tmp_path):
    folder_of(tmp_path, ["a.png", "b.c.png", "C.PNG", "d.png", "d.jpg"], prompts=False)
    (tmp_path / "a.txt").write_text("é", encoding="utf-16")
    (tmp_path / "b.c.txt").write_text("\ufeffb\n")
    (tmp_path / "C.TXT").write_text("c\r\n")
    (tmp_path / "d.txt").write_text("d")
    found = prompts_of(read_index(str(tmp_path)))
    assert found == {"C.PNG": "c", "a.png": "é", "b.c.png": "b", "d.jpg": "d", "d.png": "d"}
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(EpdRayError, match=r"a\.txt: not UTF-8 at byte 3 "):
        read_index(str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.TXT").write_text("b")
    with pytest.raises(EpdRayError, match=r"a\.txt and .*a\.TXT are both beside"):
        read_index(str(tmp_path))


# -- what is left out -------------------------------------------------------------------------------------------------


def test_hidden_pictures_match_no_prompt(tmp_path, caplog):
    folder_of(tmp_path / "images", ["a.png", "b.png", "._a.png", "__MACOSX/._b.png"], prompts=False)
    (tmp_path / "images/._a.txt").write_bytes(b"\0\5\x16\7\xff")
    lines = tmp_path / "lines.txt"
    lines.write_text("one\ntwo\n")
    for source in (tmp_path / "images", tmp_path / "images/*.png"):
        caplog.clear()
        assert prompts_of(read_index(str(source), lines)) == {"a.png": "one", "b.png": "two"}
        assert len(caplog.messages) == 1 and "._a.png" in caplog.text


def test_scores_within_the_source_are_not_read(tmp_path, caplog):
    folder_of(tmp_path, ["a.png"])
    (tmp_path / "scores").mkdir()
    scores = pa.table({"id": ["a.png"]}, schema=pa.schema([("id", pa.string())], metadata={"heads": "{}"}))
    pq.write_table(scores, tmp_path / "scores/part-000001.parquet")
    assert list(prompts_of(read_index(str(tmp_path)))) == ["a.png"]
    assert "scores/part-000001.parquet" in caplog.text
    parquet_of(tmp_path / "data/part-000001.parquet", {"image": [png(1)], "prompt": ["x"]})
    assert len(read_index(str(tmp_path / "data"))) == 1


def test_a_table_of_prompts_may_lie_beside_the_pictures(tmp_path):
    folder_of(tmp_path, ["a.png"], prompts=False)
    table = parquet_of(tmp_path / "metadata.parquet", {"file_name": ["a.png"], "text": ["one"]})
    assert prompts_of(read_index(str(tmp_path), table)) == {"a.png": "one"}


def test_members_of_tars_that_are_left_out_are_named(tmp_path, caplog):
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "a.png"
    path = tar_of(tmp_path / "a.tar", {
        "__MACOSX/a.png": b"x", "._a.txt": b"\xff", "._a.png": b"x", "a.png": png(1), "a.txt": b"one",
        "../up.png": png(2), "../up.txt": b"two", "/top.png": png(3), "/top.txt": b"three",
        "a.heic": b"x", "inner.tar": b"x", "\udcff.png": png(9),
        "folder.png/b.png": png(4), "folder.png/b.json": b'{"Caption": ["four"]}',
    })  # fmt: skip
    with tarfile.open(path, "a") as tar:
        tar.addfile(link)
    assert prompts_of(read_index(str(path))) == {
        "a.tar/a": "one", "a.tar/../up": "two", "a.tar//top": "three", "a.tar/folder.png/b": "four",
    }  # fmt: skip
    (line,) = caplog.messages
    assert "6 left out" in line and "__MACOSX/a.png" in line


def test_samples_of_tars_with_several_dots(tmp_path, caplog):
    path = tar_of(tmp_path / "a.tar", {
        "1.5_steps.png": png(1), "1.5_steps.txt": b"own", "2.jpg": png(2), "2.mask.png": png(3), "2.txt": b"two",
        "3.image.png": png(4), "3.json": b'{"prompt": "three"}', "4.png": png(5), "4.json": b'{"prompt": "json"}',
        "4.txt": b"text",
    })  # fmt: skip
    assert prompts_of(read_index(str(path))) == {
        "a.tar/1.5_steps": "own", "a.tar/2": "two", "a.tar/3.image": "three", "a.tar/4": "text",
    }  # fmt: skip
    assert "1 left out" in caplog.text and "2.mask.png" in caplog.text


def test_texts_of_tars_are_checked(tmp_path):
    for members, said in [
        ([("a.png", png(1)), ("a.txt", b"caf\xe9")], r"a\.tar, a\.txt: not UTF-8 at byte 3 "),
        ([("a.png", png(1)), ("a.txt", b"x"), ("a.txt", b"y")], r"a\.tar has 'a\.txt' twice"),
    ]:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        with pytest.raises(EpdRayError, match=said):
            read_index(str(tmp_path / "a.tar"))


def test_columns_of_parquet_sources(tmp_path):
    far = pa.array([2**62], pa.timestamp("us"))
    file = parquet_of(tmp_path / "a.parquet", {"Image": [png(1)], "Prompt": ["2024-05-01"], "day": far})
    assert pixels_of(read_index(str(file))) == {"a.parquet:0": 1}
    assert prompts_of(read_index(str(file))) == {"a.parquet:0": "2024-05-01"}
    for columns, said in [
        ({"image": [png(1)], "prompt": far}, "'prompt' is timestamp"),
        ({"image": [png(1)], "prompt": ["x"], "id": far}, "'id' is timestamp"),
        ({"image": [png(1)], "Image": [png(1)], "prompt": ["x"]}, "'image' and 'Image'"),
        ({"image": [png(1)], "prompt": ["x"], "Prompt": ["y"]}, "'prompt' and 'Prompt'"),
    ]:
        with pytest.raises(EpdRayError, match=said):
            read_index(str(parquet_of(tmp_path / "b.parquet", columns)))


# -- columns for heads ------------------------------------------------------------------------------------------------

PANEL = Panel({"clip": 1.0, "ocr": 1.0}, {"ocr": ("level",)}, "judges")


def columns_of(index: pa.Table) -> dict[str, object]:
    return {row["id"]: row["error"] or json.loads(row["columns"]) for row in index.to_pylist()}


def test_every_source_keeps_the_columns_that_heads_read(tmp_path: Path) -> None:
    lacks = "no column 'level', which the reward head 'ocr' needs: fill it in, or name other heads in 'judges'"
    folder = folder_of(tmp_path / "images", ["a.png", "b.png", "c.png"], prompts=False)
    (tmp_path / "a.csv").write_text("file,prompt,level,judges,more\na.png,p,3,,x\nb.png,q,,clip,\nc.png,r,,ocr,\n")
    assert columns_of(read_index(str(folder), tmp_path / "a.csv", PANEL)) == {
        **{"a.png": {"level": "3"}, "b.png": {"judges": "clip"}, "c.png": lacks}
    }
    records = [{"prompt": "p", "level": 3}, {"caption": "q", "judges": ["clip"]}]
    members = {f"{i}.json": json.dumps(record).encode() for i, record in enumerate(records)}
    pictures = {f"{i}.png": png(10 * i) for i in range(3)}
    tar_of(tmp_path / "a.tar", {**pictures, **members, "0.txt": b"of the text", "2.txt": b"r"})
    found = read_index(str(tmp_path / "a.tar"), panel=PANEL)
    assert columns_of(found) == {"a.tar/0": {"level": 3}, "a.tar/1": {"judges": ["clip"]}, "a.tar/2": lacks}
    assert prompts_of(found)["a.tar/0"] == "of the text"
    cells = {"level": [3, None, None], "judges": [None, "clip", "ocr"], "image": [png(1)] * 3}
    parquet_of(tmp_path / "a.parquet", {"prompt": ["p", "q", "r"], **cells})
    found = columns_of(read_index(str(tmp_path / "a.parquet"), panel=PANEL))
    assert found == {"a.parquet:0": {"level": 3}, "a.parquet:1": {"judges": "clip"}, "a.parquet:2": lacks}
    assert "columns" not in read_index(str(tmp_path / "a.parquet")).column_names
    with pytest.raises(PromptError, match=r"a.tar has no column 'who', which prompts.heads names"):
        read_index(str(tmp_path / "a.tar"), panel=Panel({"clip": 1.0}, column="who"))
