"""Suites without Ray: which samplers they hold, what their results are of, and what is made of the rows."""

import csv
import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import stats

from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import BackboneFacts
from epd_ray.errors import ConfigError, RunDirectoryError, TableError
from epd_ray.evaluation.statistics import Interval, mean_over_seeds
from epd_ray.evaluation.suites.definition import (
    FID_METRIC,
    Line,
    Suite,
    comparison_suite,
    fid_suite,
    paper_suite,
    pick_table,
)
from epd_ray.evaluation.suites.directory import Manifest, ResultsDirectory
from epd_ray.evaluation.suites.measure import (
    DIVERSITY,
    FEATURES,
    SHARPNESS,
    feature_rows,
    rows,
    speed,
    summarise,
    timing,
)
from epd_ray.evaluation.suites.output import notes
from epd_ray.evaluation.suites.paper import FID_TABLES, REWARD_TABLES, fid_table, reward_table
from epd_ray.evaluation.suites.seeds import over_seeds, seeds_grid
from epd_ray.evaluation.suites.settings import Request, load_settings
from epd_ray.evaluation.suites.solvers import keep_solvers, open_solvers, runs_of, sources_of
from epd_ray.evaluation.suites.subject import Pictures
from epd_ray.evaluation.suites.tables import as_csv, differences, grid, markdown, tabulate
from epd_ray.evaluation.verdict import verdicts
from epd_ray.rdpo.config import placement
from epd_ray.rdpo.session import rdpo_config
from epd_ray.runs.stage_one import made_by
from epd_ray.solvers import Solver, SolverTable

SCENES = (
    "a large red circle in the center on a white background",
    "a small blue star in the center on a black background",
)


def facts(family: str = "sd", resolution: int = 512, form: str = "ve") -> BackboneFacts:
    return BackboneFacts(family, f"a/{family}", form, (1.0, 0.5, 0.1), 7.5, family == "sd", {"resolution": resolution})


def learned(intervals: int = 10, order: int = 1, afs: bool = False, key: str = "epd-a") -> Sampler:
    half = torch.full((intervals, 2), 0.5, dtype=torch.float64)
    table = SolverTable(torch.tensor([[0.25, 0.75]], dtype=torch.float64).repeat(intervals, 1), half)
    return Sampler("epd", intervals, key, "EPD-Solver", table, afs, order)


# -- the papers' tables -----------------------------------------------------------------------------------------------


def test_tables_are_the_papers():
    lines = reward_table("sd3_512")
    assert (lines[-1].method, lines[-1].steps, lines[-1].schedule, lines[-1].parallel_nfe) == (
        "EPD-Solver", 10, "shift", 20,
    )  # fmt: skip
    assert lines[-1].values == {
        "hpsv2.1": 0.2742, "pickscore": 21.9514, "imagereward": 0.7856, "clip": 0.2813, "aesthetic": 5.2743,
    }  # fmt: skip
    assert [len(reward_table(name)) for name in REWARD_TABLES] == [13, 9, 9]
    assert fid_table("cifar10_32")["EPD-Solver"] == {3: 10.4, 5: 4.33, 7: 2.82, 9: 2.49}
    assert all(len(fid_table(name)) == 11 for name in FID_TABLES)
    with pytest.raises(ConfigError, match=r"'sd15_256'.*'sd15_512'"):
        reward_table("sd15_256")


def test_the_table_follows_from_family_and_resolution():
    assert pick_table(facts("sd", 512)) == "sd15_512"
    assert [pick_table(facts("sd3", size)) for size in (512, 1024)] == ["sd3_512", "sd3_1024"]
    with pytest.raises(ConfigError, match=r"sd at 768 .*--table.*sd15_512"):
        pick_table(facts("sd", 768))


# -- which samplers ---------------------------------------------------------------------------------------------------


