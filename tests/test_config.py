import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
import yaml
from pydantic.fields import FieldInfo

from epd_ray.backbones.loading import PipelineOptions
from epd_ray.config.listing import keys_of
from epd_ray.config.loading import load_config, to_yaml
from epd_ray.config.problems import first_change
from epd_ray.config.run_config import RunConfig
from epd_ray.config.sections import BackboneConfig
from epd_ray.config.services import MlflowConfig, RewardConfig, WandbConfig
from epd_ray.config.values import Section
from epd_ray.errors import ConfigError, UnknownNameError


def problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(None, overrides)
    return list(raised.value.problems)


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_defaults_are_the_embedded_run_and_fit_two_cores():
    config = load_config(None)
    assert config == RunConfig()
    assert config.rewards["clip"].options == {"model": "shapes-clip"}
    cluster = config.cluster
    rewards = sum(reward.replicas * reward.num_cpus for reward in config.rewards.values())
    assert cluster.rollout_actors * cluster.rollout_cpus + cluster.learner_cpus + rewards <= 2


def keys() -> dict[str, FieldInfo]:
    """Every key with its dots, those of a reward head and of trackers too."""
    found: dict[str, FieldInfo] = {}
    sections: list[tuple[str, type[Section]]] = [("", RunConfig), ("rewards.<head>.", RewardConfig)]
    sections += [("tracking.wandb.", WandbConfig), ("tracking.mlflow.", MlflowConfig)]
    while sections:
        prefix, section = sections.pop()
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                sections.append((f"{prefix}{name}.", field.annotation))
            else:
                found[f"{prefix}{name}"] = field
    return found


def test_every_key_is_described_in_sentences():
    said = {key: field.description or "" for key, field in keys().items()}
    assert {"seed", "rdpo.lr", "rewards.<head>.head", "tracking.mlflow.experiment", "tracking.wandb"} <= said.keys()
    assert [key for key, text in said.items() if not (text.endswith(".") and text.count(" ") >= 4)] == []
    assert [key for key, text in said.items() if not (text[:1].isupper() or text.startswith("auto"))] == []


def test_the_listing_has_every_key_with_its_default_and_meaning():
    listed = {key.name.replace("<name>", "<head>"): key for key in keys_of()}
    assert listed.keys() == keys().keys()
    for name, field in keys().items():
        assert listed[name].meaning == field.description
        if name != "rewards":
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert json.loads(listed[name].default) == default, name
    assert json.loads(listed["rewards"].default) == {"clip": {"options": {"model": "shapes-clip"}}}
    assert (listed["solver.intervals"].type, listed["solver.intervals"].elsewhere) == ("integer", "10")
    assert listed["rdpo.baseline"].type == "per_prompt | mixed"
    assert listed["cluster.task_timeout_s"].type == "number or null"


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ("store", ["store.images"]),
        ("rdpo.lr", ["rdpo.lr"]),
        ("rewards.sharp.head", ["rewards.<name>.head"]),
        ("tracking.wandb", ["tracking.wandb", "tracking.wandb.project", "tracking.wandb.group"]),
    ],
)
def test_the_listing_of_a_section_or_key(asked: str, names: list[str]):
    assert [key.name for key in keys_of(asked)] == names


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("rpdo", "'rdpo'"),
        ("rdpo.lrr", "'rdpo.lr'"),
        ("lr", "'distill.lr' or 'rdpo.lr'"),
        ("zzzz", "tracking"),
        ("", "rdpo"),
    ],
)
def test_the_listing_names_what_is_near_an_unknown_key(asked: str, near: str):
    with pytest.raises(UnknownNameError, match=f"unknown section or key '{asked}'; .*{near}"):
        keys_of(asked)


BOUND_WORDS = {"ge": "at least {:.15g}", "gt": "above {:.15g}", "le": "at most {:.15g}", "lt": "below {:.15g}"}


def test_descriptions_say_the_bounds_and_what_null_means():
    missing = []
    for key, field in keys().items():
        parts = [field, *(part for part in get_args(field.annotation) if get_origin(part) is Annotated)]
        marks = [mark for part in parts for mark in (part.metadata if part is field else part.__metadata__)]
        marks += [mark for info in marks if isinstance(info, FieldInfo) for mark in info.metadata]
        for mark in marks:
            for bound, words in BOUND_WORDS.items():
                if (value := getattr(mark, bound, None)) is not None and words.format(value) not in field.description:
                    missing.append((key, words.format(value)))
        if type(None) in get_args(field.annotation) and "null" not in field.description:
            missing.append((key, "null"))
    assert missing == []


