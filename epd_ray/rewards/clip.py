"""CLIP score, over any transformers CLIPModel."""

from collections.abc import Sequence

from torch import Tensor

from epd_ray.embedded.models import resolve_model
from epd_ray.rewards.batches import check_batch_size, place
from epd_ray.rewards.text import PromptTokenizer, open_tokenizer
from epd_ray.rewards.towers import ClipTowers, open_clip_model, open_clip_processor
from epd_ray.weights.hub import opening


class ClipHead:
    """Cosine between image and text embeddings (Radford et al. 2021; CLIPScore, Hessel et al. 2021).

    Pictures go through the model's own image processor in its PIL form, as the models were trained.

    Args:
        model: a CLIPModel directory, a hub id, or the name of an embedded model.
        revision: branch, tag or commit on the hub.
        device: as everywhere.
        dtype: of the network ("auto": float16 on CUDA, else float32); the score is float32.
        batch_size: pictures per forward pass.
        scaled: multiply by the model's exp(logit_scale), as PickScore does.

    Raises:
        ModelError: the model is missing, damaged, or no CLIPModel.
    """

    def __init__(
        self,
        *,
        model: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 64,
        scaled: bool = False,
    ) -> None:
        from transformers import CLIPTokenizer

        self.model_id, self.revision, self.scaled = model, revision, scaled
        where, precision = place(device, dtype)
        location = resolve_model(model)
        with opening(model, "CLIP model"):
            network = open_clip_model(location, revision, f"CLIP model {model!r}")
            pixels = open_clip_processor(location, revision)
        tokenizer = open_tokenizer(CLIPTokenizer, model, revision)
        length = network.config.text_config.max_position_embeddings
        self._towers = ClipTowers(
            network, PromptTokenizer(tokenizer, length, head=f"clip ({model})", cleaned=True), pixels,
            device=where, dtype=precision, batch_size=check_batch_size(batch_size),
        )  # fmt: skip

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = self._towers.cosine(images, prompts)
        return cosine * self._towers.scale if self.scaled else cosine
