"""From rows of pictures to a comparison: means over prompts, distances, times, and the result in a sentence."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from epd_ray.drawing.sampler import Sampler
from epd_ray.evaluation.comparison import SCENE_ACCURACY, Comparison, Row
from epd_ray.evaluation.metrics.diversity import diversity
from epd_ray.evaluation.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance
from epd_ray.evaluation.statistics import Interval, paired_difference
from epd_ray.evaluation.suites.definition import Suite
from epd_ray.evaluation.suites.directory import ResultsDirectory
from epd_ray.evaluation.suites.measure import FEATURES, SHARPNESS, feature_rows, metrics_of
from epd_ray.evaluation.suites.pictures import Pictures
from epd_ray.types import FloatArray

DIVERSITY = "diversity"
Times = Mapping[tuple[str, int], float]
"""(session, shard) -> seconds a picture, of one sampler."""


@dataclass(frozen=True)
class Summary:
    """What came of a suite.

    Attributes:
        comparison: per prompt.
        distances: sampler's key -> Frechet distance to the reference set, where there is one.
        times: sampler's key -> its times.
    """

    comparison: Comparison
    distances: Mapping[str, float]
    times: Mapping[str, Times]


def summarise(suite: Suite, pictures: Pictures, results: ResultsDirectory, reference: Gaussian | None) -> Summary:
    """Read what is there of a suite's samplers, one sampler in memory at a time.

    Args:
        suite: whose shards are all there.
        pictures: that were drawn.
        results: of them.
        reference: features of a reference set.
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
    comparison = Comparison(suite.name, pictures.prompts, pictures.seeds, tuple(found), keys)
    return Summary(comparison, distances, times)


def _per_prompt(table: pa.Table, pictures: Pictures) -> dict[str, FloatArray]:
    """Metric -> the mean over a prompt's pictures, [P]: prompts are what was drawn independently."""
    prompt_ids = table["prompt_id"].to_numpy()
    counts = np.bincount(prompt_ids, minlength=len(pictures.prompts))
    sums = {m: np.bincount(prompt_ids, table[m].to_numpy()) for m in metrics_of(table.column_names)}
    return {metric: np.asarray(total / counts, np.float32) for metric, total in sums.items()}


def _diversity(sampler: Sampler, pictures: Pictures, results: ResultsDirectory) -> FloatArray:
    """Of each prompt's pictures, [P]."""
    table = results.read(sampler.key, pictures.shards, ["prompt_id", FEATURES])
    found = diversity(feature_rows(table), [str(prompt) for prompt in table["prompt_id"].to_pylist()])
    return np.array([found[str(prompt)] for prompt in range(len(pictures.prompts))], np.float32)


def _times(table: pa.Table) -> dict[tuple[str, int], float]:
    """Of the largest shards alone: in a smaller batch a picture takes longer."""
    shards = table.group_by(["session", "shard"]).aggregate([("seconds", "mean"), ("seconds", "count")]).to_pylist()
    largest = max(row["seconds_count"] for row in shards)
    return {(r["session"], r["shard"]): r["seconds_mean"] for r in shards if r["seconds_count"] == largest}


def median(times: Times) -> float:
    """Seconds a picture."""
    return float(np.median(list(times.values())))


@dataclass(frozen=True)
class Speed:
    """Two samplers' seconds a picture: medians over the shards that one call of the command drew with both."""

    ours: float
    other: float
    shards: int

    @property
    def ratio(self) -> float:
        return self.ours / self.other


def speed(ours: Times, other: Times) -> Speed | None:
    """Of the shards in common; None where there are none, as when a solver was added later."""
    both = ours.keys() & other.keys()
    if not both:
        return None
    first, second = ([times[key] for key in both] for times in (ours, other))
    return Speed(float(np.median(first)), float(np.median(second)), len(both))


@dataclass(frozen=True)
class Verdict:
    """What a learned sampler buys against the reference, for people."""

    sampler: Sampler
    differences: Mapping[str, Interval]
    speed: Speed | None
    sentence: str


def verdicts(suite: Suite, summary: Summary, guidance_scale: float) -> list[Verdict]:
    """The headline, per learned sampler: paired differences to the reference, and the ratio of their times."""
    if suite.reference is None:
        return []
    rows = {row.sampler.key: row for row in summary.comparison.rows}
    slow, count = rows[suite.reference.key], len(summary.comparison.prompts)
    found = []
    for ours in suite.ours:
        mine = rows[ours.key]
        metrics = [m for m in mine.values if m not in (SHARPNESS, DIVERSITY)]
        differences = {m: paired_difference(mine.values[m], slow.values[m]) for m in metrics}
        pace = speed(summary.times[ours.key], summary.times[suite.reference.key])
        said = [f"{m.replace('_', ' ')} {_difference(m, d)}" for m, d in differences.items()]
        sentence = (
            f"{ours.label} (parallel NFE {ours.parallel_nfe}, {ours.model_evals} evaluations) against "
            f"{suite.reference.intervals} steps of {suite.reference.label} on {count} prompts at "
            f"guidance {guidance_scale:g}: {', '.join([*said, _pace(pace)])}"
        )
        found.append(Verdict(ours, differences, pace, sentence))
    return found


def _difference(metric: str, d: Interval) -> str:
    if metric == SCENE_ACCURACY:
        return f"{100 * d.mean:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    return f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"


def _pace(pace: Speed | None) -> str:
    if pace is None:
        return "times not compared (drawn at different times: evaluate both in a new --out)"
    many = f"medians of {pace.shards} batches each" if pace.shards > 1 else "of one batch each"
    return (
        f"in {pace.ratio:.2f} of its time a picture ({duration(pace.ours)} against {duration(pace.other)}, {many}, "
        "drawn in turns)"
    )


def duration(seconds: float) -> str:
    """12.3 ms, 1.23 s."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
