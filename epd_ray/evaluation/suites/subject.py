"""What a suite measures: the prompts and seeds of its pictures, the model, and the record that tells results apart."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pydantic import JsonValue

from epd_ray.actors.beforehand import panel_of
from epd_ray.backbones.index import fingerprint
from epd_ray.config.run_config import RunConfig
from epd_ray.config.sections import AUTO
from epd_ray.config.services import RewardConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import BackboneFacts
from epd_ray.errors import ConfigError, PromptError
from epd_ray.evaluation.comparison import scenes_of
from epd_ray.evaluation.suites.definition import Suite
from epd_ray.evaluation.suites.directory import Facts, Manifest
from epd_ray.evaluation.suites.settings import FID_PICTURES, Request
from epd_ray.evaluation.suites.solvers import digest
from epd_ray.evaluation.tuning import require_apart
from epd_ray.prompts.files import Prompts, read_rows
from epd_ray.prompts.splits import BUILTIN, SHAPES, load_prompts
from epd_ray.randomness import Purpose, noise_seeds
from epd_ray.types import FeatureExtractor, Metadata


@dataclass(frozen=True)
class Pictures:
    """The prompts and seeds that every sampler of a suite draws. Picture i shows prompt i // images_per_prompt.

    Attributes:
        prompts: [P]; a text that occurs twice counts as two prompts.
        images_per_prompt: J, the number of pictures of each prompt, which start from different noise.
        seeds: [P * J], the noise seed of each picture.
        images_per_job: the number of pictures in a shard, which are drawn in one batch and kept together.
        rows: prompt -> the columns of its row that reward heads read.
    """

    prompts: tuple[str, ...]
    images_per_prompt: int
    seeds: tuple[int, ...]
    images_per_job: int
    rows: Mapping[str, Metadata] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(-(-len(self) // self.images_per_job))

    @cached_property
    def judged(self) -> bool:
        """Whether all prompts are scenes of the embedded model's world."""
        return scenes_of(self.prompts) is not None

    def shard(self, number: int) -> range:
        """The numbers of a shard's pictures; the last shard may have fewer."""
        return range(number * self.images_per_job, min((number + 1) * self.images_per_job, len(self)))

    def prompt_of(self, picture: int) -> int:
        """The number of a picture's prompt."""
        return picture // self.images_per_prompt

    @property
    def facts(self) -> dict[str, JsonValue]:
        """What decides the pictures besides model and sampler, for the manifest."""
        return {
            "count": len(self.prompts),
            "images_per_prompt": self.images_per_prompt,
            "images_per_batch": self.images_per_job,
            "prompts_sha256": _digest(self.prompts),
            "seeds_sha256": _digest(self.seeds),
            **({"rows_sha256": _digest([dict(self.rows.get(p, {})) for p in self.prompts])} if self.rows else {}),
        }


