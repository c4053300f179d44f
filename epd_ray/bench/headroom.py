"""The room for better solvers: how a model does with few evaluations when everything else is at its best."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from epd_ray.actors.beforehand import panel_of
from epd_ray.actors.configured import run_session
from epd_ray.bench.headroom_report import Measurement, Point, ranked, write_report
from epd_ray.bench.kept import FOLDER, kept
from epd_ray.bench.record import Record, Value, under
from epd_ray.config.loading import load_config
from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import nearest_sampler, rival_sampler
from epd_ray.errors import ConfigError
from epd_ray.evaluation.comparison import SceneJudge, scenes_of
from epd_ray.evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from epd_ray.evaluation.suites.features import foresee_features, open_features
from epd_ray.evaluation.suites.measure import Features
from epd_ray.evaluation.suites.settings import Request
from epd_ray.evaluation.suites.tune import judge_of, scope_of
from epd_ray.evaluation.tuning import FINE, Heat, Race, require_apart, schedules
from epd_ray.prompts.splits import PromptSplits, load_prompts
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.session import algorithm
from epd_ray.solvers.costs import passes_per_eval
from epd_ray.solvers.rival import Rival
from epd_ray.solvers.zoo import applicable, find
from epd_ray.telemetry.progress import Observer, console_observer, counted
from epd_ray.types import FloatArray, Form, ImageArray

EVALS = (1, 2, 3, 4, 6, 8, 12, 20, 50)
GUIDANCES = (1.0, 1.5, 2.0, 2.5, 3.5, 4.5, 6.0, 8.0)
AROUND = (0.7, 1.4)
"""The guidance scales that each method tries, as multiples of the best one of the first method."""
FIRST_METHOD = "euler_no_zero"
FINALISTS = 3
"""The number of methods that are searched to the end, and that draw the test prompts."""
BUDGET = 10**9  # the races have their own bounds: each begins with few prompts, and a third goes on


@dataclass(frozen=True)
class Subject:
    """What a headroom is measured on.

    Attributes:
        config: the model, the prompts and the reward heads.
        evals: the numbers of evaluations, increasing; the last one is the reference.
        reference: pictures or their statistics, to which the Frechet distance is measured; None leaves that out.
        features: the network whose features it compares: "inception" or a CLIP model; None takes the clip head's model.

    Raises:
        ConfigError: fewer than two numbers of evaluations, or one below 1.
    """

    config: RunConfig
    evals: tuple[int, ...] = EVALS
    reference: Path | None = None
    features: str | None = None

    def __post_init__(self) -> None:
        if len(set(self.evals)) < 2 or min(self.evals) < 1:
            raise ConfigError([f"--evals is {list(self.evals)}, at least two numbers of at least 1 are needed"])


def headroom(
    overrides: Sequence[str] = (),
    config: Path | None = None,
    folder: Path = FOLDER,
    evals: Sequence[int] = EVALS,
    reference: Path | None = None,
    features: str | None = None,
) -> Record:
    """The best of guidance, schedule and method for each number of evaluations, against the most steps at their best.

    Everything is chosen on the validation prompts by the trained reward, and reported on the test prompts in every
    reward. What is measured of a number of evaluations is kept, so that a command that was stopped goes on.

    Args:
        overrides: changes of the settings, such as "backbone.model=...".
        config: a YAML file of settings; None takes the defaults.
        folder: receives headroom-N.json for each number of evaluations, headroom.json, headroom.md and headroom.png.
        evals: the numbers of evaluations.
        reference: see `Subject`.
        features: see `Subject`.

    Raises:
        ConfigError: settings that are wrong, or validation prompts that are test prompts too.
        PromptError: there are fewer prompts than are asked for, or a head judges none of a split.
        RunDirectoryError: the folder holds results of other settings.
    """
    subject = Subject(load_config(config, overrides), tuple(sorted(set(evals))), reference, features)
    found = measure(subject, folder, console_observer())
    lines = write_report(found, subject.config.backbone.arguments.get("model", subject.config.backbone.family), folder)
    Console(soft_wrap=True).print("\n".join(lines), markup=False, highlight=False)
    values: dict[str, Value] = {}
    for one in found:
        best = one.best
        row: dict[str, Value] = {"settings": best.rival, "network_passes": best.network_passes}
        row |= {"images": one.images}
        row |= {} if best.frechet_distance is None else {"frechet_distance": best.frechet_distance}
        for metric, interval in best.means.items():
            row |= {metric: interval.mean, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        values |= under(f"{one.evals} evaluations", row)
    prompts = {"validation_prompts": subject.config.prompts.validation, "test_prompts": subject.config.prompts.test}
    return Record("headroom", {**prompts, "verdict": lines[-1]}, values)


def measure(subject: Subject, folder: Path, observer: Observer) -> list[Measurement]:
    """Measure every number of evaluations, or read what is kept of it.

    Args:
        subject: what is measured.
        folder: keeps the measurements.
        observer: sees one step for each number of evaluations.
    """
    config = subject.config
    prompts = load_prompts(config.prompts, config.seed, panel_of(config))
    require_apart(prompts.validation, prompts.test)
    request = Request("paper", folder, features=subject.features, reference=subject.reference)
    spec = foresee_features(request, config, len(prompts.test))
    rules = {"guidances": GUIDANCES, "reference": str(subject.reference), "features": subject.features}
    local = config.model_copy(update={"cluster": config.cluster.model_copy(update={"learner_actors": 0})})
    found: list[Measurement] = []
    with ExitStack() as stack:
        observer.stage("starting actors", 1)
        stack.enter_context(run_session(config, prompts.rows))
        cache = folder / "features"
        features = stack.enter_context(open_features(spec, subject.reference, len(prompts.test), cache, local.cluster))
        algo = stack.enter_context(algorithm(local, prompts.train, rows=prompts.rows))
        observer.advance()
        observer.stage("measuring headroom", len(subject.evals))
        for evals in subject.evals:
            observer.item(counted(evals, "evaluation"))
            search = Search(config, prompts, algo, features, evals, observer)
            settings = json.loads(json.dumps({**rules, "evals": evals}))
            measured = kept(folder / f"headroom-{evals}.json", config, settings, Measurement, search.measured)
            found.append(measured)
            observer.advance()
    observer.done()
    return found


class Search:
    """The search for the best sampler with a given number of evaluations.

    Args:
        config: the configuration of the run.
        prompts: the prompts of the three splits.
        algo: the algorithm whose actors draw and score.
        features: the features of the reference set, if there is one.
        evals: the number of evaluations.
        observer: shows the pictures that were drawn so far.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptSplits,
        algo: RDPO,
        features: Features,
        evals: int,
        observer: Observer,
    ) -> None:
        self._config, self._prompts, self._algo, self._features = config, prompts, algo, features
        self._evals, self._observer = evals, observer
        self.scope = scope_of(algo.facts)
        self._judge = judge_of(algo)

    def measured(self) -> Measurement:
        """Choose the finalists on the validation prompts, and measure them on the test prompts."""
        race = Race(self._draw, len(self._prompts.validation))
        finalists = self._chosen(race)
        points = [self._point(rival, race.rewards[rival]) for rival in finalists]
        return Measurement(self._evals, race.images, len(race.rewards), points)

    def _chosen(self, race: Race) -> list[Rival]:
        """The best settings of the best methods, the best first."""
        methods = methods_with(self._evals, self.scope.form)
        first = Rival(FIRST_METHOD if FIRST_METHOD in methods else methods[0])
        scales = GUIDANCES if self.scope.prompted else (1.0,)
        start = race.run([replace(first, guidance_scale=scale) for scale in scales], BUDGET)
        scale = start.guidance_scale or 1.0
        around = [scale, *(round(scale * factor, 3) for factor in AROUND if scale * factor > 1)]
        every = [Rival(method, guidance_scale=g) for method in methods for g in (around if len(scales) > 1 else [1.0])]
        race.run([start, *every], BUDGET)
        best = [self._refined(race, rival) for rival in ranked(race.rewards)[:FINALISTS]]
        race.complete(best)
        return sorted(dict.fromkeys(best), key=lambda rival: -float(race.rewards[rival].mean()))

    def _refined(self, race: Race, rival: Rival) -> Rival:
        """The rival with the best schedule, and then the best guidance."""
        rival = race.run([rival, *schedules(self.scope, rival)], BUDGET)
        scale = rival.guidance_scale or 1.0
        finer = [replace(rival, guidance_scale=round(scale * factor, 3)) for factor in FINE if scale * factor > 1]
        return race.run([rival, *(finer if self.scope.prompted else [])], BUDGET)

    def _draw(self, heats: Sequence[Heat]) -> list[FloatArray]:
        prompts = self._prompts.validation
        seeds = noise_seeds(Purpose.VALIDATION, self._config.seed, len(prompts))
        drawings = [(nearest_sampler(rival, self._evals), prompts[part], seeds[part]) for rival, part in heats]
        found = self._judge(drawings)
        self._observer.advance(0, images=float(sum(len(rewards) for rewards in found)))
        return found

    def _point(self, rival: Rival, validation: FloatArray) -> Point:
        """Draw the test prompts with a finalist."""
        prompts = self._prompts.test
        sampler = rival_sampler(rival, self._evals)
        scenes, statistics = scenes_of(prompts), []
        judge = SceneJudge(scenes)

        def see(first: int, images: ImageArray) -> None:
            judge.see(first, images)
            if self._features.extractor is not None:
                statistics.append(FeatureStatistics.of(self._features.extractor.features(images)))

        seeds = noise_seeds(Purpose.TEST, self._config.seed, len(prompts))
        drawn = self._algo.sample_scored(sampler, prompts, seeds, see)
        distance = None
        if self._features.reference is not None:
            distance = frechet_distance(FeatureStatistics.merged(statistics).gaussian(), self._features.reference)
        scores = {"reward": drawn.reward, **drawn.scores, **judge.values}
        return Point(
            rival=rival.text,
            label=find(rival.method).label,
            guidance_scale=rival.guidance_scale or self.scope.guidance_scale,
            network_passes=sampler.model_evals * self._passes(rival),
            validation=float(np.mean(validation)),
            scores={
                metric: [None if np.isnan(v) else round(float(v), 6) for v in values]
                for metric, values in scores.items()
            },
            frechet_distance=distance,
        )

    def _passes(self, rival: Rival) -> int:
        scale = rival.guidance_scale or self.scope.guidance_scale
        return passes_per_eval(scale, classifier_free=self.scope.classifier_free)


def methods_with(evals: int, form: Form) -> list[str]:
    """The methods of the zoo that can have exactly this number of evaluations."""
    names = applicable(form)
    found = [n for n in names if (m := find(n)).parallel_nfe(m.intervals(evals)) == evals]
    return [name for name in found if name != "euler" or evals > 1] or found
