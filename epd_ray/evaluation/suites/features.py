"""What diversity and the Frechet distance see: which extractor, and whether there are pictures enough for it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epd_ray.actors.environments import EXTRACTORS as ENVIRONMENTS
from epd_ray.actors.environments import interpreter
from epd_ray.config.loading import RunConfig
from epd_ray.errors import ConfigError, MetricError
from epd_ray.evaluation.metrics.inception import InceptionFeatures
from epd_ray.evaluation.metrics.reference import reference_statistics, require_reference
from epd_ray.evaluation.suites.feature_pool import FeaturePool, FeatureSpec
from epd_ray.evaluation.suites.measure import Features
from epd_ray.evaluation.suites.settings import CLIP, INCEPTION, Request
from epd_ray.rewards import HEADS


def foresee_features(request: Request, config: RunConfig, pictures: int) -> FeatureSpec | None:
    """The extractor that a request's metrics need, if any does, with all refused that shows before it runs.

    Args:
        request: of a suite.
        config: the model of a CLIP head serves, where nothing else is asked for.
        pictures: that are drawn of each sampler.

    Raises:
        ConfigError: an extractor is needed, and none is at hand.
        EnvironmentFailure: the environment that it needs is not built on this machine.
        MetricError: fewer pictures than the distance needs, or a reference set that cannot be used.
    """
    if request.reference is None and request.images_per_prompt == 1:
        return None
    model = request.features or (INCEPTION if request.suite == "paper-fid" else None)
    what, options = (INCEPTION, {}) if model == INCEPTION else (CLIP, {"model": model} if model else _of_head(config))
    if not options and what == CLIP:
        each = f"--images-per-prompt {request.images_per_prompt}"
        asked, seen = (each, "diversity") if request.reference is None else ("--reference", "the Frechet distance")
        raise ConfigError(
            [f"{asked} needs --features, for {seen}: inception, or a CLIP model (that of a clip head under rewards "
             "serves too)"]
        )  # fmt: skip
    if request.reference is not None:
        require_reference(request.reference)
        if what == INCEPTION:
            _require_enough(pictures, InceptionFeatures.dimension)
    if what in ENVIRONMENTS:
        interpreter(ENVIRONMENTS[what])
    return FeatureSpec(what, options, num_cpus=0, num_gpus=config.cluster.feature_gpus)  # 0: the cores may be taken


@contextmanager
def open_features(
    spec: FeatureSpec | None, reference: Path | None, pictures: int, cache: Path, timeout_s: float
) -> Iterator[Features]:
    """What a request's metrics need, in an actor that ends with the block, on Ray as it runs.

    Args:
        spec: see `foresee_features`.
        reference: what the Frechet distance is taken to.
        pictures: that are drawn of each sampler.
        cache: folder for the statistics of picture folders.
        timeout_s: for room to turn up.

    Raises:
        MetricError: fewer pictures than the distance needs, or a reference set that cannot be used.
        ModelError: the extractor cannot be opened.
        PlacementError: no room for it.
    """
    if spec is None:
        yield Features()
        return
    with FeaturePool(spec, timeout_s) as extractor:
        if reference is None:
            yield Features(extractor)
            return
        _require_enough(pictures, extractor.dimension)
        yield Features(extractor, reference_statistics(reference, extractor, cache), spec.extractor == INCEPTION)


def _of_head(config: RunConfig) -> dict[str, object]:
    """The model of the first CLIP head, as the extractor takes it; none without such a head."""
    chosen = next((head.options for head in config.rewards.values() if head.head == CLIP), None)
    if chosen is None:
        return {}
    usual = inspect.signature(HEADS.get(CLIP)).parameters["model"].default
    return {"model": usual} | {name: chosen[name] for name in ("model", "revision") if name in chosen}


def _require_enough(pictures: int, features: int) -> None:
    if pictures <= features:
        raise MetricError(
            f"the Frechet distance needs at least {features + 1} pictures for {features} features, {pictures} are "
            "asked of each sampler: raise --count"
        )
