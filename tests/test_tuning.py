"""Choosing a rival's settings: who wins, on how many pictures, and what is never tried."""

import numpy as np
import pytest

from epd_ray.drawing.sampler import Sampler, baseline
from epd_ray.errors import ConfigError, ModelError
from epd_ray.evaluation.comparison import Comparison, Row, places
from epd_ray.evaluation.records import Evaluation, Tuned
from epd_ray.evaluation.tuning import LAST, Place, Race, Scope, Tuner, guidances, require_apart, rounds
from epd_ray.evaluation.verdict import about_table
from epd_ray.solvers.rival import Rival, require_rivals
from epd_ray.solvers.table import uniform_table

PROMPTS = [f"prompt {i}" for i in range(48)]
SEEDS = list(range(48))
FLOW = Scope("flow", 7.0, classifier_free=True, shift=2.0)
VE = Scope("ve", 7.5, classifier_free=True, published=True)


class Judge:
    """Rewards by a sampler's settings, with noise that is the same for all on a prompt; counts pictures."""

    def __init__(self, value) -> None:
        self.value, self.drawn, self.prompts = value, [], set()

    def __call__(self, drawings):
        self.drawn += [(sampler, len(prompts)) for sampler, prompts, _ in drawings]
        self.prompts |= {prompt for _, prompts, _ in drawings for prompt in prompts}
        return [
            np.array([self.value(sampler) + np.sin(seed) for seed in seeds], np.float32)
            for sampler, _, seeds in drawings
        ]


def scale(sampler: Sampler, usual: float = 7.0) -> float:
    return usual if sampler.guidance_scale is None else sampler.guidance_scale


def peaked(sampler: Sampler) -> float:
    """Best at guidance 2.5, shift 5, order 3."""
    shift = 2.0 if sampler.shift is None else sampler.shift
    order = dict(sampler.options).get("solver_order", 2)
    return -abs(np.log(scale(sampler) / 2.5)) - 0.3 * abs(shift - 5) + 0.2 * order


def test_every_setting_is_found_one_after_the_other() -> None:
    judge = Judge(peaked)
    found = Tuner(judge, PROMPTS, SEEDS, FLOW, 400).tune(Place(Rival("dpmpp2m"), 6, 12))
    rival = Rival.parse(found.chosen)
    assert rival.guidance_scale == pytest.approx(2.475) and rival.shift == 5.0
    assert rival.options == (("solver_order", 3),)
    assert found.images == sum(count for _, count in judge.drawn) and found.candidates > 10
    assert judge.prompts == set(PROMPTS[:LAST])


@pytest.mark.parametrize("budget", [24, 100, 128])
def test_no_rival_draws_more_than_the_budget(budget: int) -> None:
    for name in ("dpmpp2m", "unipc", "euler_no_zero", "heun"):
        judge = Judge(peaked)
        found = Tuner(judge, PROMPTS, SEEDS, FLOW, budget).tune(Place(Rival(name), 6, 12))
        assert found.images == sum(count for _, count in judge.drawn) <= budget
    assert found.images > budget / 2


def test_a_rival_that_nothing_improves_stays_as_it_comes() -> None:
    place = Place(Rival("unipc"), 6, 12)
    best = Tuner(Judge(lambda s: float(s.options == () and scale(s) == 7.0)), PROMPTS, SEEDS, FLOW, 128).tune(place)
    assert best.chosen == "unipc" and best.settings == ""
    assert place.tuned(best, FLOW) == place.as_it_comes == baseline("unipc", 6)


def test_a_tuned_sampler_is_named_beside_the_one_as_it_comes() -> None:
    place = Place(Rival("dpmpp2m"), 6, 12)
    sampler = place.tuned(Tuned(chosen="dpmpp2m@model?guidance_scale=2.5", images=9, candidates=3), FLOW)
    assert (sampler.key, sampler.label) == ("dpmpp2m-6-tuned", "DPM-Solver++ 2M, tuned")
    assert (sampler.guidance_scale, sampler.schedule, sampler.model_evals) == (2.5, "model", 6)


def test_without_guidance_a_rival_has_twice_the_evaluations_for_its_passes() -> None:
    ours = Sampler("epd", 2, "t", "t", uniform_table(2, 3, start_point=True))  # parallel NFE 4, 6 evaluations
    nfe, evals = places(["euler"], ours, equal_evals=True)
    plain, unguided = Rival("euler"), Rival("euler", guidance_scale=1.0)
    assert [nfe.sampler(r, FLOW).model_evals for r in (plain, unguided)] == [4, 4]
    assert [evals.sampler(r, FLOW).model_evals for r in (plain, unguided)] == [6, 12]
    embedded = Scope("flow", 3.5, classifier_free=False, shift=3.0)  # guidance that takes no second pass
    assert evals.sampler(plain, embedded).model_evals == 6


