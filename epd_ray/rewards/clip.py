"""CLIP score, over any transformers CLIPModel."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from epd_ray.assets import require_vocabulary, resolve_model
from epd_ray.devices import pick_device, pick_dtype
from epd_ray.errors import ModelError


class ClipHead:
    """Cosine between image and text embeddings (Radford et al. 2021; CLIPScore, Hessel et al. 2021).

    Pictures go through the model's own image processor in its PIL form, as the models were trained.

    Args:
        model: a CLIPModel directory, a hub id, or the name of an embedded model.
        device: as everywhere.
        dtype: of the network; the score is float32.
        scaled: multiply by the model's exp(logit_scale), as PickScore does.
    """

    def __init__(self, *, model: str, device: str = "auto", dtype: str = "float32", scaled: bool = False) -> None:
        from safetensors import SafetensorError
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        location = resolve_model(model)
        self.model_id, self.scaled = model, scaled
        self.device, self.dtype = pick_device(device), pick_dtype(dtype)
        try:
            self.network = CLIPModel.from_pretrained(location, dtype=self.dtype).to(self.device).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(location)
            self.processor = CLIPImageProcessorPil.from_pretrained(location)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"CLIP model {model!r} cannot be opened: {str(error).splitlines()[0]}") from error
        require_vocabulary(model, [self.tokenizer])

    @torch.inference_mode()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = self.pixels(images).to(self.device, self.dtype)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.network.config.text_config.max_position_embeddings,
        ).to(self.device)  # fmt: skip
        image = self.network.get_image_features(pixel_values=pixels).pooler_output.float()
        text = self.network.get_text_features(**tokens).pooler_output.float()
        scores = cosine_similarity(image, text, dim=-1)
        return (scores * self.network.logit_scale.exp().float() if self.scaled else scores).cpu()

    def pixels(self, images: Tensor) -> Tensor:
        """Preprocessed pixels [B, 3, S, S]; images are rounded to 8 bits first, as a saved file would be."""
        arrays = list((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        processed: Tensor = self.processor(arrays, return_tensors="pt").pixel_values
        return processed
