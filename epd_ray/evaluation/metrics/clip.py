"""Features from the image tower of any transformers CLIPModel."""

import numpy as np
import torch

from epd_ray.embedded.models import resolve_model
from epd_ray.errors import shown
from epd_ray.evaluation.metrics.checks import checked_images
from epd_ray.evaluation.metrics.weights import weights_checksum
from epd_ray.rewards.batches import check_batch_size
from epd_ray.rewards.towers import open_clip_model, open_clip_processor
from epd_ray.types import FloatArray, ImageArray
from epd_ray.weights.devices import pick_device
from epd_ray.weights.hub import opening


class ClipFeatures:
    """Computes the image embeddings of a CLIP model, not normalised to unit length.

    The network always computes in float32, so that features can be compared with those of another machine.

    Args:
        model: the directory of a CLIPModel, a hub id, or the name of an embedded model.
        revision: the branch, tag or commit of a hub repository; None takes its default branch.
        device: "auto" (the first of cuda, mps and cpu that is there), or a torch device.
        batch_size: the number of pictures in a forward pass.

    Attributes:
        model_id: the model as it was given.
        revision: a checksum of its weights.
        dimension: D, the number of features of a picture.

    Raises:
        ModelError: the model is missing, damaged, or no CLIPModel.
    """

    def __init__(
        self, *, model: str = "shapes-clip", revision: str | None = None, device: str = "auto", batch_size: int = 64
    ) -> None:
        self._device, self._batch_size = pick_device(device), check_batch_size(batch_size)
        location = resolve_model(model)
        with opening(model, "CLIP model"):
            network = open_clip_model(location, revision, f"CLIP model {shown(model)}")
            self._pixels = open_clip_processor(location, revision)
        self.model_id, self.revision = model, weights_checksum(network)
        self.dimension: int = network.config.projection_dim
        self._network = network.to(self._device).eval().requires_grad_(False)

    @torch.inference_mode()
    def features(self, images: ImageArray) -> FloatArray:
        """Compute embeddings [B, D], float32, of images [B, 3, H, W], uint8."""
        found = np.empty((len(images), self.dimension), np.float32)
        for start in range(0, len(checked_images(images)), self._batch_size):
            batch = torch.from_numpy(np.array(images[start : start + self._batch_size]))
            pixels = self._pixels(batch.float() / 255).to(self._device)
            rows = self._network.get_image_features(pixel_values=pixels).pooler_output
            found[start : start + len(batch)] = rows.float().cpu().numpy()
        return found
