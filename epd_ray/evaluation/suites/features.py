"""The features that diversity and the Frechet distance compare: which network computes them, and how it is opened."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epd_ray.actors.environments import EXTRACTORS as ENVIRONMENTS
from epd_ray.actors.environments import interpreter
from epd_ray.config.run_config import RunConfig
from epd_ray.config.services import ClusterConfig
from epd_ray.errors import ConfigError, MetricError
from epd_ray.evaluation.metrics.inception import InceptionFeatures
from epd_ray.evaluation.metrics.reference import reference_statistics, require_reference
from epd_ray.evaluation.suites.feature_pool import FeaturePool, FeatureSpec
from epd_ray.evaluation.suites.measure import Features
from epd_ray.evaluation.suites.settings import CLIP, INCEPTION, Request
from epd_ray.rewards import HEADS


def foresee_features(request: Request, config: RunConfig, pictures: int) -> FeatureSpec | None:
    """Choose the extractor that a request's metrics need, and refuse what cannot work before any actor starts.

    Args:
        request: what the suite is asked to measure.
        config: its CLIP head's model is the extractor, unless the request names one.
        pictures: the number of pictures that each sampler draws.

    Returns:
        The extractor; None if no metric needs features.

    Raises:
        ConfigError: an extractor is needed, and neither the request nor the configuration names one.
        EnvironmentFailure: the environment that the extractor needs is not built on this machine.
        MetricError: there are fewer pictures than the distance needs, or the reference set cannot be used.
    """
    if request.reference is None and request.images_per_prompt == 1:
        return None
    model = request.features or (INCEPTION if request.suite == "paper-fid" else None)
    what, options = (INCEPTION, {}) if model == INCEPTION else (CLIP, {"model": model} if model else _of_head(config))
    if not options and what == CLIP:
        each = f"--images-per-prompt {request.images_per_prompt}"
        asked, seen = (each, "diversity") if request.reference is None else ("--reference", "the Frechet distance")
        raise ConfigError(
            [f"{asked} needs --features, for {seen}: inception, or a CLIP model (a head clip under rewards names one "
             "too)"]
        )  # fmt: skip
    if request.reference is not None:
        require_reference(request.reference)
        if what == INCEPTION:
            _require_enough(pictures, InceptionFeatures.dimension)
    if what in ENVIRONMENTS:
        interpreter(ENVIRONMENTS[what])
    # It reserves no CPU core, because the other actors may have reserved them all.
    return FeatureSpec(what, options, num_cpus=0, num_gpus=config.cluster.feature_gpus)


@contextmanager
def open_features(
    spec: FeatureSpec | None, reference: Path | None, pictures: int, cache: Path, cluster: ClusterConfig
) -> Iterator[Features]:
    """Open the extractor in an actor on a running Ray, and end the actor with the block.

    Args:
        spec: what `foresee_features` returned; None opens nothing.
        reference: the pictures or statistics that the Frechet distance is measured to; None leaves them out.
        pictures: the number of pictures that each sampler draws.
        cache: the folder that keeps the statistics of picture folders.
        cluster: how long to wait for room and for answers.

    Raises:
        MetricError: there are fewer pictures than the distance needs, or the reference set cannot be used.
        ModelError: the extractor cannot be opened.
        PlacementError: the cluster has no room for the actor.
    """
    if spec is None:
        yield Features()
        return
    with FeaturePool(spec, cluster) as extractor:
        if reference is None:
            yield Features(extractor)
            return
        _require_enough(pictures, extractor.dimension)
        yield Features(extractor, reference_statistics(reference, extractor, cache), spec.extractor == INCEPTION)


def _of_head(config: RunConfig) -> dict[str, object]:
    """The extractor's options for the model of the first CLIP head; empty if there is no CLIP head."""
    chosen = next((head.options for head in config.rewards.values() if head.head == CLIP), None)
    if chosen is None:
        return {}
    usual = inspect.signature(HEADS.get(CLIP)).parameters["model"].default
    return {"model": usual} | {name: chosen[name] for name in ("model", "revision") if name in chosen}


def _require_enough(pictures: int, features: int) -> None:
    if pictures <= features:
        raise MetricError(
            f"the Frechet distance needs at least {features + 1} pictures for {features} features, each sampler draws "
            f"{pictures} pictures: raise --count"
        )
