"""The features of Inception-v3 by torch-fidelity, with which the Frechet distance is the FID.

The extractor runs in a Python environment of its own, which has few packages: importing this module needs only torch
and numpy.
"""

from pathlib import Path

import numpy as np
import torch

from epd_ray.errors import ModelError, shown
from epd_ray.evaluation.metrics.checks import checked_images
from epd_ray.evaluation.metrics.weights import weights_checksum
from epd_ray.rewards.batches import check_batch_size
from epd_ray.rewards.package import PACKAGES
from epd_ray.types import FloatArray, ImageArray
from epd_ray.weights.devices import pick_device

MODEL = "inception-2015-12-05"
LAYER = "2048"


class InceptionFeatures:
    """Computes the pooled features of the Inception-v3 of 2015, which define the FID (Heusel et al. 2017).

    The network and its bilinear resize to 299 x 299, which is that of TensorFlow 1, are torch-fidelity's. The published
    statistics with `mu` and `sigma` (of EDM, StyleGAN, pytorch-fid) were computed this way. The "clean" FID resizes
    pictures in another way, and its statistics do not fit.

    Args:
        weights: the path of torch-fidelity's weights-inception-2015-12-05-6726825d.pth; None downloads the file once
            per machine.
        device: "auto" (the first of cuda, mps and cpu that is there), or a torch device.
        batch_size: the number of pictures in a forward pass.

    Attributes:
        model_id: MODEL.
        revision: a checksum of the weights.
        dimension: 2048, the number of features of a picture.

    Raises:
        ModelError: torch-fidelity is not installed in this environment, or the weights are missing or damaged.
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
        except RuntimeError as error:  # load_state_dict's message has several lines
            said = " ".join(str(error).split())[:200]
            raise ModelError(f"{path} is not torch-fidelity's Inception: {said}") from error
        self.revision = weights_checksum(network)
        self._network = network.to(self._device)

    @torch.inference_mode()
    def features(self, images: ImageArray) -> FloatArray:
        """Compute features [B, 2048], float32, of images [B, 3, H, W], uint8, of any size."""
        found = np.empty((len(images), self.dimension), np.float32)
        for start in range(0, len(checked_images(images)), self._batch_size):
            batch = torch.from_numpy(np.array(images[start : start + self._batch_size]))
            (rows,) = self._network(batch.to(self._device))
            found[start : start + len(batch)] = rows.cpu().numpy()
        return found


def _downloaded(url: str) -> Path:
    """The path of the weights in torch's cache; they are downloaded if they are not there.

    Raises:
        ModelError: the weights cannot be downloaded.
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
    """Refuse a file that holds anything but tensors, because torch-fidelity would unpickle whatever it holds.

    Raises:
        ModelError: there is no such file, or it holds more than tensors.
    """
    if not path.is_file():
        raise ModelError(f"weights {shown(str(path))} is no file: give torch-fidelity's Inception weights, a .pth")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen classes of errors here, one of them pickle's
        raise ModelError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
