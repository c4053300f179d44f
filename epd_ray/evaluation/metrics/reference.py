"""The reference set of the Frechet distance: a folder of real pictures, or a published file of their statistics."""

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from epd_ray.errors import MetricError
from epd_ray.evaluation.metrics.frechet import FeatureStatistics, Gaussian
from epd_ray.evaluation.metrics.pictures import picture_files, read_picture
from epd_ray.storage.run_directory import whole
from epd_ray.types import FeatureExtractor, ImageArray

BATCH = 64  # the number of pictures in memory at a time
MEAN, COVARIANCE, COUNT = "mu", "sigma", "count"


def reference_statistics(source: Path, extractor: FeatureExtractor, cache: Path) -> Gaussian:
    """Read or compute the statistics of a reference set.

    Args:
        source: an .npz file with mu and sigma of this extractor's features, or a folder of pictures, which are used at
            their own size.
        extractor: computes the features of a folder's pictures.
        cache: the folder that keeps the statistics of picture folders, by the bytes of the pictures and the extractor.

    Raises:
        MetricError: there is nothing, a picture or file is damaged, there are too few pictures, or the statistics are
            of another number of features.
        RunDirectoryError: the disk refuses.
    """
    if not source.is_dir():
        return _of_size(read_statistics(source), extractor, source)
    files = picture_files(source)
    path = cache / f"reference-{_key(files, extractor)}.npz"
    if path.is_file():
        return _of_size(read_statistics(path), extractor, source)
    shards = (FeatureStatistics.of(extractor.features(batch)) for batch in _batches(files))
    found = FeatureStatistics.merged(shards).gaussian()
    cache.mkdir(parents=True, exist_ok=True)
    write_statistics(path, found)
    return _of_size(found, extractor, source)


def require_reference(source: Path) -> None:
    """Refuse a reference set that cannot be used, before an extractor is opened.

    Raises:
        MetricError: there is nothing, the folder has no pictures, or the file is damaged.
    """
    if not source.exists():
        raise MetricError(f"--reference is {source}, which does not exist: give a folder of pictures or an .npz file")
    if source.is_dir():
        picture_files(source)
    else:
        read_statistics(source)


def read_statistics(path: Path) -> Gaussian:
    """Read statistics from an .npz with mu [D] and sigma [D, D], the form of public FID reference files.

    Nothing in the file is unpickled.

    Raises:
        MetricError: there is no such file, it is damaged, or it lacks one of these arrays.
    """
    try:
        file = np.load(path)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise MetricError(f"{path} is one array: give an .npz with mu and sigma")
        with file:
            if missing := {MEAN, COVARIANCE} - set(file.files):
                has = ", ".join(sorted(file.files))
                raise MetricError(f"{path} has no {min(missing)} (it has {has}): give an .npz with mu and sigma")
            mean, covariance = (np.asarray(file[name], np.float64) for name in (MEAN, COVARIANCE))
            counts = np.asarray(file[COUNT], np.int64).ravel() if COUNT in file.files else np.zeros(0, np.int64)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        said = str(error).splitlines()[0]
        raise MetricError(f"{path} cannot be read as statistics ({said}): give an .npz with mu and sigma") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"mu {list(mean.shape)} and sigma {list(covariance.shape)}"
        raise MetricError(f"{path} has {shapes}, expected [D] and [D, D]")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise MetricError(f"{path} holds a number that is not finite: fetch or compute it again")
    return Gaussian(mean, covariance, int(counts[0]) or None if counts.size else None)


def write_statistics(path: Path, statistics: Gaussian) -> None:
    """Write an .npz that `read_statistics` and other FID programs can read, whole or not at all.

    Raises:
        RunDirectoryError: the disk refuses.
    """
    with whole(path) as partial, partial.open("wb") as file:
        np.savez(file, mu=statistics.mean, sigma=statistics.covariance, count=statistics.count or 0)


def _of_size(found: Gaussian, extractor: FeatureExtractor, path: Path) -> Gaussian:
    if len(found.mean) != extractor.dimension:
        raise MetricError(
            f"{path} is of {len(found.mean)} features, {extractor.model_id} has {extractor.dimension}: "
            "give statistics of this extractor, or a folder of pictures"
        )
    if found.count is not None and found.count <= extractor.dimension:
        raise MetricError(
            f"{path} is of {found.count} pictures, the Frechet distance needs at least {extractor.dimension + 1} for "
            f"{extractor.dimension} features: give more"
        )
    return found


def _key(files: Sequence[Path], extractor: FeatureExtractor) -> str:
    digest = hashlib.sha256(repr((extractor.model_id, extractor.revision)).encode())
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def _batches(files: Sequence[Path]) -> Iterator[ImageArray]:
    """Read pictures in order, in batches of pictures that follow each other and have one size."""
    held: list[ImageArray] = []
    for path in files:
        picture = read_picture(path)
        if held and (len(held) == BATCH or held[0].shape != picture.shape):
            yield np.stack(held)
            held = []
        held.append(picture)
    yield np.stack(held)
