"""Pictures that people bring: what is read, how it is decoded, and what is left out of a folder."""

import ast
import io
import os
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from epd_ray.errors import MetricError, PictureError, RunDirectoryError
from epd_ray.evaluation.metrics.pictures import picture_files, read_picture
from epd_ray.report.page import open_picture
from epd_ray.storage import pictures as module
from epd_ray.storage.pictures import FORMATS, IMAGE_SUFFIXES, decode_picture, files_below, is_hidden

ROOT = Path(__file__).parent.parent


def picture(size: tuple[int, int] = (24, 16)) -> Image.Image:
    """White, with a red corner at the top left and a blue one at the bottom left."""
    drawn = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(drawn)
    pen.rectangle((0, 0, 7, 7), fill="red")
    pen.rectangle((0, size[1] - 4, 3, size[1]), fill="blue")
    return drawn


def encoded(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def pixels(data: bytes | Path) -> np.ndarray:
    return np.asarray(decode_picture(data))


def test_every_picture_is_opened_with_named_formats() -> None:
    places = [path for room in ("epd_ray", "jobs", "tests") for path in (ROOT / room).rglob("*.py")]
    calls = [
        (path.name, node)
        for path in places
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-2:] == ["Image", "open"]
    ]
    assert len(calls) > 5
    assert [(name, node.lineno) for name, node in calls if "formats" not in [k.arg for k in node.keywords]] == []


@pytest.mark.parametrize("door", ["score", "reference", "report"])
def test_postscript_with_the_name_of_a_picture_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    def started(*args: object, **options: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    read = {"score": decode_picture, "reference": read_picture, "report": open_picture}[door]
    with pytest.raises((PictureError, MetricError, RunDirectoryError), match="no known image format"):
        read(path)


@pytest.mark.parametrize(("name", "suffixes"), FORMATS.items())
def test_every_format_is_read_whatever_the_case_of_its_ending(tmp_path: Path, name: str, suffixes: list[str]) -> None:
    for suffix in suffixes:
        for ending in (suffix, suffix.upper()):
            (tmp_path / f"x{ending}").write_bytes(encoded(picture(), name))
    files = picture_files(tmp_path)
    assert len(files) == 2 * len(suffixes)
    for file in files:
        assert read_picture(file).shape == (3, 16, 24)
        assert np.abs(read_picture(file).transpose(1, 2, 0)[2:6, 2:6].astype(int) - [255, 0, 0]).max() < 40


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_its_exif_says(name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    stored = picture()
    if orientation > 1:
        stored = stored.transpose(Image.Transpose[back[orientation]])
    options = {"lossless": True} if name == "WEBP" else {}
    found = pixels(encoded(stored, name, exif=exif, **options))
    assert found.shape == (16, 24, 3)
    assert np.abs(found.astype(int) - np.asarray(picture())).max() <= (120 if name == "JPEG" else 0)


def png_chunk(kind: bytes, data: bytes, sound: bool = True) -> bytes:
    crc = zlib.crc32(kind + data) ^ (not sound)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


DAMAGED_CHUNKS = {
    "texts with a wrong checksum": png_chunk(b"tEXt", b"a\0b", sound=False),
    "exif with a wrong checksum": png_chunk(b"eXIf", b"II*\0", sound=False),
    "exif that is none": png_chunk(b"eXIf", b"junk"),
    "a compressed text of 3 MB": png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 3_000_000)),
    "a colour profile of 3 MB": png_chunk(b"iCCP", b"a\0\0" + zlib.compress(b"x" * 3_000_000)),
    "an empty colour profile": png_chunk(b"iCCP", b""),
    "an empty gamma": png_chunk(b"gAMA", b""),
    "XMP that is none": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x \xa8\xff/>"),
}


@pytest.mark.parametrize("chunk", DAMAGED_CHUNKS.values(), ids=DAMAGED_CHUNKS)
def test_damaged_metadata_of_a_png_does_not_cost_it(chunk: bytes) -> None:
    data = encoded(picture())
    np.testing.assert_array_equal(pixels(data[:33] + chunk + data[33:]), np.asarray(picture()))