def test_the_reference_gets_half_of_the_budget_for_its_guidance() -> None:
    judge = Judge(peaked)
    found = Tuner(judge, PROMPTS, SEEDS, FLOW, 128).tune_guidance(Place(Rival("euler"), 50, 50))
    assert found.chosen == "euler?guidance_scale=2.475" and found.images <= 64
    assert {sampler.model_evals for sampler, _ in judge.drawn} == {50}


def test_settings_without_finite_pictures_are_left_out() -> None:
    def broken(drawings):
        if any(scale(sampler) < 4 for sampler, _, _ in drawings):
            raise ModelError("not finite")
        return [np.array([-scale(s)] * len(prompts), np.float32) for s, prompts, _ in drawings]

    found = Tuner(broken, PROMPTS, SEEDS, FLOW, 128).tune(Place(Rival("euler_no_zero"), 6, 12))
    assert Rival.parse(found.chosen).guidance_scale == pytest.approx(
        4.162, abs=0.002
    )  # 4.95 in the ladder, then a finer step
    with pytest.raises(ModelError, match="not finite"):
        Tuner(broken, PROMPTS, SEEDS, FLOW, 128).tune(Place(Rival("euler", guidance_scale=3.0), 6, 12))


def test_a_race_goes_on_with_the_best_alone() -> None:
    rivals = [Rival("euler", guidance_scale=float(i)) for i in range(1, 8)]
    sizes: dict[float, int] = {}

    def draw(heats):
        for rival, part in heats:
            sizes[rival.guidance_scale] = part.stop
        return [np.full(part.stop - part.start, r.guidance_scale, np.float32) for r, part in heats]

    race = Race(draw, 48)
    assert race.run(rivals, 10**6) == rivals[-1]
    assert sizes == {1.0: 4, 2.0: 4, 3.0: 4, 4.0: 4, 5.0: 12, 6.0: 24, 7.0: 24} and race.images == 4 * 4 + 12 + 2 * 24
    assert race.run(rivals, 10**6) == rivals[-1] and race.images == 4 * 4 + 12 + 2 * 24  # nothing is drawn twice


@pytest.mark.parametrize(("scope", "form"), [(FLOW, "flow"), (VE, "ve")])
def test_everything_that_is_tried_exists(scope: Scope, form: str) -> None:
    for name in ("euler", "euler_no_zero", "heun", "edm", "ipndm", "dpmpp2m", "unipc", "deis"):
        place = Place(Rival(name), 6, 12)
        tried = [rival for candidates in rounds(scope, place) for rival in candidates(place.rival)]
        require_rivals([rival.text for rival in tried], form)
        assert len(set(tried)) == len(tried) and place.rival not in tried
        assert all(place.sampler(rival, scope).model_evals >= 6 for rival in tried)


def test_the_ladder_of_guidance() -> None:
    scales = [rival.guidance_scale for rival in guidances(FLOW, Rival("euler"))]
    assert scales == pytest.approx([9.899, 4.95, 3.5, 2.475, 1.75, 1.0])
    assert [r.guidance_scale for r in guidances(Scope("flow", 1.0, True), Rival("euler"))] == pytest.approx([1.414])


def test_prompts_that_overlap_are_refused() -> None:
    require_apart(["a", "b"], ["c"])
    with pytest.raises(ConfigError, match=r"2 validation prompts are test prompts too, such as 'b'.*tune=false"):
        require_apart(["a", "b", "c"], ["c", "b"])


def test_what_was_chosen_is_written_and_told() -> None:
    scores = {"euler": np.arange(5, dtype=np.float32), "unipc": np.arange(1, 6, dtype=np.float32)}
    rows = [Row(baseline(name, 6), {"clip": values}, 0.1) for name, values in scores.items()]
    tuned = Tuned(chosen="unipc@model?guidance_scale=2.5", images=150, candidates=12)
    key = rows[1].sampler.key
    found = Comparison(
        "test", tuple("abcde"), (1, 2, 3, 4, 5), tuple(rows), ("euler-6",), tuned={key: tuned}
    ).evaluation
    assert Evaluation.model_validate_json(found.model_dump_json()).solvers[1].tuned == tuned
    told = about_table(found)
    assert "at most 150 validation pictures each. UniPC (6 evaluations): schedule model, guidance scale 2.5." in told
