"""Tuning the rivals of a run or a suite on its actors and its validation prompts."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import BackboneFacts
from epd_ray.errors import RunDirectoryError
from epd_ray.evaluation.comparison import REFERENCE
from epd_ray.evaluation.records import Tuned
from epd_ray.evaluation.tuning import Drawing, Judge, Place, Scope, TunedPlace, Tuner
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.storage.documents import read_json
from epd_ray.storage.run_directory import write_text
from epd_ray.telemetry.progress import Observer, counted
from epd_ray.types import FloatArray

Keep = Callable[[str, Tuned], None]


class Tuning:
    """Chooses the settings of rivals with the actors of an algorithm.

    Args:
        config: the configuration of the run: its seed, and the number of pictures for each rival.
        algo: the algorithm whose actors draw and score.
        prompts: the validation prompts.
        observer: sees one step for each rival.
    """

    def __init__(self, config: RunConfig, algo: RDPO, prompts: Sequence[str], observer: Observer) -> None:
        self._observer = observer
        self._budget = config.evaluation.tune_images
        self.scope = scope_of(algo.facts)
        seeds = noise_seeds(Purpose.VALIDATION, config.seed, len(prompts))
        self._tuner = Tuner(judge_of(algo), prompts, seeds, self.scope, self._budget)

    def opponents(self, places: Sequence[Place]) -> tuple[Sampler, list[Sampler], dict[str, Tuned]]:
        """Tune the reference and the rivals.

        Args:
            places: the rivals as they come.

        Returns:
            The reference at its best guidance; the rivals as they come and tuned, each sampler once; and a sampler's
            key -> how it came to its settings, for all that were tuned.
        """
        slow = REFERENCE.as_it_comes.key
        best, *tuned = self.tuned([REFERENCE, *(place for place in places if place.as_it_comes.key != slow)])
        others = [sampler for one in tuned for sampler in (one.place.as_it_comes, one.sampler)]
        records = {one.sampler.key: one.found for one in (best, *tuned)}
        return best.sampler, list({sampler.key: sampler for sampler in others}.values()), records

    def tuned(
        self, places: Sequence[Place], known: Mapping[str, Tuned] | None = None, keep: Keep = lambda key, found: None
    ) -> list[TunedPlace]:
        """Tune rivals.

        Args:
            places: the rivals as they come; the reference gets its guidance chosen alone.
            known: the key of a rival as it comes -> what was chosen for it before.
            keep: is given the key of a rival as it comes, and what was chosen for it, after each rival.
        """
        found = dict(known or {})
        missing = [place for place in places if place.as_it_comes.key not in found]
        if missing:
            self._observer.stage("tuning rivals", len(missing))
        for place in missing:
            found[place.as_it_comes.key] = self._tune(place)
            keep(place.as_it_comes.key, found[place.as_it_comes.key])
        images = sum(found[place.as_it_comes.key].images for place in places)
        self._observer.note(
            f"tuned {counted(len(places), 'rival')} on {counted(images, 'validation picture')}, at most "
            f"{self._budget} each (evaluation.tune_images; evaluation.tune=false does without)"
        )
        return [
            TunedPlace(place, found[place.as_it_comes.key], place.tuned(found[place.as_it_comes.key], self.scope))
            for place in places
        ]

    def _tune(self, place: Place) -> Tuned:
        sampler = place.as_it_comes
        self._observer.item(f"{sampler.label} ({counted(sampler.model_evals, 'evaluation')})")
        chosen = self._tuner.tune_guidance(place) if place is REFERENCE else self._tuner.tune(place)
        self._observer.advance()
        return chosen


def scope_of(facts: BackboneFacts) -> Scope:
    """What of a rival can be chosen on a model."""
    prompted = bool(facts.more.get("prompted", True))
    return Scope(
        facts.form, facts.guidance_scale, facts.classifier_free, facts.shift, facts.published, prompted
    )  # fmt: skip


def judge_of(algo: RDPO) -> Judge:
    """The trained rewards of pictures, drawn and scored by the actors of an algorithm."""

    def judge(drawings: Sequence[Drawing]) -> list[FloatArray]:
        return [sampled.reward for sampled in algo.sample_each(drawings)]

    return judge


class Kept:
    """A file with what was chosen for rivals, from which tuning goes on.

    Args:
        path: the JSON file; it may be missing.
        settings: everything else that decides what is chosen, as JSON values. A file of other settings is replaced.
    """

    def __init__(self, path: Path, settings: Mapping[str, JsonValue]) -> None:
        self._path, self._settings = path, json.loads(json.dumps(settings))

    def read(self) -> dict[str, Tuned]:
        """The key of a rival as it comes -> what was chosen for it; empty for a file that is missing or of others.

        Raises:
            RunDirectoryError: the file cannot be read.
        """
        if not self._path.exists():
            return {}
        held = read_json(self._path, RunDirectoryError, "delete it: the rivals are tuned again")
        if not isinstance(held, dict) or held.get("settings") != self._settings:
            return {}
        return {key: Tuned.model_validate(found) for key, found in held["tuned"].items()}

    def add(self, key: str, found: Tuned) -> None:
        """Write what was chosen for one more rival."""
        every = {**self.read(), key: found}
        chosen = {key: one.model_dump() for key, one in every.items()}
        write_text(self._path, json.dumps({"settings": self._settings, "tuned": chosen}, indent=2))
