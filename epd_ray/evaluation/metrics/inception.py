"""Inception's features, which make the Frechet distance the FID; by torch-fidelity, in an environment of its own.

Nothing here needs more than torch and numpy at import: that environment has little else of this package's.
"""

from pathlib import Path

import numpy as np
import torch

from epd_ray.errors import ModelError
from epd_ray.evaluation.metrics.checks import checked_images
from epd_ray.evaluation.metrics.weights import weights_checksum
from epd_ray.rewards.batches import check_batch_size
from epd_ray.rewards.package import PACKAGES
from epd_ray.types import FloatArray, ImageArray
from epd_ray.weights.devices import pick_device

MODEL = "inception-2015-12-05"
LAYER = "2048"


class InceptionFeatures:
    """The pooled features of the Inception-v3 of 2015, whose weights and resizing define the FID (Heusel et al. 2017).

    torch-fidelity's network, with TensorFlow 1's bilinear resize to 299 x 299: the arithmetic behind the published
    statistics with `mu` and `sigma` (of EDM, StyleGAN, pytorch-fid), not that of "clean" FID, which resizes otherwise.

    Args:
        weights: torch-fidelity's weights-inception-2015-12-05-6726825d.pth; None for a download, once per machine.
        device: as everywhere.
        batch_size: pictures per forward pass.

    Attributes:
        model_id: MODEL.
        revision: checksum of the weights.
        dimension: 2048.

    Raises:
        ModelError: torch-fidelity is not installed here, or the weights are missing or damaged.
    """

    model_id = MODEL
    dimension = 2048

    def __init__(self, *, weights: str | None = None, device: str = "auto", batch_size: int = 50) -> None:
        self._device, self._batch_size = pick_device(device), check_batch_size(batch_size)
        module = PACKAGES["fid"]()
        path = _downloaded(module.URL_INCEPTION_V3) if weights is None else Path(weights).expanduser()
        _require_tensors(path)
        try:
            network = module.FeatureExtractorInceptionV3(MODEL, [LAYER], feature_extractor_weights_path=str(path))
        except RuntimeError as error:  # of load_state_dict: several lines
            said = " ".join(str(error).split())[:200]
            raise ModelError(f"{path} is not torch-fidelity's Inception: {said}") from error
        self.revision = weights_checksum(network)
        self._network = network.to(self._device)

    @torch.inference_mode()
    def features(self, images: ImageArray) -> FloatArray:
        """Features [B, 2048], float32, of images [B, 3, H, W], uint8, of any size."""
        found = np.empty((len(images), self.dimension), np.float32)
        for start in range(0, len(checked_images(images)), self._batch_size):
            batch = torch.from_numpy(np.array(images[start : start + self._batch_size]))
            (rows,) = self._network(batch.to(self._device))
            found[start : start + len(batch)] = rows.cpu().numpy()
        return found


def _downloaded(url: str) -> Path:
    """The weights in torch's cache, fetched if they are not there.

    Raises:
        ModelError: they cannot be fetched.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:
            fix = f"fetch it elsewhere and give its path as `weights`, or put it at {path}"
            raise ModelError(f"{url} cannot be downloaded ({error}): {fix}") from error
    return path


def _require_tensors(path: Path) -> None:
    """Refuse a file that is more than tensors: the package itself would unpickle anything.

    Raises:
        ModelError: no such file, or not one of tensors alone.
    """
    if not path.is_file():
        raise ModelError(f"weights {str(path)!r} is no file: give torch-fidelity's Inception weights, a .pth")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds here, one of them pickle's
        raise ModelError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