DAMAGED_SEGMENTS = {
    "exif that is none": (1, b"Exif\0\0junk"),
    "exif whose orientation is a text": (1, b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0ab\xff\xfe\0\0\0\0"),
    "XMP that is none": (1, b"http://ns.adobe.com/xap/1.0/\0<x \xa8\xff/>"),
    "a colour profile that is cut": (2, b"ICC_PROFILE\0"),
    "a table of pictures that is none": (2, b"MPF\0junk"),
    "a cut header": (0, b"JFIF"),
    "a cut Adobe segment": (14, b"Adobe"),
}


@pytest.mark.parametrize(("number", "content"), DAMAGED_SEGMENTS.values(), ids=DAMAGED_SEGMENTS)
def test_damaged_metadata_of_a_jpeg_does_not_cost_it(number: int, content: bytes) -> None:
    data = encoded(picture(), "JPEG")
    segment = bytes([0xFF, 0xE0 + number]) + (len(content) + 2).to_bytes(2, "big") + content
    np.testing.assert_array_equal(pixels(data[:2] + segment + data[2:]), pixels(data))


def test_an_orientation_survives_damage_beside_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = picture().transpose(Image.Transpose.ROTATE_90)
    png = encoded(turned, exif=exif)
    damaged = png[:33] + png_chunk(b"tEXt", b"a\0b", sound=False) + png[33:]
    np.testing.assert_array_equal(pixels(damaged), np.asarray(picture()))
    jpeg = encoded(turned, "JPEG", exif=exif)
    cut_profile = b"\xff\xe2\x00\x0eICC_PROFILE\0"
    assert pixels(jpeg[:2] + cut_profile + jpeg[2:]).shape == (16, 24, 3)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_a_cut_picture_is_refused(name: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, name)
    with pytest.raises(PictureError):
        decode_picture(data[: len(data) // 2])


def test_modes_become_rgb() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    three = np.stack([grey, grey[::-1], grey.T], axis=-1)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey))), np.stack([grey] * 3, -1))
    bits = Image.fromarray((grey > 99).astype(np.uint8) * 255).convert("1")
    np.testing.assert_array_equal(pixels(encoded(bits))[..., 0], np.where(grey > 99, 255, 0))
    with_alpha = Image.fromarray(np.dstack([three, grey]))
    np.testing.assert_array_equal(pixels(encoded(with_alpha)), three)  # the colours beneath the transparency
    grey_alpha = Image.fromarray(np.dstack([grey, grey.T]))
    assert grey_alpha.mode == "LA"
    np.testing.assert_array_equal(pixels(encoded(grey_alpha)), np.stack([grey] * 3, -1))
    palette = picture().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    np.testing.assert_array_equal(pixels(encoded(palette, transparency=0)), np.asarray(palette.convert("RGB")))
    cmyk = picture().convert("CMYK")
    assert np.abs(pixels(encoded(cmyk, "JPEG", quality=100)).astype(int) - np.asarray(picture())).mean() < 2
    plain, progressive = (encoded(picture(), "JPEG", progressive=p) for p in (False, True))
    np.testing.assert_array_equal(pixels(progressive), pixels(plain))