def test_file_then_overrides(tmp_path):
    path = written(tmp_path, "seed: 3\nrdpo:\n  lr: 1e-3\n  clip: 0.3\nsolver:\n")
    config = load_config(path, ["rdpo.clip=2.5e-1", "evaluation.baselines=[euler]", "rewards.clip.weight=2"])
    assert (config.seed, config.rdpo.lr, config.rdpo.clip) == (3, 1e-3, 0.25)
    assert config.evaluation.baselines == ("euler",)
    assert config.rewards["clip"].weight == 2
    assert config.rewards["clip"].options == {"model": "shapes-clip"}


def test_the_files_heads_replace_the_default_one(tmp_path):
    config = load_config(written(tmp_path, "rewards: {mine: {head: 'a.b:Head', options: {lr: 1e-3}}}"))
    assert list(config.rewards) == ["mine"]
    assert config.rewards["mine"].options == {"lr": 1e-3}


def test_addresses_and_names_without_secrets_are_kept():
    options = "rewards.clip.options={url: 'http://host/x?model=a@b', token_env: MY_TOKEN}"
    names = ["HF_TOKEN", "https_proxy", "WANDB_API_KEY"]
    config = load_config(None, [options, f"cluster.env=[{', '.join(names)}]"])
    assert config.rewards["clip"].options["url"].endswith("a@b") and list(config.cluster.env) == names


