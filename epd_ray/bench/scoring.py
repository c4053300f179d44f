"""The speed of scoring a file: the pipeline of `epd-ray score` with one actor against a bare loop in one process."""

import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from epd_ray.actors.cluster import ray_session
from epd_ray.actors.configured import reward_spec
from epd_ray.actors.reward_pool import RewardActor
from epd_ray.bench.models import scenes
from epd_ray.bench.record import Record
from epd_ray.bench.settings import DEFAULTS
from epd_ray.bench.timing import timed
from epd_ray.embedded.scenes import render
from epd_ray.randomness import Purpose, stream
from epd_ray.score.inputs import read_index
from epd_ray.score.pipeline import scored
from epd_ray.score.rows import decode, pieces, score_rows
from epd_ray.types import FloatArray, ImageArray

HEAD = reward_spec(DEFAULTS.rewards["clip"])
ROW_GROUP = 256


@dataclass(frozen=True)
class _Loop:
    """Pictures per second of the bare loop with decoding, and of the head alone."""

    with_decoding: float
    head_alone: float


def scoring(images: int = 4096, batch_size: int = 32, repeats: int = 3) -> Record:
    """Pictures per second of `epd-ray score` with one actor, and of a bare loop over the same head and file, in turns.

    Both decode the same PNGs of 64 pixels and use one torch thread. The pipeline decodes in another process, and the
    loop between two batches. `ratio` is the pipeline's rate over the loop's. `ratio_to_head` is the pipeline's rate
    over that of the loop's time in the head alone, so that it cannot exceed 1. All are medians.

    Args:
        images: number of pictures in the file, at least 1024.
        batch_size: number of pictures in a call of the head.
        repeats: number of rounds, odd.
    """
    spawn = multiprocessing.get_context("spawn")
    piped, loops = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = _write(Path(folder, "images.parquet"), images)
        for _ in range(repeats):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                loops.append(pool.submit(_loop, str(file), batch_size).result())
            with ray_session(None):
                piped.append(_pipeline(str(file), batch_size))
    actor, loop = statistics.median(piped), statistics.median(one.with_decoding for one in loops)
    alone = statistics.median(one.head_alone for one in loops)
    values = {
        "actor_images_per_s": actor,
        "loop_images_per_s": loop,
        "head_images_per_s": alone,
        "ratio": actor / loop,
        "ratio_to_head": actor / alone,
    }
    return Record("scoring", {"images": images, "batch_size": batch_size}, values)


def _write(path: Path, images: int) -> Path:
    """Write a parquet file of rendered scenes with their captions."""
    drawn = scenes(256)
    pictures = (render(drawn, stream(Purpose.RENDERING, 0)) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    encoded = [_png(picture) for picture in pictures]
    captions = [scene.caption for scene in drawn]
    rows = [i % len(drawn) for i in range(images)]
    table = pa.table({"image": [encoded[i] for i in rows], "prompt": [captions[i] for i in rows]})
    pq.write_table(table, path, row_group_size=ROW_GROUP)
    return path


def _png(picture: ImageArray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return data.getvalue()


def _pipeline(file: str, batch_size: int) -> float:
    """Pictures per second, from the first rows that arrive to the last."""
    arrived = [(time.perf_counter(), len(t)) for t in scored(read_index(file), {"clip": HEAD}, batch_size)]
    return sum(rows for _, rows in arrived[1:]) / (arrived[-1][0] - arrived[0][0])


def _loop(file: str, batch_size: int) -> _Loop:
    """Score the same rows, one batch after another; the first batch warms up and is not counted."""
    disable_progress_bar()
    torch.set_num_threads(1)
    actor = RewardActor("clip", HEAD.head, HEAD.options)
    in_head = 0.0

    def score(pictures: ImageArray, prompts: Sequence[str], ids: Sequence[str]) -> FloatArray:
        nonlocal in_head
        found = actor.score(pictures, prompts, ids)
        in_head += found.seconds
        return found.values

    batches = _batches(file, batch_size)
    score_rows(next(batches), "clip", score)
    in_head = 0.0
    scored_rows = timed(lambda: sum(len(score_rows(batch, "clip", score)) for batch in batches))
    return _Loop(scored_rows.answer / scored_rows.seconds, scored_rows.answer / in_head)


def _batches(file: str, batch_size: int) -> Iterator[pa.Table]:
    for piece in pieces(read_index(file)):
        for table in decode(piece):
            for i in range(0, len(table), batch_size):
                yield table.slice(i, batch_size)