def test_paper_suite_keeps_the_papers_lines():
    suite = paper_suite("sd15_512", [learned()])
    published = reward_table("sd15_512")
    assert [(line.method, line.steps, line.parallel_nfe) for line in suite.lines] == [
        (line.method, line.steps, line.parallel_nfe) for line in published
    ]
    for line in suite.lines:
        assert line.sampler is not None
        assert (line.sampler.intervals, line.sampler.parallel_nfe) == (line.steps, line.parallel_nfe)
    assert [line.published for line in suite.lines] == [line.values for line in published]
    assert len({sampler.key for sampler in suite.samplers}) == len(suite.lines)  # also those that differ by schedule
    assert not any(sampler.ends_at_zero for sampler in suite.samplers)  # as in the papers' code
    assert suite.reference is not None and (suite.reference.kind, suite.reference.intervals) == ("euler", 50)


def test_a_solver_of_another_depth_has_no_paper_value_beside_it():
    suite = paper_suite("sd3_512", [learned(8)])
    *_, ours, papers = suite.lines
    assert (ours.parallel_nfe, ours.published, papers.method, papers.sampler) == (16, {}, "EPD-Solver", None)
    assert papers.published["clip"] == 0.2813


def test_fid_suite_runs_what_is_here_and_shows_the_rest():
    ours = [learned(2, afs=True, key="epd-3"), learned(3, afs=True, order=4, key="epd-5")]
    suite = fid_suite("cifar10_32", ours)
    drawn = {(line.method, line.parallel_nfe): line.sampler for line in suite.lines}
    assert len(drawn) == 44
    assert drawn["EPD-Solver", 3] is ours[0] and drawn["EPD-Plugin", 5] is ours[1]
    assert drawn["EPD-Solver", 5] is None and drawn["EPD-Plugin", 3] is None
    for method in ("AMED-Solver", "AMED-Plugin", "ParaDiGMS"):
        assert all(drawn[method, nfe] is None for nfe in (3, 5, 7, 9))
    rivals = {"DDIM": ("euler", 3), "EDM": ("heun", 2), "DPM-Solver-2": ("dpm2", 2), "UniPC": ("unipc3", 3)}
    rivals |= {"iPNDM": ("ipndm", 3), "DPM-Solver++(3M)": ("dpmpp3m", 3)}
    for method, (kind, intervals) in rivals.items():
        found = [drawn[method, n] for n in (3, 5, 7, 9)]
        assert [(s.kind, s.parallel_nfe, s.ends_at_zero) for s in found] == [(kind, n, False) for n in (3, 5, 7, 9)]
        assert {s.schedule for s in found} == {"logsnr" if kind in ("unipc3", "dpmpp3m") else "polynomial"}
        assert (found[0].intervals, found[0].afs) == (intervals, intervals == 2)
    with pytest.raises(ConfigError, match=r"NFE 20,.* 3, 5, 7, 9"):
        fid_suite("cifar10_32", [learned()])
    twice = [learned(2, afs=True, key="epd-3-a"), learned(2, afs=True, key="epd-3-b")]
    with pytest.raises(ConfigError, match=r"NFE 3,"):
        fid_suite("cifar10_32", twice)


def test_comparison_suite_holds_every_rival_at_both_costs():
    suite = comparison_suite("prompts", ["euler", "dpm2"], [learned(3)])
    assert {(s.kind, s.parallel_nfe) for s in suite.samplers} == {
        ("epd", 6), ("euler", 6), ("dpm2", 6), ("euler", 9), ("dpm2", 10), ("euler", 50),
    }  # fmt: skip
    suite = comparison_suite("prompts", ["heun@logsnr", "heun"], [learned(3)])
    assert {(line.sampler.key, line.schedule) for line in suite.lines if line.sampler.kind == "heun"} == {
        ("heun-logsnr-6", "logsnr"), ("heun-6", None), ("heun-logsnr-10", "logsnr"), ("heun-10", None),
    }  # fmt: skip
    assert suite.samplers[0] is suite.ours[0] and suite.reference is not None and suite.reference.intervals == 50


