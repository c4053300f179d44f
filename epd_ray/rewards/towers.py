"""A CLIP model's two encoders ("towers"): the cosine between the embeddings of pictures and prompts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from epd_ray.embedded.models import resolve_model
from epd_ray.rewards.batches import in_batches
from epd_ray.rewards.checkpoints import PROCESSOR_FILES, check_loaded, find_file
from epd_ray.rewards.text import PromptTokenizer


class ClipTowers:
    """Scores pictures against prompts by the cosine of their embeddings.

    Args:
        network: a CLIPModel in float32.
        tokens: tokenizes prompts for the text encoder.
        pixels: preprocesses images [B, 3, H, W] in [0, 1] for the image encoder.
        device: the device that the network runs on.
        dtype: precision of the network; the cosine is computed in float32.
        batch_size: number of pictures per forward pass.

    Attributes:
        scale: exp(logit_scale), computed before the network is rounded to `dtype`.
    """

    def __init__(
        self,
        network: Any,
        tokens: PromptTokenizer,
        pixels: Callable[[Tensor], Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
    ) -> None:
        self.scale = float(network.logit_scale.detach().exp())
        self.network = network.to(device, dtype).eval().requires_grad_(False)
        self.tokens, self.pixels = tokens, pixels
        self.device, self.dtype, self.batch_size = device, dtype, batch_size

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosines [B] of B images and their prompts, float32 on the CPU."""
        return in_batches(self._cosine, images, prompts, self.batch_size)

    @torch.inference_mode()
    def _cosine(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = self.pixels(images).to(self.device, self.dtype)
        image = self.network.get_image_features(pixel_values=pixels).pooler_output.float()
        text = self.network.get_text_features(**self.tokens(prompts).to(self.device)).pooler_output.float()
        return cosine_similarity(image, text, dim=-1)


def open_clip_model(location: str, revision: str | None, what: str) -> Any:
    """Open a CLIPModel in float32 from a directory or a hub id.

    Args:
        location: directory or hub id.
        revision: branch, tag or commit on the hub; None is the default branch.
        what: kind and name of the model, for the error message.

    Raises:
        ModelError: weights are missing from its files.
    """
    from transformers import CLIPModel

    network, report = CLIPModel.from_pretrained(
        location, revision=revision, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_loaded(report, what)
    return network


def open_clip_processor(location: str, revision: str | None = None) -> Callable[[Tensor], Tensor]:
    """A function from images [B, 3, H, W] in [0, 1] to pixels, by the model's own image processor, which uses PIL."""
    from transformers import CLIPImageProcessorPil

    from epd_ray.rewards.preprocess import to_bytes

    processor = CLIPImageProcessorPil.from_pretrained(location, revision=revision)

    def pixels(images: Tensor) -> Tensor:
        arrays = list(to_bytes(images).permute(0, 2, 3, 1).numpy())
        processed: Tensor = processor(arrays, return_tensors="pt").pixel_values
        return processed

    return pixels


def open_square_processor(location: str, revision: str | None) -> Callable[[Tensor], Tensor]:
    """As `open_clip_processor`, but a picture that is not square is seen whole, between bars of the mean colour."""
    from transformers import CLIPImageProcessorPil

    from epd_ray.rewards.preprocess import as_pictures, on_square

    find_file(location, PROCESSOR_FILES, revision)
    processor = CLIPImageProcessorPil.from_pretrained(resolve_model(location), revision=revision)
    colour = tuple(int(value * 255) for value in processor.image_mean)

    def pixels(images: Tensor) -> Tensor:
        squares = [on_square(picture, colour) for picture in as_pictures(images)]
        processed: Tensor = processor(squares, return_tensors="pt").pixel_values
        return processed

    return pixels
