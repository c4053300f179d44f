"""The LAION aesthetic predictor (Schuhmann 2022): a small network over CLIP ViT-L/14 image embeddings."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from epd_ray.errors import ModelError, shown
from epd_ray.rewards.batches import check_batch_size, in_batches, place
from epd_ray.rewards.checkpoints import companion, find_file, linear_layers, read_tensors
from epd_ray.rewards.preprocess import pil_pixels
from epd_ray.rewards.towers import open_clip_model
from epd_ray.weights.hub import opening

CHECKPOINTS = (
    "sac+logos+ava1-l14-linearMSE.safetensors",
    "sac+logos+ava1-l14-linearMSE.pth",
    "aesthetic-model.pth",  # the same file in the default repository
)


class AestheticHead:
    """Scores how much people would like a picture, from about 1 to 10; the prompt has no influence.

    Args:
        model: directory or hub id that holds sac+logos+ava1-l14-linearMSE.pth.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of the image tower ("auto": float16 on CUDA, else float32); later layers run in float32.
        batch_size: number of pictures per forward pass.
        clip: directory or hub id of the CLIP model; None takes the model directory if it holds one, else OpenAI's
            ViT-L/14.

    Raises:
        ModelError: the predictor or the CLIP model is missing or damaged, or their sizes differ.
    """

    def __init__(
        self,
        *,
        model: str = "trl-lib/ddpo-aesthetic-predictor",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 64,
        clip: str | None = None,
    ) -> None:
        self.model_id, self.revision, self.batch_size = model, revision, check_batch_size(batch_size)
        self._device, self._dtype = place(device, dtype)
        with opening(model, "aesthetic predictor"):
            layers = linear_layers(read_tensors(find_file(model, CHECKPOINTS, revision)), "layers.")
        base = companion(model, clip, "openai/clip-vit-large-patch14", ["config.json"])
        with opening(base, "CLIP model"):
            network = open_clip_model(base, None, f"CLIP model {shown(base)}")
        del network.text_model
        width, takes = network.config.projection_dim, layers[0].in_features
        if width != takes:
            raise ModelError(
                f"aesthetic predictor {shown(model)} takes embeddings of {takes} numbers, but CLIP "
                f"model {shown(base)} gives"
                f" {width}: set `clip` to the CLIP model that the predictor was trained with"
            )
        self._network = network.to(self._device, self._dtype).eval().requires_grad_(False)
        self._layers = layers.to(self._device)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return in_batches(self._score, images, prompts, self.batch_size)

    @torch.inference_mode()
    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = pil_pixels(images, self._network.config.vision_config.image_size).to(self._device, self._dtype)
        embeds = self._network.get_image_features(pixel_values=pixels).pooler_output.float()
        scores: Tensor = self._layers(normalize(embeds, dim=-1))
        return scores.squeeze(-1)
