"""PickScore (Kirstain et al. 2023): CLIP ViT-H/14 fine-tuned on people's choices between two pictures."""

from collections.abc import Sequence

from torch import Tensor

from epd_ray.embedded.models import resolve_model
from epd_ray.errors import shown
from epd_ray.rewards.batches import check_batch_size, place
from epd_ray.rewards.checkpoints import PROCESSOR_FILES, TOKENIZER_FILES, companion
from epd_ray.rewards.text import PromptTokenizer, open_tokenizer
from epd_ray.rewards.towers import ClipTowers, open_clip_model, open_clip_processor
from epd_ray.weights.hub import opening

LAION = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The model whose tokenizer and image processor PickScore and MPS were trained with."""


class PickScoreHead:
    """Scores by exp(logit_scale) * cosine of image and text embedding; most scores lie between 15 and 25.

    Prompts are tokenized unchanged, as in the published example.

    Args:
        model: directory or hub id of a CLIPModel.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of the network ("auto": float16 on CUDA, else float32); the cosine is computed in float32.
        batch_size: number of pictures per forward pass.
        processor: directory or hub id of tokenizer and image processor; None takes the model directory if it holds
            them, else LAION, which PickScore was fine-tuned from.

    Raises:
        ModelError: the model is missing, damaged, or not a CLIPModel.
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
        torch_device, torch_dtype = place(device, dtype)
        tokenizer_source = companion(model, processor, LAION, TOKENIZER_FILES)
        processor_source = companion(model, processor, LAION, PROCESSOR_FILES)
        with opening(model, "PickScore model"):
            network = open_clip_model(resolve_model(model), revision, f"PickScore model {shown(model)}")
        tokenizer = open_tokenizer(CLIPTokenizer, tokenizer_source)
        with opening(processor_source, "image processor"):
            pixels = open_clip_processor(processor_source)
        length = network.config.text_config.max_position_embeddings
        self._towers = ClipTowers(
            network, PromptTokenizer(tokenizer, length, head="pickscore"), pixels,
            device=torch_device, dtype=torch_dtype, batch_size=check_batch_size(batch_size),
        )  # fmt: skip

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._towers.cosine(images, prompts) * self._towers.scale
