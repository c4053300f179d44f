"""What is kept of every picture: who drew it from what, how long it took, and what each metric says."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from epd_ray.evaluation.comparison import SCENE_ACCURACY, accuracy, scenes_of
from epd_ray.evaluation.metrics.frechet import Gaussian
from epd_ray.evaluation.metrics.sharpness import sharpness
from epd_ray.evaluation.suites.pictures import Pictures
from epd_ray.types import FeatureExtractor, FloatArray, ImageArray

ABOUT = ("prompt_id", "image", "prompt", "noise_seed", "shard", "session", "seconds")
"""Columns that are no metric."""
FEATURES = "features"
SHARPNESS = "sharpness"


@dataclass(frozen=True)
class Features:
    """An open extractor and the features of the reference set, where they are asked for."""

    extractor: FeatureExtractor | None = None
    reference: Gaussian | None = None
    is_fid: bool = False  # the distance of Inception's features, as papers give it


def rows(
    pictures: Pictures,
    shard: int,
    images: ImageArray,
    scores: dict[str, FloatArray],
    seconds: float,
    session: str,
    extractor: FeatureExtractor | None,
) -> pa.Table:
    """One row a picture.

    Args:
        pictures: that are drawn in all.
        shard: which of them these are.
        images: [B, 3, H, W], uint8.
        scores: head -> [B].
        seconds: that the rollout actor took for the shard.
        session: the call of the command that drew them: times of different ones are not compared.
        extractor: of features, where they are asked for.
    """
    members = pictures.shard(shard)
    prompt_ids = [pictures.prompt_of(i) for i in members]
    prompts = [pictures.prompts[p] for p in prompt_ids]
    columns: dict[str, object] = {
        "prompt_id": pa.array(prompt_ids, pa.int32()),
        "image": pa.array([i % pictures.images_per_prompt for i in members], pa.int32()),
        "prompt": prompts,
        "noise_seed": pa.array([pictures.seeds[i] for i in members], pa.int64()),
        "shard": pa.array([shard] * len(members), pa.int32()),
        "session": [session] * len(members),
        "seconds": pa.array([seconds / len(members)] * len(members), pa.float32()),
    }
    columns |= scores
    scenes = scenes_of(prompts) if pictures.judged else None
    if scenes is not None and (judged := accuracy(scenes, images)) is not None:
        columns[SCENE_ACCURACY] = judged
    columns[SHARPNESS] = sharpness(images)
    if extractor is not None:
        found = np.ascontiguousarray(extractor.features(images), np.float32)
        columns[FEATURES] = pa.FixedSizeListArray.from_arrays(found.reshape(-1), found.shape[1])  # [B, D] -> B lists
    return pa.table(columns)


def feature_rows(table: pa.Table) -> FloatArray:
    """The features of a table of `rows`, [B, D]."""
    column = table[FEATURES].combine_chunks()
    values: FloatArray = column.flatten().to_numpy().reshape(len(column), -1)  # B lists of D -> [B, D]
    return values


def metrics_of(names: list[str]) -> list[str]:
    """Which columns of `rows` are metrics, per picture."""
    return [name for name in names if name not in (*ABOUT, FEATURES)]
