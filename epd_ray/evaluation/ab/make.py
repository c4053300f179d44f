"""Making a page for a side-by-side test of two folders of pictures with the same file names."""

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from epd_ray.errors import PromptError, SideBySideError, importing, shown
from epd_ray.evaluation.ab.records import KEY, PAGE, RESULTS, Key, Pair
from epd_ray.evaluation.metrics.pictures import picture_files, read_picture
from epd_ray.prompts.text import decode_text
from epd_ray.randomness import Purpose, stream
from epd_ray.report.page import page_template
from epd_ray.score.inputs import folder_prompts
from epd_ray.storage.run_directory import write_text

PROMPTS = "prompts.json"
LOSSLESS_SIDE = 256  # pixels; both pictures of a larger pair are stored as WebP of quality 95
SMALL_SIDE = 160  # pixels; pictures up to this size are enlarged with sharp pixels rather than blurred


def make_page(left: Path, right: Path, out: Path, prompts: Path | None, count: int | None, seed: int) -> list[str]:
    """Write index.html, which has all pictures but no names, and key.json, which says which picture is on which side.

    Args:
        left: the folder of one solver's pictures, such as RUN/images/samples/rdpo.
        right: the folder of another solver's pictures, with the same file names.
        out: the new folder of the page.
        prompts: a file as for `epd-ray score --prompts`, or a .json list in the order of the names. None takes
            prompts.json beside the two folders, or else x.txt beside each x.png, or else no prompts.
        count: the number of pairs, from the first name; None takes all.
        seed: the seed of the sides and the order.

    Returns:
        Lines for the terminal.

    Raises:
        SideBySideError: the folders have different names or sizes of pictures, or `out` holds another page.
        MetricError: a picture is damaged, or a folder has none.
        PromptError: the prompts cannot be used.
        RunDirectoryError: the disk refuses.
    """
    if (out / KEY).exists() or (out / RESULTS).exists():
        raise SideBySideError(f"{out} holds a page already: name a new folder, or its votes would lose their key")
    names = _paired(left, right)
    texts = _prompts(left, right, names, prompts)
    names = names[:count]
    rng = stream(Purpose.BLIND_PAGE, seed)
    swapped = rng.permutation(np.arange(len(names)) % 2 == 1)  # so that each solver is on each side equally often
    shown, pairs = [], []
    for number, index in enumerate(rng.permutation(len(names)), start=1):
        name, swap = names[index], bool(swapped[index])
        pictures = _pair(left / name, right / name)
        pairs.append(Pair(id=str(number), picture=name, prompt=texts[index], swapped=swap))
        sides = dict(zip(("left", "right"), pictures[::-1] if swap else pictures, strict=True))
        shown.append({"id": str(number), "prompt": texts[index], **sides})
    page = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
    first, second = _labels(left, right)
    key = Key(page=page, left=first, right=second, seed=seed, pairs=tuple(pairs))
    out.mkdir(parents=True, exist_ok=True)
    html = page_template("ab.html.j2").render(data={"page": page, "pairs": shown}, small=SMALL_SIDE)
    write_text(out / KEY, key.model_dump_json(indent=2))
    write_text(out / PAGE, html)
    return [
        f"{len(pairs)} pairs, {len(html) / 2**20:.1f} MiB: open {out / PAGE}, or run: epd-ray ab serve {out}",
        f"then: epd-ray ab results {out}    (give raters only {PAGE}: {KEY} says which solver is on which side)",
    ]


def _paired(left: Path, right: Path) -> list[str]:
    """List the file names that both folders have.

    Raises:
        SideBySideError: one folder has names that the other lacks, or both are the same folder.
    """
    if left.resolve() == right.resolve():
        raise SideBySideError(f"{left} is given for both sides: name two folders")
    names, others = ([f.relative_to(root).as_posix() for f in picture_files(root)] for root in (left, right))
    for has, lacks, missing in ((left, right, set(names) - set(others)), (right, left, set(others) - set(names))):
        if missing:
            raise SideBySideError(
                f"{has} has {len(missing)} pictures that {lacks} lacks, such as {shown(min(missing))}: "
                "give two folders with the same names, drawn from the same prompts and seeds"
            )
    return names


def _prompts(left: Path, right: Path, names: Sequence[str], file: Path | None) -> list[str]:
    """Find the prompt of each picture; "" for a picture without one."""
    beside = [folder.parent / PROMPTS for folder in (left.resolve(), right.resolve())]
    if file is not None and file.suffix.lower() != ".json":
        files = [left / name for name in names]
        return [text or "" for text in folder_prompts(left, files, file)]
    if file is not None or all(path.is_file() for path in beside):
        lists = [_listed(path, names) for path in ([file] if file is not None else beside)]
        different = [n for n, texts in zip(names, zip(*lists, strict=True), strict=True) if len(set(texts)) > 1]
        if different:
            both = " and ".join(map(str, beside))
            raise SideBySideError(
                f"{both} have different prompts for {shown(different[0])}: compare pictures of one prompt"
            )
        return lists[0]
    return [text or "" for text in folder_prompts(left, [left / name for name in names], None)]


def _listed(path: Path, names: Sequence[str]) -> list[str]:
    """Read as many prompts as there are names from a JSON list, which evaluations write beside their pictures."""
    try:
        with importing(PromptError, path):
            found = json.loads(decode_text(path.read_bytes(), path))
    except (OSError, ValueError) as error:
        raise PromptError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise PromptError(f"{path} holds no list of prompts, expected one for each picture in the order of the names")
    if len(found) < len(names):
        raise PromptError(f"{path} has {len(found)} prompts for {len(names)} pictures: give one for each picture")
    return found[: len(names)]


def _pair(left: Path, right: Path) -> tuple[str, str]:
    """Read both pictures of a pair as data URIs.

    Raises:
        MetricError: a picture is damaged.
        SideBySideError: the pictures have different sizes, by which raters could tell the solvers apart.
    """
    pictures = [read_picture(path) for path in (left, right)]
    sizes = [f"{p.shape[2]} x {p.shape[1]}" for p in pictures]
    if sizes[0] != sizes[1]:
        raise SideBySideError(f"{left} has {sizes[0]} pixels and {right} {sizes[1]}: compare pictures of one size")
    first, second = (_data_uri(Image.fromarray(p.transpose(1, 2, 0))) for p in pictures)
    return first, second


def _data_uri(picture: Image.Image) -> str:
    """Encode only the pixels, because the file's metadata could name the solver."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=max(picture.size) <= LOSSLESS_SIDE, quality=95)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _labels(left: Path, right: Path) -> tuple[str, str]:
    """Names for the two folders: the last parts of their paths, as many as it takes to tell them apart."""
    a, b = left.resolve(), right.resolve()
    length = 1
    while a.parts[-length:] == b.parts[-length:]:
        length += 1
    return "/".join(a.parts[-length:]), "/".join(b.parts[-length:])
