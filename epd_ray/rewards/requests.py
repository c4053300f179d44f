"""Reads the requests that HttpHead sends: JSON with pictures in base64, from senders who may be anybody."""

import base64
import io
import json
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from epd_ray.rewards.batches import too_long
from epd_ray.types import FloatArray, Metadata

TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)  # a text of JSON, or one that does not end
FORMATS = ("png", "npy")
BIT_DEPTH = 24  # the byte of a PNG file with the bits of a channel


@dataclass(frozen=True)
class Limits:
    """The largest request that the server accepts.

    Attributes:
        body_bytes: the bytes of the JSON.
        images: the number of images.
        side: the pixels of the longer side of an image.
        pixels: the pixels of all images together; 2**25 are 32 images of 1024 x 1024, or 384 MiB as float32.
        prompt_chars: the characters of one prompt.
        row_chars: the characters of the JSON of one row.
        frame_bytes: the bytes of the JSON outside of its texts: brackets, commas, colons, numbers and spaces.
    """

    body_bytes: int = 64 << 20
    images: int = 64
    side: int = 2048
    pixels: int = 1 << 25
    prompt_chars: int = 10_000
    row_chars: int = 100_000
    frame_bytes: int = 1 << 14


class BadRequestError(Exception):
    """A request that the sender has to correct; the message is one line."""


@dataclass(frozen=True)
class ScoreRequest:
    """Images, [B, 3, H, W], float32 in [0, 1], one prompt per image, and one row of columns per image, or none."""

    images: Tensor
    prompts: list[str]
    rows: list[Metadata] | None = None


def read_request(body: bytes, limits: Limits) -> ScoreRequest:
    """Check and decode a request. It reads no pickle, and decompresses no image before it has checked the size.

    Args:
        body: the bytes of the request.
        limits: the largest request.

    Raises:
        BadRequestError: the request is not valid; the message names the first problem.
    """
    asked = _parsed(body, limits)
    if not isinstance(asked, dict) or set(asked) - {"rows"} != {"images", "format", "prompts"}:
        raise BadRequestError("expected an object with exactly images, format and prompts, and maybe rows")
    files, form, prompts = asked["images"], asked["format"], asked["prompts"]
    if form not in FORMATS:
        raise BadRequestError("format is neither png nor npy")
    if not isinstance(files, list) or not 1 <= len(files) <= limits.images:
        raise BadRequestError(f"images is not a list of 1 to {limits.images}")
    _check_prompts(prompts, len(files), limits.prompt_chars)
    rows = _rows(asked["rows"], len(files), limits.row_chars) if "rows" in asked else None
    read = _read_png if form == "png" else _read_npy
    images: list[FloatArray] = []
    for i, file in enumerate(files):
        try:
            images.append(read(_decode(file), limits.side))
        except BadRequestError as error:
            raise BadRequestError(f"images[{i}]: {error}") from None
        if images[i].shape != images[0].shape:
            raise BadRequestError(f"images[{i}] has shape {images[i].shape}, images[0] {images[0].shape}")
        if sum(image[0].size for image in images) > limits.pixels:
            raise BadRequestError(f"the images have more than {limits.pixels} pixels together")
    return ScoreRequest(torch.from_numpy(np.stack(images)), prompts, rows)


def _parsed(body: bytes, limits: Limits) -> object:
    """The JSON of a request.

    Every value and every bracket takes a byte outside of texts, or a text. Counting both first bounds what is built:
    60 MB of "[]," would be 20 million lists.
    """
    if len(body) > limits.body_bytes:
        raise BadRequestError(f"the body has {len(body)} bytes, at most {limits.body_bytes} are allowed")
    frame, texts = len(body), 0
    for match in TEXT.finditer(body):
        frame, texts = frame - (match.end() - match.start()), texts + 1
        if texts > limits.frame_bytes:
            break
    if max(frame, texts) > limits.frame_bytes:
        raise BadRequestError(f"the JSON has more than {limits.frame_bytes} texts, or bytes outside of its texts")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequestError("the body is not JSON") from None


def _check_prompts(prompts: object, count: int, longest: int) -> None:
    if not isinstance(prompts, list) or len(prompts) != count:
        raise BadRequestError(f"prompts is not a list of {count}, as many as images")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or len(prompt) > longest:
            raise BadRequestError(f"prompts[{i}] is not a text of at most {longest} characters")
        try:
            prompt.encode()
        except UnicodeEncodeError:  # JSON can spell half a character, with which no tokenizer can do anything
            raise BadRequestError(f"prompts[{i}] is not valid Unicode") from None


def _rows(rows: object, count: int, longest: int) -> list[Metadata]:
    if not isinstance(rows, list) or len(rows) != count:
        raise BadRequestError(f"rows is not a list of {count}, as many as images")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BadRequestError(f"rows[{i}] is not an object of columns")
        try:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False)
            text.encode()
        except (ValueError, RecursionError):  # also half a character, and numbers that JSON has not
            raise BadRequestError(f"rows[{i}] holds a number that is not finite, or text that is no Unicode") from None
        if len(text) > longest:
            raise BadRequestError(f"rows[{i}] has more than {longest} characters")
    return rows


def _decode(file: object) -> bytes:
    if not isinstance(file, str):
        raise BadRequestError(f"is a {type(file).__name__}, expected a text in base64")
    try:
        return base64.b64decode(file, validate=True)
    except ValueError as error:
        raise BadRequestError(str(error)) from None


def _read_png(file: bytes, side: int) -> FloatArray:
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as picture:  # this reads only the header
            _check_size(picture.height, picture.width, side)
            if picture.mode != "RGB" or file[BIT_DEPTH] != 8:  # Pillow would round 16 bits without a word
                raise BadRequestError(f"PNG of mode {picture.mode} with {file[BIT_DEPTH]} bits, expected RGB with 8")
            pixels = np.array(picture)
    except BadRequestError:
        raise
    except Exception as error:  # decoders raise any kind of exception
        raise BadRequestError(f"PNG that cannot be read ({type(error).__name__})") from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32) / np.float32(255)


def _read_npy(file: bytes, side: int) -> FloatArray:
    stream = io.BytesIO(file)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise BadRequestError("NPY of a version other than 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except BadRequestError:
        raise
    except Exception:  # the header is a Python literal, about which Python may raise nearly anything
        raise BadRequestError("NPY header that cannot be read") from None
    if dtype != np.float32 or fortran or len(shape) != 3 or shape[0] != 3:
        raise BadRequestError("NPY that is not float32 [3, H, W] in C order")
    _check_size(shape[1], shape[2], side)
    data = stream.read()
    if len(data) != 4 * math.prod(shape):
        raise BadRequestError(f"NPY with {len(data)} bytes for shape {shape}")
    image = np.frombuffer(data, np.float32).reshape(shape)  # [3, H, W]
    if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        raise BadRequestError("NPY with values outside [0, 1]")
    return image


def _check_size(height: int, width: int, side: int) -> None:
    if not (1 <= height <= side and 1 <= width <= side):
        raise BadRequestError(f"{height} x {width} pixels, expected sides of 1 to {side}")
    if problem := too_long(height, width):
        raise BadRequestError(problem)