def test_solvers_are_known_by_what_they_are(tmp_path):
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    runs = tmp_path / "runs"
    places = [*(runs / name / "solver" for name in ("first", "again", "other")), runs / "other" / "distilled"]
    for place, position in zip(places, (0.2, 0.2, 0.3, 0.4), strict=True):
        table = SolverTable(torch.tensor([[position, 0.8]] * 2, dtype=torch.float64), half)
        Solver(table, torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64), "ve").save_pretrained(place)
    found = open_solvers(sources_of([str(place) for place in places], tmp_path / "kept"), facts())
    assert [s.label for s in found] == ["EPD-Solver first", "EPD-Solver other", "EPD-Solver other/distilled"]
    assert len({s.key for s in found}) == 3
    with pytest.raises(TableError, match=r"sd3, .* sd"):
        open_solvers({"sd3-512-rl": "sd3-512-rl"}, facts())


def test_kept_solvers_are_the_same_under_the_same_names(tmp_path):
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    places = [tmp_path / run / name for run in ("mine", "yours/mine") for name in ("solver", "distilled")]
    for i, place in enumerate(places):
        table = SolverTable(torch.tensor([[0.1 * (i + 1), 0.8]] * 2, dtype=torch.float64), half)
        Solver(table, torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64), "ve").save_pretrained(place)
    kept = tmp_path / "kept"
    sources = sources_of([str(place) for place in places] + ["sd15-rl"], kept)
    keep_solvers(sources, kept)
    keep_solvers(sources_of([], kept), kept)
    again, before = open_solvers(sources_of([], kept), facts()), open_solvers(sources, facts())
    assert {s.key for s in again} == {s.key for s in before} and len(again) == len(before) == 5
    labels = {s.key: s.label for s in before}
    assert all(s.label.startswith(labels[s.key]) for s in again)
    (alone,) = open_solvers({str(places[0]): "mine", str(kept / "mine"): "mine"}, facts())
    assert alone.label == "EPD-Solver"


