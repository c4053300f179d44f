"""What diversity and the Frechet distance see: which extractor, and whether there are pictures enough for it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from epd_ray.config import RunConfig
from epd_ray.errors import ConfigError, MetricError
from epd_ray.feature_pool import FeaturePool, FeatureSpec
from epd_ray.metrics.reference import reference_statistics
from epd_ray.sections import RewardConfig
from epd_ray.suite.measure import Features
from epd_ray.suite.settings import INCEPTION, Request

CLIP = "clip"  # as head and as extractor


@contextmanager
def open_features(request: Request, config: RunConfig, pictures: int, cache: Path) -> Iterator[Features]:
    """What a request's metrics need, in an actor that ends with the block, on Ray as it runs.

    There is no extractor where no metric needs one, or none is at hand for diversity.

    Args:
        request: of a suite.
        config: the model of a CLIP head serves, where nothing else is asked for.
        pictures: that are drawn of each sampler.
        cache: folder for the statistics of picture folders.

    Raises:
        ConfigError: nothing to see a reference set with.
        MetricError: fewer pictures than the distance needs, or a reference set that cannot be used.
        ModelError: the extractor cannot be opened.
        PlacementError: no room for it.
    """
    model = request.features or _default(request, config.rewards)
    if model is None and request.reference is not None:
        raise ConfigError(["--reference needs --features: inception (FID), or a CLIP model"])
    if model is None or (request.reference is None and request.images_per_prompt == 1):
        yield Features()
        return
    what, options = (INCEPTION, {}) if model == INCEPTION else (CLIP, {"model": model})
    cluster = config.cluster
    spec = FeatureSpec(what, options, num_cpus=0, num_gpus=cluster.feature_gpus)  # 0: the cores may all be taken
    with FeaturePool(spec, cluster.placement_timeout_s) as extractor:
        if request.reference is None:
            yield Features(extractor)
            return
        if pictures <= extractor.dimension:
            raise MetricError(
                f"the Frechet distance needs at least {extractor.dimension + 1} pictures for {extractor.dimension} "
                f"features, {pictures} are asked of each sampler: raise --count"
            )
        yield Features(extractor, reference_statistics(request.reference, extractor, cache), model == INCEPTION)


def _default(request: Request, heads: Mapping[str, RewardConfig]) -> str | None:
    if request.suite == "paper-fid":
        return INCEPTION
    models = [head.options.get("model") for head in heads.values() if head.head == CLIP]
    return next((model for model in models if isinstance(model, str)), None)