def frames(name: str) -> bytes:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    return encoded(pages[0], name, save_all=True, append_images=pages[1:])


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4)])
def test_of_colours_with_16_bits_the_upper_8_count(kind: int, channels: int) -> None:
    values = np.array([[[0x0000, 0x00FF, 0x80FE, 0xFFFF], [0xFF00, 0x0100, 0x7F80, 0x0000]]], ">u2")[..., :channels]
    header = struct.pack(">IIBBBBB", 2, 1, 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + values.tobytes())), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    found = pixels(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    assert found.tolist() == [[[0x00, 0x00, 0x80], [0xFF, 0x01, 0x7F]]]


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_several_frames_none_is_chosen(name: str) -> None:
    with pytest.raises(PictureError, match="animated"):
        decode_picture(frames(name))


def test_what_is_no_picture_of_8_bits_is_named() -> None:
    for bad, said in [(b"", "empty"), (b"no", "PNG, JPEG"), (encoded(Image.new("I;16", (4, 4))), "mode I;16"),
                      (encoded(Image.new("F", (4, 4)), "TIFF"), "mode F")]:  # fmt: skip
        with pytest.raises(PictureError, match=said) as raised:
            decode_picture(bad)
        assert "\n" not in str(raised.value)


def header_of(width: int, height: int) -> bytes:
    """A PNG that says that it is so large, with no pixels to speak of."""
    start = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(("size", "said"), [((10_000, 9_000), "10000 x 9000"), ((60_000, 60_000), "3600000000")])
def test_size_is_bounded_before_decoding(size: tuple[int, int], said: str) -> None:
    with pytest.raises(PictureError, match=f"{said} pixels, at most 89,478,485"):
        decode_picture(header_of(*size))


def test_the_size_of_a_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encoded(picture()))
    monkeypatch.setattr(module, "MOST_BYTES", 100)
    for file in (path, path.read_bytes()):
        with pytest.raises(PictureError, match=rf"{path.stat().st_size} bytes, at most 100"):
            decode_picture(file)


# -- folders ----------------------------------------------------------------------------------------------------------


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture()))


def names_in(root: Path, found: list[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in found]


def test_hidden_pictures_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hidden = ["._a.png", ".b.jpg", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/._a.png", "sub/@eaDir/a.png"]
    put(tmp_path, "a.png", "sub/b.png", *hidden)
    (tmp_path / ".DS_Store").touch()
    assert names_in(tmp_path, picture_files(tmp_path)) == ["a.png", "sub/b.png"]
    assert files_below(tmp_path).left_out == sorted(hidden)
    (line,) = caplog.messages
    assert f"{len(hidden)} left out" in line and sorted(hidden)[0] in line and "and 2 more" in line


def test_a_folder_within_a_hidden_one_can_be_asked_for(tmp_path: Path) -> None:
    put(tmp_path / ".cache", "a.png")
    assert names_in(tmp_path, picture_files(tmp_path / ".cache")) == [".cache/a.png"]
    assert is_hidden(Path(".cache/a.png")) and not is_hidden(Path("../a.png"))


def test_strange_names_and_what_is_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strange = ["a b.png", "a#b.png", "a%20b.png", "a:b.png", "a.b.c.png", "A.PNG", "a.png", "in.png/a.png", "é.png"]
    put(tmp_path, *strange)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "photo.heic").touch()
    (tmp_path / "notes.md").touch()
    found = files_below(tmp_path)
    assert sorted(names_in(tmp_path, found.files)) == sorted(strange)
    assert found.left_out == ["broken.png", "loop.png", "photo.heic", "pipe.png"]


@pytest.mark.skipif(os.sys.platform == "darwin", reason="macOS has no such names")
def test_a_name_that_is_no_text_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    found = files_below(tmp_path)
    assert names_in(tmp_path, found.files) == ["a.png"] and found.left_out == ["\udcff.png"]


def test_what_is_left_out_is_one_bounded_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.png", f".a\nb{'x' * 200}.png")
    picture_files(tmp_path)
    (line,) = caplog.messages
    assert "1 left out" in line and "\n" not in line and len(line) < 400


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    put(root, "z/a.png")
    put(other, "b.png", "deep/c.png")
    (root / "linked").symlink_to(other)
    (root / "again").symlink_to(root / "z")
    (root / "loop").symlink_to(root)
    (other / "back").symlink_to(root)
    found = files_below(root)
    assert sorted(names_in(root, found.files)) == ["linked/b.png", "linked/deep/c.png", "z/a.png"]
    assert found.left_out == ["again/", "linked/back/", "loop/"]


def test_a_folder_without_a_readable_picture_is_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path, ".a.png")
    with pytest.raises(MetricError, match="holds no pictures"):
        picture_files(tmp_path)
    assert ".png" in IMAGE_SUFFIXES and ".heic" not in IMAGE_SUFFIXES
