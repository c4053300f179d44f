"""CLIP score, computed with any transformers CLIPModel."""

from collections.abc import Sequence

from torch import Tensor

from epd_ray.embedded.models import resolve_model
from epd_ray.errors import shown
from epd_ray.rewards.batches import check_batch_size, place
from epd_ray.rewards.text import PromptTokenizer, open_tokenizer
from epd_ray.rewards.towers import ClipTowers, open_clip_model, open_clip_processor
from epd_ray.weights.hub import opening


class ClipHead:
    """Scores by the cosine of image and text embedding (Radford et al. 2021; CLIPScore, Hessel et al. 2021).

    Pictures are resized with PIL by the model's own image processor, as in the model's training.

    Args:
        model: directory of a CLIPModel, hub id, or name of an embedded model.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of the network ("auto": float16 on CUDA, else float32); the cosine is computed in float32.
        batch_size: number of pictures per forward pass.
        scaled: multiply the cosine by the model's exp(logit_scale), as PickScore does.

    Raises:
        ModelError: the model is missing, damaged, or not a CLIPModel.
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
        torch_device, torch_dtype = place(device, dtype)
        location = resolve_model(model)
        with opening(model, "CLIP model"):
            network = open_clip_model(location, revision, f"CLIP model {shown(model)}")
            pixels = open_clip_processor(location, revision)
        tokenizer = open_tokenizer(CLIPTokenizer, model, revision)
        length = network.config.text_config.max_position_embeddings
        self._towers = ClipTowers(
            network, PromptTokenizer(tokenizer, length, head=f"clip ({model})", cleaned=True), pixels,
            device=torch_device, dtype=torch_dtype, batch_size=check_batch_size(batch_size),
        )  # fmt: skip

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = self._towers.cosine(images, prompts)
        return cosine * self._towers.scale if self.scaled else cosine
