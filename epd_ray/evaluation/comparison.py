"""Comparing samplers on the same prompts and noise seeds, with intervals of the paired differences."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from epd_ray.drawing.sampler import REFERENCE_STEPS, Sampler
from epd_ray.embedded.judge import scene_accuracy
from epd_ray.embedded.scenes import CANVAS, Scene, parse
from epd_ray.evaluation.records import OURS, SCENE_ACCURACY, Difference, Evaluation, SolverRow, Tuned
from epd_ray.evaluation.statistics import Interval, bootstrap_mean, judged, paired_difference
from epd_ray.evaluation.tuning import Place
from epd_ray.solvers.rival import Rival
from epd_ray.storage.parquet import write_table
from epd_ray.storage.run_directory import RunDirectory, whole, write_text
from epd_ray.telemetry.progress import Observer, counted
from epd_ray.types import FloatArray, ImageArray, OnImages, Sampled

REFERENCE = Place(Rival("euler"), REFERENCE_STEPS, REFERENCE_STEPS)
"""The place of the slow sampler that shows what many steps give."""
Draw = Callable[[Sampler, Sequence[str], Sequence[int], OnImages | None], Sampled]


@dataclass(frozen=True)
class Row:
    """One sampler's results.

    Attributes:
        sampler: what drew the pictures.
        values: metric -> its value for each prompt, [B]; NaN where a reward head does not judge it.
        seconds_per_image: the time of a picture in seconds.
    """

    sampler: Sampler
    values: dict[str, FloatArray]
    seconds_per_image: float


@dataclass(frozen=True)
class Comparison:
    """The results of several samplers on one set of prompts and noise seeds.

    Attributes:
        split: "validation", "test", or the source of the prompts.
        prompts: B prompts.
        seeds: B noise seeds, one for each prompt.
        rows: the results of each sampler.
        ours: the keys of the learned samplers that the comparison is about. A difference is taken between each of them
            and every sampler that is not listed before it.
        reference: the key of the slow sampler that shows what many steps give; None if there is none.
        guidance_scale: the guidance scale of every sampler that has none of its own; None if it is not known.
        classifier_free: whether a guidance scale above 1 takes a second pass of the network; None if it is not known.
        sigmas: a sampler's key -> its noise levels [N+1], as far as they are known.
        tuned: the key of a sampler that was tuned -> how it came to its settings.
    """

    split: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    ours: tuple[str, ...] = (OURS,)
    reference: str | None = None
    guidance_scale: float | None = None
    classifier_free: bool | None = None
    sigmas: Mapping[str, Sequence[float]] = field(default_factory=dict)
    tuned: Mapping[str, Tuned] = field(default_factory=dict)

    @cached_property
    def means(self) -> dict[str, dict[str, Interval]]:
        """The mean over the prompts with its interval, by sampler's key and metric."""
        return {row.sampler.key: {m: bootstrap_mean(judged(v)) for m, v in row.values.items()} for row in self.rows}

    @cached_property
    def differences(self) -> list[Difference]:
        """Each learned sampler minus each of the others, metric by metric."""
        by_key = {row.sampler.key: row for row in self.rows}
        ours = [key for key in self.ours if key in by_key]
        pairs = [(a, b) for i, a in enumerate(ours) for b in by_key if b not in ours[: i + 1]]
        return [
            Difference(
                metric=m, solver=a, against=b, **asdict(paired_difference(by_key[a].values[m], by_key[b].values[m]))
            )
            for m, (a, b) in product(self.rows[0].values, pairs)
        ]

    @property
    def evaluation(self) -> Evaluation:
        """The means with their intervals, and the paired differences."""
        solvers = [
            SolverRow(
                key=row.sampler.key,
                label=row.sampler.label,
                kind=row.sampler.kind,
                schedule=row.sampler.schedule,
                intervals=row.sampler.intervals,
                parallel_nfe=row.sampler.parallel_nfe,
                model_evals=row.sampler.model_evals,
                network_passes=row.sampler.cost.network_passes(self._scale(row.sampler), self.classifier_free),
                seconds_per_image=row.seconds_per_image,
                metrics=self.means[row.sampler.key],
                sigmas=list(self.sigmas.get(row.sampler.key, ())),
                guidance_scale=self._scale(row.sampler),
                tuned=self.tuned.get(row.sampler.key),
            )
            for row in self.rows
        ]
        return Evaluation(
            split=self.split,
            prompts=len(self.prompts),
            metrics=list(self.rows[0].values),
            solvers=solvers,
            differences=self.differences,
            ours=list(self.ours),
            reference=self.reference,
            guidance_scale=self.guidance_scale,
        )

    def _scale(self, sampler: Sampler) -> float | None:
        return self.guidance_scale if sampler.guidance_scale is None else sampler.guidance_scale

    def summary(self) -> dict[str, object]:
        """The same as `evaluation`, as nested dictionaries and lists that are ready for JSON."""
        return self.evaluation.model_dump()

    def table(self) -> pa.Table:
        """A table with one row for each sampler and prompt: solver, prompt, noise_seed, and a column a metric.

        A metric is null where it does not judge the prompt.
        """
        columns: dict[str, list[object]] = {"solver": [], "prompt": [], "noise_seed": []}
        for row in self.rows:
            columns["solver"] += [row.sampler.key] * len(self.prompts)
            columns["prompt"] += self.prompts
            columns["noise_seed"] += self.seeds
            for metric, values in row.values.items():
                columns.setdefault(metric, []).extend(pa.array(values, from_pandas=True).to_pylist())
        return pa.table(columns)