def test_resolved_yaml_reads_back(tmp_path):
    config = load_config(None, ["rdpo.lr=1e-7", "name=large-2", "prompts.train='a ü.txt'"])
    assert load_config(written(tmp_path, to_yaml(config))) == config
    assert list(yaml.safe_load(to_yaml(config))) == list(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rdpo.group_size=1", "rdpo.group_size: is 1, at least 2 is needed (leave-one-out"),
        ("solver.points=0", "solver.points: is 0, at least 1 is needed"),
        ("solver.intervals=0", "solver.intervals: is 0, at least 1 is needed"),
        ("solver.order=5", "solver.order: is 5, at most 4 is possible"),
        ("rdpo.lr=0", "rdpo.lr: is 0, more than 0 is needed"),
        ("rdpo.lr=.inf", "rdpo.lr: is inf, expected a finite number"),
        ("rdpo.iterations=true", "rdpo.iterations: is True, expected a valid integer"),
        ("rdpo.iterations='8'", "rdpo.iterations: is '8', expected a valid integer"),
        ("rdpo.minibatch_size=24", "rdpo.minibatch_size: is 24, which does not divide the 32 images of an iteration"),
        ("rdpo.prompts_per_iteration=9", "rdpo.minibatch_size: is 16, which does not divide the 36 images"),
        ("rdpo.baseline=mix", "rdpo.baseline: unknown 'mix'; did you mean 'mixed'?"),
        ("rdpo.gruop_size=4", "rdpo.gruop_size: unknown key; did you mean 'group_size'?"),
        ("group_size=4", "group_size: unknown key; did you mean 'rdpo.group_size'?"),
        ("rpdo.group_size=4", "rpdo: unknown key; did you mean 'rdpo'?"),
        ("rewards.clip.wieght=4", "rewards.clip.wieght: unknown key; did you mean 'weight'?"),
        ("rewards.clip.head=clpi", "rewards.clip.head: unknown reward head 'clpi'; did you mean 'clip'?"),
        ("rewards.clip.replicas=-1", "rewards.clip.replicas: is -1, at least 0 is needed"),
        ("rewards.clip={backend: package, replicas: 0}", "rewards.clip.replicas: is 0, at least 1"),
        ("rewards.clip={replicas: 0, min_replicas: 1}", "rewards.clip.max_replicas: min_replicas 1"),
        (
            "rewards.clip={replicas: 0, max_replicas: 2}",
            "rewards.clip.max_replicas: min_replicas None and",
        ),
        ("rewards.clip.weight=0", "rewards: weights add up to 0, at least one head needs a positive weight"),
        ("rewards={image: {head: imagereward}}", "rewards: 'image' is the name of another column or metric"),
        ("evaluation.baselines=euler", "evaluation.baselines: is 'euler', expected a list, such as [a, b]"),
        ("backbone.model=null", "backbone.model: is null, expected text"),
        ("lr=3", "lr: unknown key; did you mean 'distill.lr' or 'rdpo.lr'?"),
        ("seed=4294967296", "seed: is 4294967296, less than 2147483648 is needed"),
        ("rdpo.clip=1", "rdpo.clip: is 1, less than 1 is needed"),
        ("distill.min_weight=0", "distill.min_weight: is 0, at least 0.001 is needed"),
        ("rewards={}", "rewards: is {}, at least 1 is needed"),
        ("rewards.a b={}", "rewards.a b: is 'a b', expected letters, digits, - and _ alone"),
        ("rewards.clip={low: 1}", "rewards.clip.low: unknown key"),
        ("cluster.rollout_gpus=1.5", "cluster.rollout_gpus: is 1.5, a share of one GPU (below 1) or a whole number"),
        ("rewards.clip.num_gpus=2.5", "rewards.clip.num_gpus: is 2.5, a share of one GPU (below 1) or a whole number"),
        ("rewards.clip.resources={GPU: 1}", "rewards.clip.resources: GPU is no custom resource: set the key for GPUs"),
        ("rewards.clip.options={url: 'http://me:pw@host'}", "rewards.clip.options: url holds a login or token"),
        (
            "rewards.clip.options={url: 'http://host/x?v=1&Api_Key=pw'}",
            "rewards.clip.options: url holds a login or token",
        ),
        ("tracking.mlflow={tracking_uri: 'https://me@host'}", "tracking.mlflow.tracking_uri: holds a login or token"),
        (
            "tracking.mlflow={tracking_uri: 'https://h?token=pw'}",
            "tracking.mlflow.tracking_uri: holds a login or token",
        ),
        ("cluster.env=[HF_HOME, hf_AbCdEf]", "cluster.env: entry 1 is no name of a variable"),
        (f"cluster.env=[{'ab12' * 10}]", "cluster.env: entry 0 is no name of a variable"),
        ("rdpo.normalisation=zscor", "rdpo.normalisation: unknown 'zscor'; did you mean 'zscore'?"),
        (
            "backbone.family=sd33",
            "backbone.family: unknown backbone 'sd33'; known: auto, gaussian, pipeline, simulated",
        ),
        ("backbone.options={a: 1}", "backbone.options: a given, but family auto has its own keys"),
        ("backbone.offload=disk", "backbone.offload: unknown 'disk'; known: model, none, sequential"),
        ("evaluation.baselines=[heunn]", "evaluation.baselines.0: unknown solver 'heunn'; did you mean 'heun'?"),
        (
            "evaluation.baselines=[heun@logsnrr]",
            "evaluation.baselines.0: unknown schedule 'logsnrr'; did you mean 'logsnr'?",
        ),
        ("distill.grid=1", "distill: grid is 1, at least solver.points = 3 is needed"),
        (
            "distill.grid=1000",
            "distill: grid is 1000: least squares would fit 499,500 combinations of 2 positions per interval, at most "
            "200,000 are possible (set distill.grid to 632 or less, or lower solver.points)",
        ),
        ("distill.min_weight=0.5", "distill: min_weight is 0.5, less than 1 / solver.points = 0.333333 is needed"),
        ("cluster.learner_actors=2", "cluster.learner_actors: is 2, at most 1 is possible"),
        ("cluster=3", "cluster: is 3, expected a mapping of keys"),
        (
            "prompts.train=shape",
            "prompts.train: is 'shape', expected 'shapes', 'builtin' or the path of a file (.txt, .csv",
        ),
        ("name=../x", "name: is '../x', expected letters"),
        ("name.x=1", "name.x: name is 'shapes', which has no keys"),
        ("rdpo.lr", "rdpo.lr: expected key=value"),
        ("rdpo..lr=1", "rdpo..lr=1: expected key=value"),
        ("rdpo.lr=[1", "rdpo.lr: '[1' is not YAML: expected ',' or ']'"),
        ("rdpo.lr=2026-99-99", "rdpo.lr: is '2026-99-99', expected a valid number"),
    ],
)
def test_one_wrong_value_gives_one_line(override, said):
    (problem,) = problems(override)
    assert problem.startswith(said)
    assert "\n" not in problem
    assert not any(secret in problem for secret in ("pw", "hf_", "ab12"))