# -- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"suite": "paper", "table": "cifar10_32"},
            "--table is 'cifar10_32', with --suite paper it takes sd15_512, sd3",
        ),
        ({"suite": "embedded", "solvers": ("a",), "table": "sd3_512"}, "is for the suites paper and paper-fid"),
        ({"suite": "paper-fid"}, "needs --table: cifar10_32"),
        ({"suite": "paper-fid", "table": "cifar10_32"}, "needs --reference"),
        ({"suite": "paper-fid", "images_per_prompt": 2}, "draws without prompts"),
        ({"suite": "prompts", "solvers": ("a",)}, "needs a file"),
        ({"suite": "embedded"}, "give --solver"),
        ({"suite": "paper", "images_per_prompt": 0}, "--images-per-prompt is 0, at least 1"),
        ({"suite": "paper", "features": "shapes-clip"}, "give --images-per-prompt 2 or more, or --reference"),
    ],
)
def test_requests_that_cannot_be(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        Request(out=tmp_path, **options)


def test_settings_use_the_guidance_and_the_heads_of_the_suite(tmp_path):
    assert load_settings("embedded", None, []).backbone.guidance_scale is None
    assert load_settings("embedded", None, ["backbone.guidance_scale=7.0"]).backbone.guidance_scale == 7.0
    file = tmp_path / "mine.yaml"
    file.write_text("backbone: {model: a/b, guidance_scale: 3.5}\nrewards: {clip: {head: clip}}\n")
    assert load_settings("paper", file, []).backbone.guidance_scale == 3.5
    assert load_settings("paper-fid", None, ["backbone.model=a/b"]).rewards == {}
    with pytest.raises(ConfigError, match=r"--suite embedded.*backbone.model is 'a/b'"):
        load_settings("embedded", None, ["backbone.model=a/b"])


EVERY_HEAD = {name: name for name in ("pickscore", "imagereward", "clip", "aesthetic")} | {"hpsv2": "hpsv2.1"}


def heads_of(suite: str, path: Path | None, *overrides: str) -> dict[str, str]:
    return {name: head.head for name, head in load_settings(suite, path, overrides).rewards.items()}


def test_the_papers_columns_all_have_their_heads(tmp_path):
    assert heads_of("paper", None, "backbone.model=a/b") == EVERY_HEAD
    file = tmp_path / "mine.yaml"
    file.write_text(
        "backbone: {model: a/b}\nrewards: {hps: {head: hpsv2.1, num_gpus: 0.2}, clip: {num_cpus: 1},"
        " pickscore: {head: mps}}\n"
    )
    rest = {"hps": "hpsv2.1", "pickscore": "mps", "paper_pickscore": "pickscore"}
    assert heads_of("paper", file) == {k: v for k, v in EVERY_HEAD.items() if k not in ("hpsv2", *rest)} | rest
    merged = load_settings("paper", file, ["rewards.aesthetic.num_gpus=0.1"]).rewards
    assert (merged["hps"].num_gpus, merged["clip"].num_cpus, merged["aesthetic"].num_gpus) == (0.2, 1, 0.1)
    assert merged["aesthetic"].head == "aesthetic"
    assert heads_of("paper", file, "rewards={clip: {head: clip}}") == {"clip": "clip"}  # the command line has the word
    shipped = Path(__file__).parent.parent / "jobs" / "configs" / "sd3_1024.yaml"
    assert heads_of("paper", shipped) == EVERY_HEAD
    assert load_settings("paper", shipped, []).rewards["clip"].num_gpus == 0.1


def test_own_prompts_are_scored_by_every_head_unless_one_is_named(tmp_path):
    other = "backbone.model=a/b"
    assert heads_of("prompts", None, other) == heads_of("prompts", None, other, "rewards.hpsv2.weight=0") == EVERY_HEAD
    assert heads_of("prompts", None) == {"clip": "clip"}
    assert load_settings("prompts", None, []).rewards["clip"].options == {"model": "shapes-clip"}
    for override in ("rewards.pick.head=pickscore", "rewards={pick: {head: pickscore}}"):
        assert heads_of("prompts", None, other, override) == {"pick": "pickscore"}
    assert heads_of("prompts", None, other, "rewards.clip.head=clip") == {"clip": "clip"}
    file = tmp_path / "mine.yaml"
    file.write_text("backbone: {model: a/b}\nrewards: {clip: {head: clip}}\n")
    assert heads_of("prompts", file) == {"clip": "clip"}
    file.write_text("rewards: [clip]\n")
    with pytest.raises(ConfigError, match="rewards: is \\['clip'\\]"):
        load_settings("paper", file, [])


def test_a_suites_actors_fit_two_cores():
    for suite in ("paper", "prompts"):
        config = load_settings(suite, None, ["backbone.model=a/b", "cluster.learner_actors=0"])
        asked = placement(rdpo_config(config, ["a"]))
        assert [len(asked[what]) for what in ("rollout actors", "reward actors")] == [2, 5]
        assert sum(bundle["CPU"] for bundles in asked.values() for bundle in bundles) == pytest.approx(2)


# -- results ----------------------------------------------------------------------------------------------------------

MANIFEST = Manifest({"model": {"resolution": 512}, "prompts": {"sha256": "a"}}, {"euler-6": {"sha256": "1"}})


def test_results_of_another_model_or_prompt_set_are_refused(tmp_path):
    results = ResultsDirectory(tmp_path / "out")
    results.prepare()
    results.claim(MANIFEST)
    before = results.manifest.read_text()
    for sections, said in (
        ({"model": {"resolution": 1024}}, "model.resolution was 512, now 1024"),
        ({"prompts": {"sha256": "b"}}, 'prompts.sha256 was "a", now "b"'),
        ({"features": {"model": "x"}}, 'features.model was null, now "x"'),
    ):
        with pytest.raises(RunDirectoryError, match=said):
            results.claim(replace(MANIFEST, sections={**MANIFEST.sections, **sections}))
    with pytest.raises(RunDirectoryError, match="sampler euler-6 was another one"):
        results.claim(replace(MANIFEST, samplers={"euler-6": {"sha256": "2"}}))
    assert results.manifest.read_text() == before


def test_samplers_may_be_added(tmp_path):
    results = ResultsDirectory(tmp_path / "out")
    results.prepare()
    results.claim(MANIFEST)
    results.claim(replace(MANIFEST, samplers={"epd-a": {"sha256": "3"}}))
    results.claim(MANIFEST)
    with pytest.raises(RunDirectoryError, match="sampler epd-a"):
        results.claim(replace(MANIFEST, samplers={"epd-a": {"sha256": "4"}}))


def test_a_directory_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunDirectoryError, match=r"'thesis\.tex'.*--out"):
        ResultsDirectory(tmp_path).prepare()
    with pytest.raises(RunDirectoryError, match="is a file"):
        ResultsDirectory(tmp_path / "thesis.tex").prepare()


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9, "samplers": {}}'])
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    results = ResultsDirectory(tmp_path)
    results.prepare()
    with pytest.raises(RunDirectoryError, match=r"manifest.json"):
        results.claim(MANIFEST)


