"""PickScore (Kirstain et al. 2023): CLIP ViT-H/14 fine-tuned on people's picks."""

from collections.abc import Sequence

from torch import Tensor

from epd_ray.embedded.models import resolve_model
from epd_ray.rewards.batches import check_batch_size, place
from epd_ray.rewards.checkpoints import PROCESSOR_FILES, TOKENIZER_FILES, companion
from epd_ray.rewards.text import PromptTokenizer, open_tokenizer
from epd_ray.rewards.towers import ClipTowers, open_clip_model, open_clip_processor
from epd_ray.weights.hub import opening

LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Whose tokenizer and image processor PickScore and MPS were trained and published with."""


class PickScoreHead:
    """exp(logit_scale) * cosine of the image and text embeddings, around 15 to 25.

    Prompts go to transformers' tokenizer as they are, as in the published example.

    Args:
        model: a CLIPModel directory or hub id.
        revision: branch, tag or commit of `model` on the hub.
        device: as everywhere.
        dtype: of the network ("auto": float16 on CUDA, else float32); the score is float32.
        batch_size: pictures per forward pass.
        processor: directory or hub id of tokenizer and image processor; by default the model directory's own where it
            has them, else those of the model that PickScore started from.

    Raises:
        ModelError: the model is missing, damaged, or no CLIPModel.
    """

    def __init__(
        self,
        *,
        model: str = "yuvalkirstain/PickScore_v1",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 32,
        processor: str | None = None,
    ) -> None:
        from transformers import CLIPTokenizer

        self.model_id, self.revision = model, revision
        where, precision = place(device, dtype)
        tokens_from = companion(model, processor, LAION, TOKENIZER_FILES)
        pixels_from = companion(model, processor, LAION, PROCESSOR_FILES)
        with opening(model, "PickScore model"):
            network = open_clip_model(resolve_model(model), revision, f"PickScore model {model!r}")
        tokenizer = open_tokenizer(CLIPTokenizer, tokens_from)
        with opening(pixels_from, "image processor"):
            pixels = open_clip_processor(pixels_from)
        length = network.config.text_config.max_position_embeddings
        self._towers = ClipTowers(
            network, PromptTokenizer(tokenizer, length, head="pickscore"), pixels,
            device=where, dtype=precision, batch_size=check_batch_size(batch_size),
        )  # fmt: skip

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._towers.cosine(images, prompts) * self._towers.scale