def test_a_start_point_stays_where_it_is():
    with pytest.raises(ConfigError) as raised:
        load_config(None, ["rdpo.scale_time=true"])
    assert raised.value.problems[0].startswith("rdpo: scale_time would move the start point in time: set it false")


def test_stage_one_by_gradient_takes_what_it_follows():
    gradient = "distill.method=gradient"
    for more in ("solver.order=2", "solver.afs=true"):
        with pytest.raises(ConfigError, match=r"distill: .*gradient"):
            load_config(None, [gradient, more])
        load_config(None, [gradient, more, "solver.start_point=false"])
    times = [gradient, "solver.start_point=false", "rdpo.scale_time=true"]
    load_config(None, times)
    for without in ("rdpo.scale_dir=false", "distill.scale_range=0"):
        with pytest.raises(ConfigError, match="rdpo: scale_time"):
            load_config(None, [*times, without])


@pytest.mark.parametrize("without", ["distill.enabled=false", "distill.table=sd3-512-rl"])
def test_a_stage_one_that_does_not_run_refuses_nothing(without):
    gradient = "distill.method=gradient"
    for given in (
        [gradient, "solver.order=2"],
        [gradient, "solver.afs=true"],
        [gradient, "solver.start_point=false", "rdpo.scale_time=true", "rdpo.scale_dir=false"],
        ["distill.grid=1"],
        ["distill.min_weight=0.5"],
    ):
        with pytest.raises(ConfigError):
            load_config(None, given)
        load_config(None, [*given, without])


def test_a_bound_is_said_exactly():
    assert problems("seed=2147483648") == ["seed: is 2147483648, less than 2147483648 is needed"]


def test_a_lone_start_point_learns_its_scale_or_nothing():
    assert load_config(None, ["solver.points=1"]).rdpo.scale_dir
    with pytest.raises(ConfigError, match=r"scale_dir.*true"):
        load_config(None, ["solver.points=1", "rdpo.scale_dir=false"])