def places(names: Sequence[str], ours: Sampler, equal_evals: bool) -> list[Place]:
    """Choose the methods that a learned sampler is compared with, and what their pictures may cost.

    Args:
        names: the methods, as epd_ray.solvers.zoo names them.
        ours: the learned sampler, whose parallel NFE each method gets.
        equal_evals: whether each method is also drawn with as many evaluations as `ours` has in total.

    Returns:
        Distinct places. A method that cannot have exactly this cost gets the next larger cost that it can have. At an
        equal number of evaluations, which stands for one of network passes, a rival without guidance gets twice as
        many.
    """
    costs = {ours.parallel_nfe: 1} | ({ours.model_evals: 2} if equal_evals else {})
    found: dict[str, Place] = {}
    for (cost, unguided), name in product(costs.items(), names):
        place = Place(Rival.parse(name), cost, cost * unguided)
        found.setdefault(place.as_it_comes.key, place)
    return list(found.values())


def rivals(names: Sequence[str], ours: Sampler, equal_evals: bool) -> list[Sampler]:
    """The samplers of the same methods as they come, see `places`."""
    return [place.as_it_comes for place in places(names, ours, equal_evals)]


def opponents(names: Sequence[str], ours: Sampler, equal_evals: bool) -> list[Sampler]:
    """Choose what a learned sampler is compared with: 50 Euler steps, and then other methods at equal cost.

    Args:
        names: see `places`, and so for the other arguments.
    """
    found = [REFERENCE.as_it_comes, *rivals(names, ours, equal_evals)]
    return list({sampler.key: sampler for sampler in found}.values())


def compare(
    draw: Draw,
    samplers: Sequence[Sampler],
    prompts: Sequence[str],
    seeds: Sequence[int],
    at_once: int,
    on_images: Callable[[Sampler, int, ImageArray], None],
    observer: Observer,
) -> tuple[Row, ...]:
    """Draw every sampler's pictures and score them.

    The samplers take turns, so that whatever slows the machine for a while slows them all.

    Args:
        draw: makes and scores pictures (RDPO.sample_scored).
        samplers: with distinct keys.
        prompts: B prompts.
        seeds: B noise seeds, the same for all samplers.
        at_once: the number of pictures that a sampler draws in its turn, at least 1; a multiple of the batch size.
        on_images: takes a sampler's pictures batch by batch, see types.OnImages.
        observer: sees one step for each turn, under the sampler's name.
    """
    scenes = scenes_of(prompts)
    judges = {sampler.key: SceneJudge(scenes) for sampler in samplers}
    parts: dict[str, list[Sampled]] = {sampler.key: [] for sampler in samplers}
    firsts = range(0, len(prompts), at_once)
    observer.stage("comparing", len(firsts) * len(samplers))
    for first, sampler in product(firsts, samplers):
        observer.item(f"{sampler.label} ({counted(sampler.model_evals, 'evaluation')})")
        turn = slice(first, first + at_once)
        see = partial(_see, judges[sampler.key], partial(on_images, sampler), first)
        parts[sampler.key].append(draw(sampler, prompts[turn], seeds[turn], see))
        observer.advance()
    return tuple(_row(sampler, parts[sampler.key], judges[sampler.key]) for sampler in samplers)


