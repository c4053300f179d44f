"""Choosing a rival's guidance, schedule and options on the validation prompts, with a fixed number of pictures."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from epd_ray.drawing.sampler import Sampler, nearest_sampler
from epd_ray.errors import ConfigError, ModelError, ScheduleError, shown
from epd_ray.evaluation.records import Tuned
from epd_ray.solvers import zoo
from epd_ray.solvers.costs import passes_per_eval
from epd_ray.solvers.rival import Rival, options_of
from epd_ray.solvers.schedule_names import AYS, MODEL
from epd_ray.types import FloatArray, Form

Drawing = tuple[Sampler, Sequence[str], Sequence[int]]
"""A sampler, with B prompts and their noise seeds."""
Judge = Callable[[Sequence[Drawing]], list[FloatArray]]
"""Draws a picture for each prompt of each drawing, and returns the trained rewards, [B] of each."""
Heat = tuple[Rival, slice]
"""A rival, and which of the prompts it draws."""
Round = Callable[[Rival], list[Rival]]
"""Returns the candidates of a round, made from the best rival so far."""

FIRST, GROWTH, LAST = 4, 3, 24
"""All values of a setting are tried on FIRST prompts; the best of them go on to GROWTH times as many, up to LAST."""
LADDER = tuple(2.0 ** (half / 2) for half in (1, 0, -1, -2, -3, -4))
"""The guidance scales that are tried, as multiples of the given one; 1, which is no guidance, is tried too."""
FINE = (2**0.25, 2**-0.25)
"""The guidance scales that are tried at the end, as multiples of the best one."""
SHIFTS = (0.5, 1.5, 2.5)
"""The shifts of a flow's noise levels that are tried, as multiples of the pipeline's."""
OPTIONS: dict[str, tuple[bool | int | str | tuple[int, ...], ...]] = {
    "solver_order": (1, 2, 3),
    "solver_type": ("heun",),
    "lower_order_final": (False,),
    "disable_corrector": ((0,),),
}
"""The options of schedulers that are tried, as far as the installed diffusers has them. UniPC's type bh1 is left out,
because it gives no finite pictures at sigma 0."""
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class Scope:
    """What of a rival can be chosen on a model.

    Attributes:
        form: how noise enters x, "ve" or "flow".
        guidance_scale: the guidance scale of a rival as it comes.
        classifier_free: whether a guidance scale above 1 takes a second pass of the network.
        shift: the pipeline's own shift of a flow's noise levels; None where it cannot be chosen.
        published: whether noise levels are published for the model.
        prompted: whether there is anything that guidance could follow.
    """

    form: Form
    guidance_scale: float
    classifier_free: bool
    shift: float | None = None
    published: bool = False
    prompted: bool = True


@dataclass(frozen=True)
class Place:
    """A rival's place in a comparison: a method, and what its pictures may cost.

    Attributes:
        rival: the method as it comes.
        evals: the evaluations of a picture.
        unguided: the evaluations of a picture without guidance: twice as many where the cost is in network passes.
    """

    rival: Rival
    evals: int
    unguided: int

    @property
    def as_it_comes(self) -> Sampler:
        """The sampler of the rival as it comes."""
        return nearest_sampler(self.rival, self.evals)

    def tuned(self, found: Tuned, scope: Scope) -> Sampler:
        """The sampler with the settings that were chosen; that of the rival as it comes where nothing was."""
        rival, plain = Rival.parse(found.chosen), self.as_it_comes
        if rival == self.rival:
            return plain
        return replace(self.sampler(rival, scope), key=f"{plain.key}-tuned", label=f"{plain.label}, tuned")

    def sampler(self, rival: Rival, scope: Scope) -> Sampler:
        """The sampler of the rival with other settings, at the same cost or the next larger one that it can have."""
        usual, own = (
            passes_per_eval(scale, classifier_free=scope.classifier_free)
            for scale in (scope.guidance_scale, _scale(rival, scope))
        )
        return nearest_sampler(rival, self.unguided if own < usual else self.evals)


@dataclass(frozen=True)
class TunedPlace:
    """A rival's place after tuning.

    Attributes:
        place: the rival as it comes, and what its pictures may cost.
        found: what was chosen.
        sampler: the sampler with these settings; that of the rival as it comes where nothing was chosen.
    """

    place: Place
    found: Tuned
    sampler: Sampler


class Tuner:
    """Chooses the settings of one rival, one kind of setting after the other; all rivals get the same budget.

    The values of a setting draw the same few prompts from the same noise, and the best of them draw more. The order is
    guidance, schedule and shift, the scheduler's options, and guidance again, in finer steps. Settings that give no
    finite picture are left out.

    Args:
        judge: draws and scores.
        prompts: the validation prompts.
        seeds: one noise seed per prompt.
        scope: what can be chosen.
        budget: the number of pictures that are drawn at most, at least LAST.
    """

    def __init__(self, judge: Judge, prompts: Sequence[str], seeds: Sequence[int], scope: Scope, budget: int) -> None:
        self._judge, self._prompts, self._seeds = judge, prompts, seeds
        self.scope, self._budget = scope, budget

    def tune(self, place: Place) -> Tuned:
        """Choose the settings of a rival."""
        return self._search(place, rounds(self.scope, place), self._budget)

    def tune_guidance(self, place: Place) -> Tuned:
        """Choose the guidance scale of a rival alone, with half of the budget."""
        return self._search(place, [partial(guidances, self.scope)], max(LAST, self._budget // 2))

    def _search(self, place: Place, found: Iterable[Round], budget: int) -> Tuned:
        race = Race(lambda heats: self._draw(place, heats), len(self._prompts))
        best = place.rival
        for candidates in found:
            best = race.run([best, *candidates(best)], budget)
        return Tuned(chosen=best.text, images=race.images, candidates=len(race.rewards))

    def _draw(self, place: Place, heats: Sequence[Heat]) -> list[FloatArray]:
        samplers = [place.sampler(rival, self.scope) for rival, _ in heats]
        parts = [part for _, part in heats]
        return self._judge([(s, self._prompts[p], self._seeds[p]) for s, p in zip(samplers, parts, strict=True)])


class Race:
    """Rivals that draw the same prompts from the same noise, the best of them more and more of these.

    Args:
        draw: returns the rewards of each rival on the prompts of its slice.
        prompts: the number of prompts that there are.
    """

    def __init__(self, draw: Callable[[Sequence[Heat]], list[FloatArray]], prompts: int) -> None:
        self._draw, self._prompts = draw, prompts
        self.rewards: dict[Rival, FloatArray] = {}
        self.images = 0

    def run(self, rivals: Sequence[Rival], budget: int, most: int | None = None) -> Rival:
        """The rival with the largest mean reward; of equal ones the first.

        Args:
            rivals: the candidates; the first must give finite pictures.
            budget: the number of pictures that all calls together may draw; candidates without room are left out.
            most: the number of prompts that the last ones draw; None takes LAST, or all if there are fewer.

        Raises:
            ModelError: the first candidate gives no finite pictures.
        """
        last = min(self._prompts, most or LAST)
        alive, size = list(dict.fromkeys(rivals)), min(FIRST, last)
        ranked = alive
        while alive := self._measured(ranked[: len(alive)], size, budget, needed=rivals[0]):
            ranked = sorted(alive, key=lambda rival: -float(self.rewards[rival][:size].mean()))
            if size == last or len(ranked) == 1:
                break
            alive, size = ranked[: max(2, math.ceil(len(ranked) / GROWTH))], min(last, size * GROWTH)
            if budget - self.images < sum(size - len(self.rewards[rival]) for rival in alive[:2]):
                break
        return ranked[0]

    def complete(self, rivals: Sequence[Rival]) -> None:
        """Draw all prompts with rivals that are known to give finite pictures."""
        heats = [(r, slice(len(self.rewards.get(r, ())), self._prompts)) for r in dict.fromkeys(rivals)]
        self._run([(rival, part) for rival, part in heats if part.start < part.stop], rivals[0])

    def _measured(self, rivals: Sequence[Rival], size: int, budget: int, needed: Rival) -> list[Rival]:
        """Draw what is missing while there is room; returns the rivals that can be compared on `size` prompts."""
        heats: list[Heat] = []
        room = budget - self.images
        for rival in rivals:
            missing = slice(len(self.rewards.get(rival, ())), size)
            count = max(0, missing.stop - missing.start)
            if 0 < count <= room:
                heats.append((rival, missing))
                room -= count
        self._run(heats, needed)
        return [r for r in rivals if len(self.rewards.get(r, ())) >= size and self.rewards[r][0] > -math.inf]

    def _run(self, heats: Sequence[Heat], needed: Rival) -> None:
        try:
            drawn = self._draw(heats) if heats else []
        except (ModelError, ScheduleError):
            if len(heats) > 1:  # one at a time, to find which it was
                for heat in heats:
                    self._run([heat], needed)
                return
            if heats[0][0] == needed:
                raise
            drawn = [np.full(self._prompts, -np.inf, np.float32)]
        for (rival, part), rewards in zip(heats, drawn, strict=True):
            self.images += part.stop - part.start
            self.rewards[rival] = np.concatenate([self.rewards.get(rival, rewards[:0]), rewards])


def rounds(scope: Scope, place: Place) -> Iterator[Round]:
    """The rounds of a search, one kind of setting each."""
    if scope.prompted:
        yield lambda best: guidances(scope, best)
    yield lambda best: schedules(scope, best)
    yield lambda best: list(_options(scope, best, place.sampler(best, scope).intervals))
    if scope.prompted:
        yield lambda best: [_guided(best, scope, factor) for factor in FINE if _scale(best, scope) * factor > 1]


def guidances(scope: Scope, rival: Rival) -> list[Rival]:
    """The rival with other guidance scales, of at least 1."""
    scales = [scope.guidance_scale * factor for factor in LADDER]
    found = [round(scale, 3) for scale in scales if scale > 1] + [1.0]
    return [replace(rival, guidance_scale=scale) for scale in found if scale != scope.guidance_scale]


def schedules(scope: Scope, rival: Rival) -> list[Rival]:
    """The rival on other noise levels: shifted, spaced or published otherwise, of the model, without the step to 0."""
    method = zoo.find(rival.method)
    found = []
    if scope.shift is not None:
        found += [replace(rival, shift=round(scope.shift * factor, 3)) for factor in SHIFTS]
    if scope.form in method.schedulers:
        if scope.form == "ve" and "timestep_spacing" in options_of(rival.method, scope.form):
            found += [rival.having(timestep_spacing=spacing) for spacing in SPACINGS]
        if scope.form == "ve" or method.takes_options:  # a flow's Euler and Heun follow the model's levels anyway
            found.append(replace(rival, schedule=MODEL, options=_steps_alone(rival)))
    if scope.published:
        found.append(replace(rival, schedule=AYS, options=_steps_alone(rival)))
    if method.ends_at_zero and method.last_evals is None:
        found.append(replace(rival, schedule=MODEL, final_zero=False, options=_steps_alone(rival)))
    return found


def _steps_alone(rival: Rival) -> tuple[tuple[str, bool | int | float | str | tuple[int, ...]], ...]:
    return tuple((name, value) for name, value in rival.options if name in OPTIONS)


def _options(scope: Scope, rival: Rival, intervals: int) -> Iterator[Rival]:
    known = options_of(rival.method, scope.form)
    usual = zoo.find(rival.method).options.get("order")
    for name, values in OPTIONS.items():
        for value in values if name in known else ():
            if name == "solver_order" and value == usual:
                continue
            if name == "solver_type" and str(value) not in str(known[name].annotation):
                continue
            yield rival.having(**{name: value})
    if "disable_corrector" in known:
        yield rival.having(disable_corrector=tuple(range(intervals)))


def _scale(rival: Rival, scope: Scope) -> float:
    return scope.guidance_scale if rival.guidance_scale is None else rival.guidance_scale


def _guided(rival: Rival, scope: Scope, factor: float) -> Rival:
    return replace(rival, guidance_scale=round(_scale(rival, scope) * factor, 3))


def require_apart(validation: Sequence[str], test: Sequence[str]) -> None:
    """Refuse test prompts that the rivals' settings are chosen on.

    Raises:
        ConfigError: a prompt is in both sets.
    """
    if both := [prompt for prompt in dict.fromkeys(validation) if prompt in set(test)]:
        raise ConfigError(
            [
                f"{len(both)} validation prompts are test prompts too, such as {shown(both[0])}: settings that are "
                "chosen on them would be judged on them (give other prompts, or set evaluation.tune=false)"
            ]
        )