def test_all_problems_are_reported_together(tmp_path):
    path = written(tmp_path, "rdpo: {group_size: 1, lr: -1, minibatc: 3}\nsolver: {points: 0}\nsed: 1\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path, ["cluster.rollout_actors=-1", "nothing"])
    keys = {problem.split(":")[0] for problem in raised.value.problems}
    assert keys == {
        "rdpo.group_size",
        "rdpo.lr",
        "rdpo.minibatc",
        "solver.points",
        "sed",
        "cluster.rollout_actors",
        "nothing",
    }
    assert str(raised.value).count("\n") == 6


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- 1\n- 2\n", r"holds \[1, 2\], expected a mapping"),
        ("a: [1\nb: 2\n", r"is not YAML: .*\(line 2\)"),
        (b"name: \xff\n", "is not UTF-8"),
        ("!!python/object/apply:os.getcwd []\n", "is not YAML: could not determine a constructor"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, said):
    with pytest.raises(ConfigError, match=said) as raised:
        load_config(written(tmp_path, content))
    assert len(raised.value.problems) == 1


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_files_that_cannot_be_read(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_config(tmp_path / name)


def test_an_empty_file_is_the_default(tmp_path):
    assert load_config(written(tmp_path, "# nothing yet\n")) == RunConfig()


def test_the_embedded_backbone_gets_its_own_keys():
    arguments = load_config(None, ["backbone.resolution=64"]).backbone.arguments
    assert arguments == {
        name: value
        for name, value in asdict(PipelineOptions("shapes", resolution=64, max_sequence_length=20)).items()
        if name != "parts"
    }


@pytest.mark.parametrize("how", ["override", "file"])
def test_another_model_brings_its_own_defaults(tmp_path, how):
    model = "stabilityai/stable-diffusion-3-medium-diffusers"
    path = written(tmp_path, f"backbone: {{model: {model}, dtype: float16}}\n") if how == "file" else None
    config = load_config(path, [f"backbone.model={model}"] if how == "override" else [])
    assert config.backbone.model == model and config.backbone.guidance_scale is None
    assert config.backbone.max_sequence_length is None and config.prompts.train == "builtin"
    assert {name: r.head for name, r in config.rewards.items()} == {"hpsv2": "hpsv2.1"}
    assert config.backbone.dtype == ("float16" if how == "file" else "auto")
    given = ["rewards={mine: {head: clip}}", "backbone.guidance_scale=4.5", "prompts.train=a.txt"]
    chosen = load_config(path, [f"backbone.model={model}", *given])
    assert list(chosen.rewards) == ["mine"] and chosen.backbone.guidance_scale == 4.5
    assert chosen.prompts.train == "a.txt" and chosen.prompts.test == RunConfig().prompts.test


def test_heads_that_are_named_take_the_place_of_the_default_one():
    model = "backbone.model=owner/name"
    assert list(load_config(None, [model, "rewards.pick.head=pickscore"]).rewards) == ["pick"]
    assert list(load_config(None, [model]).rewards) == ["hpsv2"]  # and nothing is left from the call before
    assert list(load_config(None, [model, "rewards.hpsv2.num_gpus=1"]).rewards) == ["hpsv2"]
    both = load_config(None, ["rewards.clip.weight=2", "rewards.pick.head=pickscore"]).rewards
    assert sorted(both) == ["clip", "pick"] and both["clip"].options == {"model": "shapes-clip"}


@pytest.mark.parametrize("revision", ["1e5", "12e45678", "null", "0x1f", "007", "2026-01-01", "on", "1_000"])
def test_what_is_saved_reads_back_as_it_was(tmp_path, revision):
    given = [
        f"backbone.revision={json.dumps(revision)}",
        "backbone.model=/models/My SD 1.5",
        "backbone.guidance_scale=null",
    ]
    config = load_config(None, given)
    assert config.backbone.revision == revision and config.name == "My-SD-1-5" and config.solver.intervals == 10
    assert load_config(written(tmp_path, to_yaml(config))) == config


def test_the_references_clamps_are_for_its_heads():
    load_config(None, ["rdpo.normalisation=reference", "rewards={a: {head: clip}, b: {head: mps, weight: 0}}"])
    mine = "rewards={mine: {head: simulated}}"
    with pytest.raises(ConfigError, match=r"rdpo: normalisation.*'simulated'"):
        load_config(None, ["rdpo.normalisation=reference", mine])
    assert load_config(None, ["rdpo.normalisation=zscore", mine]).rdpo.normalisation == "zscore"
    assert load_config(None, ["rdpo.normalisation=reference"]).rdpo.normalisation == "reference"


def test_other_backbones_get_their_options():
    assert BackboneConfig(family="simulated", options={"latency": 0.1}).arguments == {"latency": 0.1}
    assert BackboneConfig(family="gaussian", model="mine").arguments == {"model": "mine"}


def test_a_newer_format_is_all_that_is_said_of_a_newer_file(tmp_path):
    path = written(tmp_path, "format: 3\nquantum: {bits: 3}\nrdpo: {lr: fast}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(path, ["seed=-1"])
    said = f"{path} was written by a newer epd_ray (format 3, this one reads up to 2): update epd_ray"
    assert raised.value.problems == (said,)
    assert to_yaml(load_config(None)).startswith("format: 2\n")
    assert problems("format=3") == ["format: is 3, at most 2 is possible"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], None),
        (["rdpo.lr=3e-3", "seed=1"], "seed was 0, now 1"),
        (["rewards.clip.weight=2"], "rewards.clip.weight was 1.0, now 2.0"),
        (["rewards={mine: {head: 'a.b:Head'}}"], "rewards.clip.head was 'clip', now None"),
        (
            ["evaluation.baselines=[]"],
            "evaluation.baselines was ['euler_no_zero', 'dpmpp2m'], now []",
        ),
    ],
)
def test_the_first_key_that_differs(overrides, said):
    before, now = (config.model_dump(mode="json") for config in (load_config(None), load_config(None, overrides)))
    assert first_change(before, now) == said


def test_a_file_of_the_first_format_is_read_under_the_names_of_today(tmp_path):
    config = load_config(written(tmp_path, "format: 1\nrdpo: {minibatch: 8, epochs: 3, lr: 0.01}\n"))
    assert (config.rdpo.minibatch_size, config.rdpo.num_epochs, config.rdpo.lr) == (8, 3, 0.01)
    assert config.format == 2
    with pytest.raises(ConfigError, match=r"rdpo\.minibatch: unknown key.*minibatch_size"):
        load_config(written(tmp_path, "format: 2\nrdpo: {minibatch: 8}\n"))