def _see(judge: "SceneJudge", on_images: OnImages, begin: int, first: int, images: ImageArray) -> None:
    """Show a batch to both; `begin` is the index of the turn's first picture, and `first` counts from there."""
    judge.see(begin + first, images)
    on_images(begin + first, images)


def _row(sampler: Sampler, parts: Sequence[Sampled], judge: "SceneJudge") -> Row:
    """A sampler's results; its time is the median over the turns, without a last one that has fewer pictures."""
    scores = {head: np.concatenate([part.scores[head] for part in parts]) for head in parts[0].scores}
    full = [part.seconds / len(part.reward) for part in parts if len(part.reward) == len(parts[0].reward)]
    return Row(sampler, {**scores, **judge.values}, float(np.median(full)))


class SceneJudge:
    """Judges pictures batch by batch, as they come.

    Args:
        scenes: what they should show, B; None: nothing can be judged.
    """

    def __init__(self, scenes: Sequence[Scene] | None) -> None:
        self._scenes = scenes or ()
        self._judged = np.full(len(self._scenes), np.nan, np.float32)

    def see(self, first: int, images: ImageArray) -> None:
        """A batch of the pictures, see types.OnImages."""
        rows = slice(first, first + len(images))
        if self._scenes and (judged := accuracy(self._scenes[rows], images)) is not None:
            self._judged[rows] = judged

    @property
    def values(self) -> dict[str, FloatArray]:
        """The metric by its name; empty where nothing could be judged."""
        judged = self._scenes and not np.isnan(self._judged).any()
        return {SCENE_ACCURACY: self._judged} if judged else {}


def scenes_of(prompts: Sequence[str]) -> list[Scene] | None:
    """Read the scenes that prompts for the embedded model describe; None if any prompt describes no scene."""
    scenes = [scene for prompt in prompts if (scene := parse(prompt)) is not None]
    return scenes if len(scenes) == len(prompts) else None


def accuracy(scenes: Sequence[Scene], images: ImageArray) -> FloatArray | None:
    """Judge whether pictures of the embedded model show their scenes.

    Args:
        scenes: B scenes.
        images: [B, 3, H, W], uint8.

    Returns:
        [B], 1 for each picture that shows its scene and 0 for the others; None if the pictures are not CANVAS pixels
        wide and high, because other sizes cannot be judged.
    """
    if images.shape[-2:] != (CANVAS, CANVAS):
        return None
    pictures = np.asarray(images, np.float32) / np.float32(255)
    return scene_accuracy(pictures, scenes).astype(np.float32)


def save_pictures(folder: Path, images: Iterable[ImageArray], first: int = 0) -> None:
    """<folder>/NNN.png, counted from `first`: the same number for the same prompt and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images, first):
        with whole(folder / f"{i:03d}.png") as partial:
            Image.fromarray(image.transpose(1, 2, 0)).save(partial, "PNG")


def save_comparison(run: RunDirectory, comparison: Comparison, pictures: int) -> None:
    """Write evaluation.parquet, evaluation.json, and prompts.json for the pictures that were kept.

    Args:
        run: the run directory.
        comparison: the results.
        pictures: the number of prompts whose pictures were kept, from the first.
    """
    write_table(run.evaluation_rows, comparison.table())
    run.samples.mkdir(parents=True, exist_ok=True)
    write_text(run.samples / "prompts.json", json.dumps(comparison.prompts[:pictures], indent=2))
    write_text(run.evaluation, json.dumps(comparison.summary(), indent=2))
