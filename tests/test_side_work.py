"""Pictures beside training: a few batches at a time at the driver, in any order, with the results of all at once."""

import weakref

import numpy as np
import pytest

from epd_ray.actors.pipeline import TASKS_AHEAD, Outcome
from epd_ray.actors.tasks import Task
from epd_ray.drawing.sampler import Sampler, baseline
from epd_ray.embedded.scenes import distinct_scenes, render
from epd_ray.evaluation.comparison import SceneJudge, accuracy
from epd_ray.evaluation.records import SCENE_ACCURACY
from epd_ray.rdpo.side_work import SideWork
from epd_ray.rewards.mixing import Mixer
from epd_ray.runs import distill as distill_run
from epd_ray.runs.compare import Contest, comparison
from epd_ray.storage.run_directory import RunDirectory
from epd_ray.types import Sampled
from tests.fakes import Quiet, drawn

PROMPTS, SEEDS = [f"prompt {i}" for i in range(200)], list(range(200))
EULER = baseline("euler", 2)
BATCH = 4


def all_at_once(algo, prompts, seeds):
    """Scores and pictures where every task is submitted before the first answer is taken."""
    tasks = [
        Task(f"t{i}", "sample", (EULER, tuple(prompts[i : i + BATCH]), tuple(seeds[i : i + BATCH])),
             tuple(prompts[i : i + BATCH]), tuple(map(str, range(i, i + BATCH))), score=True, keep_images=True)
        for i in range(0, len(prompts), BATCH)
    ]  # fmt: skip
    algo._pipeline.submit(tasks)
    outcomes = algo._pipeline.collect([task.task_id for task in tasks])
    return np.concatenate([o.scores["sim"] for o in outcomes]), np.concatenate([o.images for o in outcomes])