def test_the_algorithm_has_the_same_defaults():
    from epd_ray.rdpo.config import RDPOConfig
    from epd_ray.rdpo.session import rdpo_config

    configured, plain = vars(rdpo_config(load_config(None), [])), vars(RDPOConfig())
    assert plain.keys() == configured.keys()
    same = {k for k, v in plain.items() if repr(v) == repr(configured[k]) or v == configured[k]}
    # RLlib has its own seed and log level, and a backbone's options are left out where they are the default.
    assert plain.keys() - same == {"backbone_spec", "log_level", "seed"}


def lines_of(call, *arguments):
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return caught.value.problems


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(12)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join([f'*{chr(97 + i)}'] * 10)}]}}\n" for i in range(12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases"),
        (MERGES, "aliases"),
        ("rdpo: &a {lr: *a}", "aliases"),
        ("rdpo: {lr: 1, lr: 2}", "'lr'.*twice"),
        ("seed: 1\nrdpo: {}\nseed: 2\n", "'seed'.*line 3"),
        (f"rdpo: {{lr: {'[' * 200}{']' * 200}}}", "levels"),
        (f"rdpo: {{lr: {'[' * 100_000}", "deep|levels"),
        (f"rdpo: {'9' * 5000}", "4300"),
        (f"rdpo: 0x{'f' * 5000}", "20000 bits"),
        (f"? 0x{'f' * 5000}\n: 1", "20000 bits"),
        (f"? {'a' * 100_000}\n: 1", "aaa"),
        ("rdpo: {lr: .nan}", "lr.*nan"),
        ("rdpo: {lr: 1e999}", "lr.*inf"),
        ("rdpo:\n\tlr: 1", "line 2"),
        ("rdpo: !!python/object/apply:os.system ['true']", "python/object"),
        ("rdpo: !!binary '='", "rdpo|YAML"),
        ("a: 1\n---\nb: 2", "document"),
        ("seed: 2026-01-31", "seed.*'2026-01-31'"),
        ("seed: 1:30", "seed.*'1:30'"),
        ("seed: 010", "seed.*'010'"),
        ("\x00", "special characters"),
        ("[1]", "mapping"),
    ],
    ids=range(22),
)
def test_a_forged_file_is_refused_at_once_in_short_lines(tmp_path, text, said):
    began = time.monotonic()
    lines = lines_of(load_config, written(tmp_path, text))
    assert re.search(said, " ".join(lines)) and all(len(line) < 1000 and "\n" not in line for line in lines)
    if "\n" not in text and text.startswith("rdpo: "):
        value = text.removeprefix("rdpo: ")
        assert all(len(line) < 1000 for line in lines_of(load_config, None, [f"rdpo={value}"]))
    assert time.monotonic() - began < 10


def test_what_yaml_allows_is_still_read(tmp_path):
    text = "rdpo: &a {lr: 1e-3, iterations: 1_000}\nname: 010\nseed: 0x10\n"
    config = load_config(written(tmp_path, text))
    assert (config.rdpo.lr, config.rdpo.iterations, config.name, config.seed) == (1e-3, 1000, "010", 16)
    for name in ("010", "1", "1e3", "2026-01-31", "no"):
        config = load_config(None, [f"name='{name}'"])
        assert load_config(written(tmp_path, to_yaml(config))).name == name


@pytest.mark.parametrize(
    "override", ["a." * 50_000 + "b=1", "x" * 100_000, "x" * 100_000 + "=1", "\nf=1", "seed=" + "z" * 10**5]
)
def test_a_long_override_makes_no_long_message(override):
    assert all(len(line) < 1000 and "\n" not in line for line in lines_of(load_config, None, [override]))


def test_a_head_that_is_left_out_is_the_one_that_the_entry_is_called() -> None:
    found = load_config(None, ["rewards={pickscore: {weight: 2}, mine: {head: clip}}"]).rewards
    assert {name: (reward.head, reward.weight) for name, reward in found.items()} == {
        "pickscore": ("pickscore", 2.0),
        "mine": ("clip", 1.0),
    }
    for name, said in {"hpsv2": "did you mean 'hpsv2.1'?", "mine": "known: aesthetic, clip, "}.items():
        with pytest.raises(
            ConfigError, match=rf"^rewards.{name}.head: unknown reward head '{name}'; {re.escape(said)}"
        ):
            load_config(None, [f"rewards={{{name}: {{weight: 1}}}}"])