def test_shards_are_whole_or_not_there(tmp_path):
    results = ResultsDirectory(tmp_path)
    results.add("euler-6", 1, pa.table({"x": [1.0]}))
    assert (results.has("euler-6", 1), results.has("euler-6", 0), results.has("heun-6", 1)) == (True, False, False)
    (results.scores / "euler-6" / ".000000.parquet.tmp").write_bytes(b"half")
    assert not results.has("euler-6", 0)
    (results.scores / "euler-6" / "000002.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(RunDirectoryError, match=r"000002\.parquet"):
        results.read("euler-6", [1, 2])


# -- what is made of the rows -----------------------------------------------------------------------------------------


class Brightness:
    """An extractor: mean of red, green, blue, and 1."""

    model_id, revision, dimension = "brightness", "1", 4

    def features(self, images):
        means = images.reshape(len(images), 3, -1).mean(axis=2)
        return np.concatenate([means, np.ones((len(images), 1))], axis=1).astype(np.float32)


PICTURES = Pictures(("a", "b", "a"), 2, tuple(range(6)), images_per_job=4)


def drawn(results: ResultsDirectory, key: str, values: list[float], seconds: float, session: str = "s") -> None:
    rng = np.random.default_rng(len(key))
    for shard in PICTURES.shards:
        members = PICTURES.shard(shard)
        images = rng.integers(256, size=(len(members), 3, 8, 8)).astype(np.uint8)
        scores = {"clip": np.array([values[i] for i in members], np.float32)}
        results.add(key, shard, rows(PICTURES, shard, images, scores, seconds * len(members), session, Brightness()))


@pytest.fixture
def measured(tmp_path):
    results = ResultsDirectory(tmp_path)
    suite = comparison_suite("prompts", [], [learned(3)])
    drawn(results, "epd-a", [1.0, 3.0, 5.0, 5.0, 0.0, 2.0], 0.1)
    drawn(results, "euler-50", [1.0, 1.0, 4.0, 4.0, 0.0, 0.0], 0.5)
    return suite, results


def test_pictures_of_a_prompt_are_neighbours_and_shards_cover_them():
    assert [list(PICTURES.shard(s)) for s in PICTURES.shards] == [[0, 1, 2, 3], [4, 5]]
    assert [PICTURES.prompt_of(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert not PICTURES.judged
    assert replace(PICTURES, prompts=SCENES).judged


def test_rows_hold_every_picture(measured):
    _, results = measured
    table = results.read("epd-a", PICTURES.shards)
    assert table["prompt"].to_pylist() == ["a", "a", "b", "b", "a", "a"]
    assert table["prompt_id"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert table["image"].to_pylist() == [0, 1] * 3
    assert table["noise_seed"].to_pylist() == list(range(6))
    assert table["shard"].to_pylist() == [0] * 4 + [1] * 2
    assert feature_rows(table).shape == (6, 4)
    assert (feature_rows(table)[:, 3] == 1).all()


def test_a_prompt_counts_once_and_twice_the_same_prompt_twice(measured):
    suite, results = measured
    summary = summarise(suite, PICTURES, results, None)
    ours = summary.comparison.rows[0]
    assert ours.values["clip"].tolist() == [2.0, 5.0, 1.0]
    assert {SHARPNESS, DIVERSITY} < set(ours.values)
    assert ours.values[DIVERSITY].shape == (3,)
    assert ours.seconds_per_image == pytest.approx(0.1)
    (difference,) = [d for d in summary.comparison.differences if d.metric == "clip"]
    assert (difference.solver, difference.against) == ("epd-a", "euler-50")
    assert difference.interval.mean == pytest.approx(1.0)


def test_the_headline_says_what_is_bought(measured):
    suite, results = measured
    summary = summarise(suite, PICTURES, results, None, 4.5, True)
    (verdict,) = verdicts(summary.comparison.evaluation, timing(summary.times))
    (reference,) = verdict.against
    assert reference.speed is not None and reference.speed.ratio == pytest.approx(0.2)
    assert reference.differences == {"clip": Interval(1.0, 1.0, 1.0)}  # and not sharpness, of which more is no gain
    assert verdict.sentence == (
        "On 3 prompts at guidance scale 4.5, EPD-Solver (parallel NFE 6, 9 evaluations, 18 network passes) is better "
        "than 50 steps of DDIM / Euler in clip (+1.000 [+1.000, +1.000]), and takes 100 ms per picture against 500 ms."
    )


def test_times_of_different_calls_are_not_spoken_of(measured):
    suite, results = measured
    summary = summarise(suite, PICTURES, results, None, 4.5)
    (verdict,) = verdicts(summary.comparison.evaluation, lambda ours, other: None)
    assert verdict.against[0].speed is None and " ms" not in verdict.sentence


def test_times_of_different_sessions_are_not_compared():
    assert speed({("a", 0): 0.1, ("b", 1): 9.0}, {("a", 0): 0.4, ("c", 1): 9.0}).ratio == pytest.approx(0.25)
    assert speed({("a", 0): 0.1}, {("b", 0): 0.4}) is None


def test_the_papers_value_stands_beside_ours(measured):
    suite, results = measured
    line = replace(suite.lines[0], published={"clip": 2.0, "hpsv2.1": 0.25})
    suite = Suite("paper", "sd15_512", (line, *suite.lines[1:]), suite.ours, suite.reference)
    table = tabulate(suite, summarise(suite, PICTURES, results, None, 4.5, True), {"clip": "clip"})
    cell = table.rows[0].cells["clip"]
    assert cell.ours.mean == pytest.approx(8 / 3) and cell.difference.mean == pytest.approx(2 / 3)
    assert (cell.difference.low, cell.difference.high) == (cell.ours.low - 2.0, cell.ours.high - 2.0)
    assert table.metrics["hpsv2.1"] == "HPSv2.1" and table.rows[0].cells["hpsv2.1"].ours is None
    header, ours, paper, difference, *_ = grid(table)
    column = header.index("CLIP")
    assert (
        ours[column].startswith("2.6667 [") and paper[column] == "2.0000" and difference[column].startswith("+0.6667")
    )
    assert paper[header.index("HPSv2.1")] == "0.2500"
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    first = next(row for row in rows if row["metric"] == "clip")
    assert [first[name] for name in ("sampler", "parallel_nfe", "model_evals", "network_passes", "published")] == [
        "epd-a", "6", "9", "18", "2.0"
    ]  # fmt: skip
    assert ours[header.index("network passes")] == "18"
    assert markdown(grid(table))[1].count("---") == len(header)


def test_differences_name_both(measured):
    suite, results = measured
    header, row = differences(summarise(suite, PICTURES, results, None))
    assert row[0] == "EPD-Solver (parallel NFE 6) minus DDIM / Euler (parallel NFE 50)"
    assert row[header.index("clip")].startswith("+1.0000")


@pytest.fixture
def of_three_seeds(tmp_path):
    """A suite with three solvers of one run's settings, and their shards."""
    results, keys = ResultsDirectory(tmp_path), ["epd-a", "epd-b", "epd-c"]
    suite = comparison_suite("prompts", [], [learned(3, key=key) for key in keys])
    for key, off in zip(keys, (-0.5, 0.0, 0.5), strict=True):
        drawn(results, key, [value + off for value in (1.0, 3.0, 5.0, 5.0, 0.0, 2.0)], 0.1)
    drawn(results, "euler-50", [1.0, 1.0, 4.0, 4.0, 0.0, 0.0], 0.5)
    return suite, results, keys


def test_runs_that_differ_in_their_seed_are_summed_up_over_seeds_and_prompts(of_three_seeds):
    suite, results, keys = of_three_seeds
    comparison = summarise(suite, PICTURES, results, None, 4.5, True).comparison
    (group,) = over_seeds([keys, ["epd-alone"]], comparison)
    by_prompt = np.array([2.0, 5.0, 1.0]) + np.array([[-0.5], [0.0], [0.5]])
    assert group.means["clip"] == mean_over_seeds(by_prompt, same_prompts=True)
    gain = group.differences["euler-50"]["clip"]
    half = stats.t.ppf(0.975, 2) * 0.5 / math.sqrt(3)  # 1 on each prompt: only the seeds differ
    assert (gain.mean, gain.low, gain.high) == pytest.approx((1.0, 1.0 - half, 1.0 + half))
    header, mean, difference = seeds_grid([group], comparison)
    assert mean[0] == "3 seeds of EPD-Solver" and difference[0] == "  minus DDIM / Euler (100 network passes)"
    assert difference[header.index("clip")] == f"+1.0000 [{1 - half:+.4f}, {1 + half:+.4f}]"
    assert over_seeds([["epd-a"]], comparison) == [] and group.over == "seeds and prompts"


def test_solver_files_say_which_runs_differ_in_their_seed_alone(tmp_path):
    def save(folder, position, stage, **settings):
        config = RunConfig(**settings)
        table = SolverTable(torch.tensor([[position, 0.9]] * 2), torch.full((2, 2), 0.5))
        known = BackboneFacts("sd", "a/sd", "ve", (1.0, 0.5, 0.1), 7.5, True, {})
        made_by(config, known, table, stage=stage).save_pretrained(tmp_path / folder)
        return str(tmp_path / folder)

    first, second = save("0", 0.1, "rdpo", seed=0), save("1", 0.2, "rdpo", seed=1, name="elsewhere")
    other, start = save("2", 0.3, "rdpo", seed=2, rdpo={"lr": 0.5}), save("3", 0.4, "distilled", seed=0)
    groups = runs_of({source: source for source in (first, second, other, start)})
    assert [len(group) for group in groups] == [2, 1, 1]
    assert groups[0] == [sampler.key for sampler in open_solvers({first: "0", second: "1"}, None)]


def test_frechet_distance_is_to_the_reference(measured):
    from epd_ray.evaluation.metrics.frechet import FeatureStatistics

    suite, results = measured
    reference = FeatureStatistics.of(feature_rows(results.read("euler-50", PICTURES.shards))).gaussian()
    summary = summarise(suite, PICTURES, results, reference)
    assert summary.distances["euler-50"] == pytest.approx(0, abs=1e-6)
    assert summary.distances["epd-a"] > 0
    assert FEATURES not in summary.comparison.rows[0].values


@pytest.mark.parametrize(
    ("is_fid", "pictures", "said", "note"),
    [
        (True, 50_000, "+0.50", None),
        (True, 49_999, "-", "No difference to the paper's FID is shown, because 49,999 pictures"),
        (False, 50_000, "-", "is not an FID, because its features are not Inception's"),
    ],
)
def test_the_distance_is_set_against_the_papers_where_it_is_the_same(measured, is_fid, pictures, said, note):
    suite, results = measured
    line = Line("DDIM", 3, suite.samplers[1], published={FID_METRIC: 1.0})
    suite = Suite("paper-fid", "cifar10_32", (line,), suite.ours, None)
    summary = summarise(suite, PICTURES, results, None)
    drawn = replace(summary.comparison, seeds=tuple(range(pictures)))
    table = tabulate(suite, replace(summary, comparison=drawn, distances={"euler-50": 1.5}), {}, is_fid)
    found = {row[0].strip(): row[1] for row in grid(table)}
    assert (found["DDIM"], found["paper"], found["ours minus paper"]) == ("1.50", "1.00", said)
    assert any(note in line for line in notes(table)) if note else len(notes(table)) == 1
    (row,) = [row for row in csv.DictReader(io.StringIO(as_csv(table))) if row["metric"] == FID_METRIC]
    assert (row["mean"], row["low"], row["high"], row["published"]) == ("1.5", "", "", "1.0")
    ends = (row["difference"], row["difference_low"], row["difference_high"])
    assert ends == ("" if said == "-" else "0.5", "", "")
