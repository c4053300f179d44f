"""What a suite was measured on, and a record of it, so that other results are not taken for the same."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from epd_ray.backbones.loading import fingerprint
from epd_ray.config.loading import RunConfig
from epd_ray.config.sections import RewardConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.drawing.worker import BackboneFacts
from epd_ray.evaluation.suites.definition import Suite
from epd_ray.evaluation.suites.directory import Facts, Manifest
from epd_ray.evaluation.suites.pictures import Pictures
from epd_ray.evaluation.suites.solvers import digest
from epd_ray.prompts.splits import BUILTIN, SHAPES
from epd_ray.types import FeatureExtractor

SOURCES = {SHAPES: "held-out scenes of the embedded model", BUILTIN: "held-out prompts of the package"}


@dataclass(frozen=True)
class Subject:
    """Model, samplers and pictures.

    Attributes:
        config: of the model and the heads.
        facts: of the open model.
        suite: whose samplers draw.
        pictures: that each of them draws.
        source: of the prompts: "shapes", "builtin" or a file's name; "" where there are none.
    """

    config: RunConfig
    facts: BackboneFacts
    suite: Suite
    pictures: Pictures
    source: str

    @property
    def sentence(self) -> str:
        """The model and the pictures, for people."""
        facts, pictures = self.facts, self.pictures
        model = f"{facts.model_id} at {facts.more.get('resolution')} px"
        if not self.source:
            return f"{model}; {len(pictures):,} pictures a solver, seed {self.config.seed}."
        each = f", {pictures.images_per_prompt} pictures of each" if pictures.images_per_prompt > 1 else ""
        prompts = f"{len(pictures.prompts):,} prompts ({SOURCES.get(self.source, self.source)}){each}"
        return f"{model}, guidance scale {facts.guidance_scale:g}; {prompts}, seed {self.config.seed}."

    def manifest(self, extractor: FeatureExtractor | None) -> Manifest:
        """Everything that decides a score.

        Args:
            extractor: of features, where they are kept.
        """
        sections: dict[str, Facts] = {
            "suite": {"name": self.suite.name, "table": self.suite.table},
            "model": self._model(),
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

    def _model(self) -> dict[str, JsonValue]:
        return {
            "model": self.facts.model_id,
            "family": self.facts.family,
            **{name: self.facts.more.get(name) for name in ("revision", "fingerprint", "dtype", "resolution")},
            "guidance_scale": self.facts.guidance_scale,
            "options": self.config.backbone.portable,
        }


def _local_model(head: RewardConfig) -> Path | None:
    """The folder on this machine that a head's model lies in, where it may be replaced by another."""
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
