import base64
import io
import json
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from epd_ray.rewards.requests import BadRequestError, Limits, read_request

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 4), np.uint8)
PROMPTS = ["a", "b", "c"]


def base(content: bytes) -> str:
    return base64.b64encode(content).decode()


def png(image: np.ndarray, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    (picture.convert(mode) if mode else picture).save(file, "PNG")
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def body(**changes: Any) -> bytes:
    files = [base(png(image)) for image in PIXELS]
    return json.dumps({"images": files, "format": "png", "prompts": PROMPTS, **changes}).encode()


def bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels."""
    return raw_png(side, 8, bytes(1000))


def deep_png() -> bytes:
    """A PNG of 4 x 4 pixels with 16 bits a channel."""
    return raw_png(4, 16, bytes(4 * (1 + 4 * 6)))


def raw_png(side: int, bits: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, bits, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("form", ["png", "npy"])
def test_what_is_sent_is_read(form: str) -> None:
    files = PIXELS.astype(np.float32) / 255
    encoded = [base(png(i)) for i in PIXELS] if form == "png" else [base(npy(i)) for i in files]
    read = read_request(body(images=encoded, format=form), Limits())
    assert torch.equal(read.images, torch.from_numpy(PIXELS).float() / 255) and read.prompts == PROMPTS


LIMITS = Limits(images=4, side=16, pixels=512, prompt_chars=100, body_bytes=100_000, frame_bytes=1000)
FLOATS = PIXELS.astype(np.float32) / 255
WRONG = [
    (b"\xff", "the body is not JSON"),
    (b"[" * 900, "the body is not JSON"),
    (b"[" * 100_000, "more than 1000 texts, or bytes outside"),
    (b'[""' + b',""' * 1000 + b"]", "more than 1000 texts, or bytes outside"),
    (b'""' * 1001, "more than 1000 texts, or bytes outside"),
    (b'["' + b"[" * 5000, "the body is not JSON"),
    (b" " * 100_001, "the body has 100001 bytes, at most 100000"),
    (b"[]", "expected an object with exactly images, format and prompts"),
    (b'{"images": []}', "expected an object with exactly"),
    (body(more=1), "expected an object with exactly"),
    (body(format="jpeg"), "format is neither png nor npy"),
    (body(format=["png"]), "format is neither png nor npy"),
    (body(images="abc"), "images is not a list of 1 to 4"),
    (body(images=[], prompts=[]), "images is not a list of 1 to 4"),
    (body(images=["x"] * 5, prompts=["x"] * 5), "images is not a list of 1 to 4"),
    (body(prompts=["a", "b"]), "prompts is not a list of 3"),
    (body(prompts="abc"), "prompts is not a list of 3"),
    (body(prompts=["a", "b", 3]), r"prompts\[2\] is not a text"),
    (body(prompts=["a", "b" * 101, "c"]), r"prompts\[1\] is not a text of at most 100"),
    (body(prompts=["a", "b", "\ud83e"]), r"prompts\[2\] is not valid Unicode"),
    (body(images=[base(png(PIXELS[0])), 5, "x"]), r"images\[1\]: "),
    (body(images=[base(png(PIXELS[0])), "ä!", "x"]), r"images\[1\]: "),
    (body(images=[base(b"nothing")] * 3), r"images\[0\]: PNG that cannot be read"),
    (body(images=[base(png(PIXELS[0])[:-30])] * 3), r"images\[0\]: PNG that cannot be read"),
    (body(images=[base(png(PIXELS[0], "L"))] * 3), r"images\[0\]: PNG of mode L with 8 bits, expected RGB"),
    (body(images=[base(deep_png())] * 3), r"images\[0\]: PNG of mode RGB with 16 bits"),
    (body(images=[base(bomb(17))] * 3), r"images\[0\]: 17 x 17 pixels, expected sides of 1 to 16"),
    (body(images=[base(bomb(60_000))] * 3), r"images\[0\]: PNG that cannot be read \(DecompressionBombError\)"),
    (body(images=[base(png(PIXELS[0])), base(png(PIXELS[0, :, :5])), "x"]), r"images\[1\] has shape"),
    (body(images=[base(png(np.zeros((3, 16, 16), np.uint8)))] * 3), "more than 512 pixels together"),
    (body(images=[base(png(np.zeros((3, 1, 17), np.uint8)))] * 3), "1 x 17 pixels, expected sides of 1 to 16"),
    (body(format="npy"), r"images\[0\]: NPY header that cannot be read"),
    (body(format="npy", images=[base(npy(FLOATS[0]).replace(b"}", b" "))] * 3), "NPY header that cannot be read"),
    (body(format="npy", images=[base(npy(FLOATS[0]).replace(b"'descr", b"09,descr"))] * 3), "NPY header that cannot"),
    (body(format="npy", images=[base(npy(np.array([{}], object)))] * 3), r"images\[0\]: NPY that is not float32"),
    (body(format="npy", images=[base(npy(FLOATS[0].astype(np.float64)))] * 3), r"images\[0\]: NPY that is not float32"),
    (body(format="npy", images=[base(npy(FLOATS[0, 0]))] * 3), r"images\[0\]: NPY that is not float32 \[3, H, W\]"),
    (body(format="npy", images=[base(npy_header((3, 10**9, 10**9)))] * 3), "expected sides of 1 to 16"),
    (body(format="npy", images=[base(npy_header((3, 8, -4)))] * 3), "expected sides of 1 to 16"),
    (body(format="npy", images=[base(npy_header((3, 8, 4)))] * 3), "NPY with 0 bytes for shape"),
    (body(format="npy", images=[base(npy(FLOATS[0] * 2))] * 3), r"values outside \[0, 1\]"),
    (body(format="npy", images=[base(npy(FLOATS[0] * np.float32("nan")))] * 3), r"values outside \[0, 1\]"),
]


@pytest.mark.parametrize(("content", "problem"), WRONG)
def test_wrong_requests_are_named(content: bytes, problem: str) -> None:
    with pytest.raises(BadRequestError, match=problem) as caught:
        read_request(content, LIMITS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_pictures_that_are_too_long_are_refused() -> None:
    long = png(np.zeros((3, 1, 2048), np.uint8))
    with pytest.raises(BadRequestError, match=r"images\[0\]: .*1 x 2048 pixels .* 16 times"):
        read_request(body(images=[base(long)], prompts=["a"]), Limits())
    longest = png(np.zeros((3, 2, 32), np.uint8))
    assert read_request(body(images=[base(longest)], prompts=["a"]), Limits()).images.shape == (1, 3, 2, 32)


HOSTILE = {
    "lists": b"[" + b"[]," * (20 << 20) + b"[]]",
    "empty texts": b"[" + b'"",' * (20 << 20) + b'""]',
    "lists of images": b'{"format": "png", "prompts": [], "images": [' + b"[]," * (20 << 20) + b"[]]}",
    "a text without an end": b'"' + b'\\"' * (30 << 20),
    "quotation marks": b'"' * (60 << 20),
    "depth": b"[" * (60 << 20),
    "a number": b"1" * (60 << 20),
    "one text": b'"' + b"x" * (60 << 20) + b'"',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_sixty_megabytes_of_nothing_are_refused_at_once(kind: str) -> None:
    start = time.process_time()
    with pytest.raises(BadRequestError):
        read_request(HOSTILE[kind], Limits())
    assert time.process_time() - start < 2.0


def test_the_largest_request_is_read_however_it_is_written() -> None:
    limits = Limits()
    file, count = base(png(np.zeros((3, 8, 8), np.uint8))), limits.images
    asked = {"images": [file] * count, "format": "png", "prompts": ['"\\' * (limits.prompt_chars // 2)] * count}
    for written in (json.dumps(asked), json.dumps(asked, indent=8), json.dumps(asked, separators=(",", ":"))):
        read = read_request(written.encode(), limits)
        assert read.images.shape == (64, 3, 8, 8) and read.prompts == asked["prompts"]


@given(st.binary(max_size=300) | st.binary(max_size=200).map(lambda data: body(images=[base(data)], prompts=["a"])))
def test_any_bytes_are_a_request_or_a_bad_one(data: bytes) -> None:
    try:
        assert isinstance(read_request(data, LIMITS).prompts, list)
    except BadRequestError as error:
        assert "\n" not in str(error)
