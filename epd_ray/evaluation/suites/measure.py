"""The figures of a suite: a row for each picture, then means over prompts, distances and times."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from epd_ray.drawing.sampler import Sampler
from epd_ray.evaluation.comparison import Comparison, Row, accuracy, scenes_of
from epd_ray.evaluation.metrics.diversity import diversity
from epd_ray.evaluation.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from epd_ray.evaluation.metrics.sharpness import sharpness
from epd_ray.evaluation.records import DIVERSITY, SCENE_ACCURACY, SHARPNESS
from epd_ray.evaluation.suites.definition import Suite
from epd_ray.evaluation.suites.directory import ResultsDirectory
from epd_ray.evaluation.suites.subject import Pictures
from epd_ray.evaluation.verdict import Speed, Timing
from epd_ray.types import FeatureExtractor, FloatArray, ImageArray

ABOUT = ("prompt_id", "image", "prompt", "noise_seed", "shard", "session", "seconds")
"""The columns that are no metrics."""
FEATURES = "features"


@dataclass(frozen=True)
class Features:
    """The features that a suite computes of its pictures.

    Attributes:
        extractor: computes them; None computes none.
        reference: the statistics of the reference set; None leaves out the Frechet distance.
        is_fid: whether the extractor is Inception, so that the Frechet distance is the FID of the papers.
    """

    extractor: FeatureExtractor | None = None
    reference: Gaussian | None = None
    is_fid: bool = False


def rows(
    pictures: Pictures,
    shard: int,
    images: ImageArray,
    scores: dict[str, FloatArray],
    seconds: float,
    session: str,
    extractor: FeatureExtractor | None,
) -> pa.Table:
    """Make the table of a shard, with one row for each picture.

    Args:
        pictures: the prompts and seeds of the whole suite.
        shard: the number of the shard.
        images: the shard's pictures [B, 3, H, W], uint8.
        scores: reward head -> its scores [B]; NaN, and null in the table, where it does not judge the prompt.
        seconds: the time that the rollout actor took for the shard, in seconds.
        session: names the call of the command that drew the shard; times of different calls are not compared.
        extractor: computes a column of features; None leaves it out.
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
    columns |= {head: pa.array(values, from_pandas=True) for head, values in scores.items()}
    scenes = scenes_of(prompts) if pictures.judged else None
    if scenes is not None and (judged := accuracy(scenes, images)) is not None:
        columns[SCENE_ACCURACY] = judged
    columns[SHARPNESS] = sharpness(images)
    if extractor is not None:
        found = np.ascontiguousarray(extractor.features(images), np.float32)
        columns[FEATURES] = pa.FixedSizeListArray.from_arrays(found.reshape(-1), found.shape[1])  # [B, D] -> B lists
    return pa.table(columns)


def feature_rows(table: pa.Table) -> FloatArray:
    """The features [B, D] in a table of `rows`."""
    column = table[FEATURES].combine_chunks()
    values: FloatArray = column.flatten().to_numpy().reshape(len(column), -1)  # B lists of D -> [B, D]
    return values


def metrics_of(names: list[str]) -> list[str]:
    """The columns of `rows` that are metrics of a picture."""
    return [name for name in names if name not in (*ABOUT, FEATURES)]


Times = Mapping[tuple[str, int], float]
"""The seconds that one sampler took for a picture, by session and shard."""


@dataclass(frozen=True)
class Summary:
    """The figures of a suite.

    Attributes:
        comparison: every metric for each prompt.
        distances: sampler's key -> Frechet distance to the reference set; empty without a reference set.
        times: sampler's key -> its times.
    """

    comparison: Comparison
    distances: Mapping[str, float]
    times: Mapping[str, Times]