@pytest.mark.parametrize("actors", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_driver_holds_a_few_batches_and_scores_are_those_of_all_at_once(build, monkeypatch, actors):
    algo = build(f"cluster.rollout_actors={actors}", "cluster.rollout_cpus=0.25", f"cluster.images_per_job={BATCH}")
    bound = TASKS_AHEAD * max(1, actors) * BATCH
    assert algo.images_at_once == bound
    under_way, alive, peaks, parts = [0], [0], [0, 0], {}
    submit = algo._pipeline.submit

    def spy(tasks):
        tasks = list(tasks)
        under_way[0] += sum(len(task.prompts) for task in tasks)
        peaks[0] = max(peaks[0], under_way[0])
        submit(tasks)

    def forget(count):
        alive[0] -= count

    def take(first, images):
        alive[0] += len(images)
        peaks[1] = max(peaks[1], alive[0])
        weakref.finalize(images, forget, len(images))
        under_way[0] -= len(images)
        parts[first] = images.copy()

    with monkeypatch.context() as patch:
        patch.setattr(algo._pipeline, "submit", spy)
        found = algo.sample_scored(EULER, PROMPTS, SEEDS, take)
    assert 0 < peaks[0] <= bound and 0 < peaks[1] <= bound
    scores, images = all_at_once(algo, PROMPTS, SEEDS)
    assert np.array_equal(found.scores["sim"], scores) and np.array_equal(found.reward, scores)
    assert np.array_equal(np.concatenate([parts[i] for i in sorted(parts)]), images)
    assert np.array_equal(drawn(algo, EULER, PROMPTS[:10], SEEDS[:10])[1], images[:10])


class Backwards:
    """A pipeline whose tasks end in the opposite order; scores and pictures show the prompt's number."""

    runners = ()

    def stream(self, tasks):
        for task in reversed(list(tasks)):
            numbers = np.array([int(prompt.split()[1]) for prompt in task.prompts])
            images = np.broadcast_to(numbers[:, None, None, None], (len(numbers), 3, 2, 2)).astype(np.uint8)
            yield (
                task,
                Outcome(None, {"sim": numbers.astype(np.float32)}, images if task.keep_images else None, 0.5, {}),
            )


def backwards(heads=("sim",)):
    return SideWork(Backwards(), BATCH, heads, Mixer(dict.fromkeys(heads, 1.0), {"sim": "simulated"}, "none"))


def test_results_are_in_the_order_of_the_prompts():
    parts = []
    found = backwards().sample_scored(EULER, PROMPTS[:10], SEEDS[:10], lambda *part: parts.append(part))
    assert found.scores["sim"].tolist() == found.reward.tolist() == list(range(10)) and found.seconds == 1.5
    assert [first for first, _ in parts] == [8, 4, 0]
    assert all(images[:, 0, 0, 0].tolist() == list(range(10))[first : first + BATCH] for first, images in parts)
    assert np.isnan(backwards(()).sample_scored(EULER, PROMPTS[:3], SEEDS[:3], None).reward).all()


def test_scenes_are_judged_batch_by_batch_as_all_at_once():
    scenes = distinct_scenes("test", 10, 0, 0.5)
    images = (render(scenes[:8] + scenes[:2], np.random.default_rng(0)) * 255).round().astype(np.uint8)
    judge = SceneJudge(scenes)
    for first in (8, 0, 4):
        judge.see(first, images[first : first + BATCH])
    whole = accuracy(scenes, images)
    assert np.array_equal(judge.values[SCENE_ACCURACY], whole) and 0 < whole.sum() < 10
    for nothing in (SceneJudge(None), SceneJudge(scenes)):
        nothing.see(0, np.zeros((10, 3, 8, 8), np.uint8))  # of another size
        assert nothing.values == {}


def test_a_comparison_takes_turns_and_saves_the_first_pictures_as_they_come(tmp_path):
    from PIL import Image

    run, quiet, slow = RunDirectory(tmp_path), Quiet(), baseline("euler", 4)
    who = Contest([EULER, slow], 2 * BATCH)
    found = comparison(backwards().sample_scored, who, PROMPTS[:10], SEEDS[:10], "test", run, 6, quiet)
    assert quiet.stages == ["comparing"]
    names = [f"{sampler.label} ({sampler.model_evals} evaluations)" for sampler in who.samplers]
    assert quiet.items == names * 2  # 8 prompts of each, and then 2
    for row in found.rows:
        assert row.values["sim"].tolist() == list(range(10))
        saved = sorted((run.samples / row.sampler.key).glob("*.png"))
        assert [path.name for path in saved] == [f"00{i}.png" for i in range(6)]
        assert [Image.open(path, formats=["PNG"]).getpixel((0, 0)) for path in saved] == [(i, i, i) for i in range(6)]


def test_the_time_of_a_picture_is_the_median_of_full_turns(tmp_path):
    seconds = iter([4.0, 8.0, 400.0, 8.0, 4.0, 8.0, 90.0, 90.0])

    def draw(sampler, prompts, seeds, on_images):
        return Sampled({"sim": np.zeros(len(prompts), np.float32)}, np.zeros(len(prompts), np.float32), next(seconds))

    who = Contest([EULER, baseline("euler", 4)], 4)
    found = comparison(draw, who, PROMPTS[:14], SEEDS[:14], "test", RunDirectory(tmp_path), 0, Quiet())
    assert [row.seconds_per_image for row in found.rows] == [1.0, 2.0]


class Shifted:
    """Its sampler "2" draws pictures that are 51 brighter than those of the others."""

    images_at_once = 2 * BATCH

    def __init__(self):
        self.asked = []

    def sample_scored(self, sampler, prompts, seeds, on_images):
        self.asked.append((sampler.key, len(prompts)))
        for first in reversed(range(0, len(prompts), BATCH)):
            part = np.asarray(seeds[first : first + BATCH], np.uint8)[:, None, None, None]
            on_images(first, np.broadcast_to(part + 51 * (sampler.key == "2"), (len(part), 3, 2, 2)).astype(np.uint8))
        return Sampled({}, np.zeros(len(prompts), np.float32), 0.0)


def test_distances_hold_the_teachers_pictures_of_a_part_alone():
    algo, (teacher, one, two) = Shifted(), (Sampler("euler", 2, key, key) for key in ("teacher", "1", "2"))
    quiet = Quiet()
    same, brighter = distill_run._distances(algo, teacher, [one, two], PROMPTS[:18], SEEDS[:18], quiet)
    assert same.tolist() == [0.0] * 18 and brighter.tolist() == pytest.approx([0.2] * 18)
    assert algo.asked == [(key, size) for size in (8, 8, 2) for key in ("teacher", "1", "2")]
    assert quiet.stages == ["comparing"]