def _digest(values: Sequence[JsonValue]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


SOURCES = {SHAPES: "held-out scenes of the embedded model", BUILTIN: "held-out prompts of the package"}


@dataclass(frozen=True)
class Subject:
    """What is measured: a suite's samplers and pictures on one model.

    Attributes:
        config: the configuration of the model and the reward heads.
        facts: what the opened model says of itself.
        suite: the samplers that draw.
        pictures: the prompts and seeds that each sampler draws.
        source: the source of the prompts: "shapes", "builtin" or a file's name; "" for a model without prompts.
    """

    config: RunConfig
    facts: BackboneFacts
    suite: Suite
    pictures: Pictures
    source: str

    @property
    def sentence(self) -> str:
        """A sentence for people about the model and the pictures."""
        facts, pictures = self.facts, self.pictures
        model = f"{facts.model_id} at {facts.more.get('resolution')} px"
        if not self.source:
            return f"Each solver drew {len(pictures):,} pictures from the same noise: {model}, seed {self.config.seed}."
        each = f", {pictures.images_per_prompt} pictures of each" if pictures.images_per_prompt > 1 else ""
        prompts = f"{len(pictures.prompts):,} prompts ({SOURCES.get(self.source, self.source)}){each}"
        how = f"{model}, guidance scale {facts.guidance_scale:g}, seed {self.config.seed}"
        return f"Each solver drew the same {prompts}, from the same noise: {how}."

    def manifest(self, extractor: FeatureExtractor | None) -> Manifest:
        """The record of everything that decides a score.

        Args:
            extractor: computes the features that are kept; None if none are.
        """
        sections: dict[str, Facts] = {
            "suite": {"name": self.suite.name, "table": self.suite.table},
            "model": model_facts(self.config, self.facts),
            "prompts": self.pictures.facts | {"source": self.source, "seed": self.config.seed},
            "heads": {
                name: {"head": head.head, "options": head.options, "backend": head.backend}
                for name, head in self.config.rewards.items()
            },
        }
        models = {name: _local_model(head) for name, head in self.config.rewards.items()}
        if folders := {name: fingerprint(folder) for name, folder in models.items() if folder is not None}:
            sections["head_models"] = folders
        if extractor is not None:
            sections["features"] = {"model": extractor.model_id, "revision": extractor.revision}
        return Manifest(sections, {sampler.key: _sampler(sampler) for sampler in self.suite.samplers})


def model_facts(config: RunConfig, facts: BackboneFacts) -> dict[str, JsonValue]:
    """What decides the pictures of a model, for the manifest."""
    return {
        "model": facts.model_id,
        "family": facts.family,
        **{name: facts.more.get(name) for name in ("revision", "fingerprint", "dtype", "resolution")},
        "guidance_scale": facts.guidance_scale,
        "options": config.backbone.portable,
    }


def _local_model(head: RewardConfig) -> Path | None:
    """The local folder of a head's model, whose files may change under the same name; None for a hub id."""
    model = head.options.get("model")
    folder = Path(model).expanduser() if isinstance(model, str) else None
    return folder if folder is not None and folder.is_dir() else None


def _sampler(sampler: Sampler) -> dict[str, JsonValue]:
    return {
        "label": sampler.label,
        "intervals": sampler.intervals,
        "parallel_nfe": sampler.parallel_nfe,
        "model_evals": sampler.model_evals,
        "sha256": digest(sampler),
    }


def pictures_of(config: RunConfig, request: Request) -> Pictures:
    """Choose the prompts and seeds that a request is measured on.

    Raises:
        PromptError: there are fewer prompts than are asked for, or their file cannot be used.
        ConfigError: suite embedded with prompts that describe no scene of the embedded model.
    """
    chosen = _prompts(config, request)
    prompts = chosen.texts
    seeds = noise_seeds(Purpose.TEST, config.seed, len(prompts) * request.images_per_prompt)
    each = (request.images_per_prompt, tuple(seeds), config.cluster.images_per_job)
    found = Pictures(tuple(prompts), *each, rows=chosen.rows)
    if request.suite == "embedded" and not found.judged:
        raise ConfigError(
            ["--suite embedded judges scenes, and some prompt does not describe one of the embedded model: leave out "
             "--prompts, or use --suite prompts FILE"]
        )  # fmt: skip
    return found


def validation_of(config: RunConfig, request: Request, pictures: Pictures) -> Prompts | None:
    """The prompts on which a suite tunes its rivals; None where they are not tuned.

    A paper's suites are not tuned, because they follow the paper's settings.

    Raises:
        PromptError: there are fewer prompts than are asked for, or their file cannot be used.
        ConfigError: a prompt is among those that are measured.
    """
    if not config.evaluation.tune or request.suite not in ("embedded", "prompts") or not config.rewards:
        return None
    other = config.backbone.family != AUTO or config.backbone.model != SHAPES
    source = {"train": SHAPES} if request.suite == "embedded" else {"train": BUILTIN}
    foreign = other and config.prompts.train == SHAPES  # captions of the embedded model's scenes
    update = source if request.suite == "embedded" or foreign else {}
    splits = load_prompts(config.prompts.model_copy(update=update), config.seed, panel_of(config))
    require_apart(splits.validation, pictures.prompts)
    return Prompts(splits.validation, splits.rows)


def source_of(config: RunConfig, request: Request) -> str:
    """The source of the prompts: "shapes", "builtin" or a file's name; "" for a model without prompts."""
    if request.suite == "paper-fid":
        return ""
    if request.prompts is not None:
        return request.prompts.name
    return SHAPES if request.suite == "embedded" else config.prompts.train


def _prompts(config: RunConfig, request: Request) -> Prompts:
    count = request.count
    if request.suite == "paper-fid":
        return Prompts([""] * (count or FID_PICTURES))
    panel = panel_of(config)
    if request.prompts is not None:
        found = read_rows(request.prompts, panel)
    else:
        source = {"train": SHAPES} if request.suite == "embedded" else {}
        wanted = {"test": count} if count is not None else {}
        splits = load_prompts(config.prompts.model_copy(update={**source, **wanted}), config.seed, panel)
        found = Prompts(splits.test, splits.rows)
    if count is not None and count > len(found.texts):
        raise PromptError(
            f"--count asks for {count} prompts, only {len(found.texts)} are there: lower --count or give more prompts"
        )
    kept = replace(found, texts=found.texts[:count])
    panel.require_use((kept.rows.get(prompt, {}) for prompt in kept.texts), source_of(config, request))
    return kept