def summarise(
    suite: Suite,
    pictures: Pictures,
    results: ResultsDirectory,
    reference: Gaussian | None,
    guidance_scale: float | None = None,
    classifier_free: bool | None = None,
) -> Summary:
    """Read the rows of a suite's samplers, with one sampler in memory at a time, and sum them up.

    Args:
        suite: the suite; the shards of all its samplers are finished.
        pictures: the prompts and seeds that were drawn.
        results: the directory that holds the shards.
        reference: the statistics of the reference set; None leaves out the Frechet distance.
        guidance_scale: the guidance scale of all pictures; None if it is not known.
        classifier_free: whether a guidance scale above 1 takes a second pass of the network; None if it is not known.
    """
    found, distances, times = [], {}, {}
    for sampler in suite.samplers:
        columns = results.columns(sampler.key)
        table = results.read(sampler.key, pictures.shards, [name for name in columns if name != FEATURES])
        times[sampler.key] = _times(table)
        values = _per_prompt(table, pictures)
        if FEATURES in columns and pictures.images_per_prompt > 1:
            values[DIVERSITY] = _diversity(sampler, pictures, results)
        if reference is not None:
            parts = results.parts(sampler.key, pictures.shards, [FEATURES])
            seen = FeatureStatistics.merged(FeatureStatistics.of(feature_rows(part)) for part in parts)
            distances[sampler.key] = frechet_distance(seen.gaussian(), reference)
        found.append(Row(sampler, values, median(times[sampler.key])))
    keys = () if suite.name == "paper-fid" else tuple(s.key for s in suite.ours)
    slow = suite.reference.key if suite.reference else None
    comparison = Comparison(
        suite.name,
        pictures.prompts,
        pictures.seeds,
        tuple(found),
        keys,
        slow,
        guidance_scale,
        classifier_free,
        tuned=suite.tuned,
    )
    return Summary(comparison, distances, times)


def _per_prompt(table: pa.Table, pictures: Pictures) -> dict[str, FloatArray]:
    """Metric -> its mean over the pictures of each prompt, [P], because only prompts are independent of each other."""
    prompt_ids = table["prompt_id"].to_numpy()
    counts = np.bincount(prompt_ids, minlength=len(pictures.prompts))
    sums = {m: np.bincount(prompt_ids, table[m].to_numpy()) for m in metrics_of(table.column_names)}
    return {metric: np.asarray(total / counts, np.float32) for metric, total in sums.items()}


def _diversity(sampler: Sampler, pictures: Pictures, results: ResultsDirectory) -> FloatArray:
    """The diversity of each prompt's pictures, [P]."""
    table = results.read(sampler.key, pictures.shards, ["prompt_id", FEATURES])
    found = diversity(feature_rows(table), [str(prompt) for prompt in table["prompt_id"].to_pylist()])
    return np.array([found[str(prompt)] for prompt in range(len(pictures.prompts))], np.float32)


def _times(table: pa.Table) -> dict[tuple[str, int], float]:
    """The times of full shards; a picture in a smaller batch takes longer, so the last shard may be left out."""
    shards = table.group_by(["session", "shard"]).aggregate([("seconds", "mean"), ("seconds", "count")]).to_pylist()
    largest = max(row["seconds_count"] for row in shards)
    return {(r["session"], r["shard"]): r["seconds_mean"] for r in shards if r["seconds_count"] == largest}


def median(times: Times) -> float:
    """The median time of a picture, in seconds."""
    return float(np.median(list(times.values())))


def speed(ours: Times, other: Times) -> Speed | None:
    """Compare the median times over the shards that both samplers have in common; None if there are none.

    There are none if one of the solvers was added to the results by a later call.
    """
    both = ours.keys() & other.keys()
    if not both:
        return None
    first, second = ([times[key] for key in both] for times in (ours, other))
    return Speed(float(np.median(first)), float(np.median(second)))


def timing(times: Mapping[str, Times]) -> Timing:
    """Compare the solvers of a suite by the batches that one call of the command drew with both, in turns.

    Args:
        times: sampler's key -> its times.
    """
    return lambda ours, other: speed(times[ours.key], times[other.key])
