"""CLIP-FlanT5 (Lin et al. 2024), VQAScore's own model: a T5 that reads the patches of CLIP's image encoder as words."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from epd_ray.errors import ModelError, shown
from epd_ray.rewards.checkpoints import (
    TOKENIZER_FILES,
    WEIGHT_FILES,
    Tensors,
    check_loaded,
    companion,
    linear_layers,
    read_sharded,
)
from epd_ray.rewards.text import open_tokenizer
from epd_ray.rewards.towers import open_square_processor
from epd_ray.weights.hub import opening

KIND = "clip_t5"
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
TOKENIZER = "google/flan-t5-xxl"
BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)
AFTER = "\n{question} ASSISTANT: "
LAYER = -2  # of CLIP, whose patches are read


class ClipT5:
    """The probability of a short answer to a question about a picture.

    Args:
        model: directory or hub id of a CLIP-FlanT5.
        revision: branch, tag or commit on the hub; None is the default branch.
        config: its config.json. `mm_vision_tower` is the directory or hub id of the CLIP that was frozen in training.
        device: the device that the networks run on.
        dtype: precision of the networks; the probability is computed in float32.
        answer: the answer.

    Raises:
        ModelError: a model is missing, damaged, or of another kind.

    Source: linzhiqiu/t2v_metrics, CLIPT5Model.forward.
    """

    def __init__(
        self,
        model: str,
        revision: str | None,
        config: dict[str, Any],
        *,
        device: torch.device,
        dtype: torch.dtype,
        answer: str,
    ) -> None:
        from transformers import PreTrainedTokenizerFast

        what, tower = f"CLIP-FlanT5 model {shown(model)}", config.get("mm_vision_tower")
        if not isinstance(tower, str):
            raise ModelError(f"{what} names no mm_vision_tower in its config.json: fetch the published file")
        self._tokenizer = open_tokenizer(PreTrainedTokenizerFast, companion(model, None, TOKENIZER, TOKENIZER_FILES))
        with opening(model, "CLIP-FlanT5 model"):
            tensors = read_sharded(model, WEIGHT_FILES, revision)
            first, last = linear_layers(tensors, "mm_projector.")
            language = open_t5(tensors, config, dtype, what)
        with opening(tower, "image encoder of CLIP-FlanT5"):
            vision = open_vision(tower, dtype)
            self._pixels = open_square_processor(tower, None)
        if first.in_features != vision.config.hidden_size:
            raise ModelError(
                f"{what} takes patches of {first.in_features} numbers, but {shown(tower)} gives "
                f"{vision.config.hidden_size}: its config.json names another mm_vision_tower than it was trained with"
            )
        self._device, self._dtype = device, dtype
        self._projector = nn.Sequential(first, nn.GELU(), last).to(device, dtype)
        self._language, self._vision = (n.to(device).eval().requires_grad_(False) for n in (language, vision))
        self._before = self._ids(BEFORE)
        self._answer = self._ids(answer)

    @torch.inference_mode()
    def probabilities(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """The probabilities [b] of the answer, each the geometric mean of those of its tokens and of its end.

        Args:
            images: [b, 3, H, W], float in [0, 1].
            questions: b texts.
        """
        pixels = self._pixels(images).to(self._device, self._dtype)
        hidden = self._vision(pixel_values=pixels, output_hidden_states=True).hidden_states[LAYER][:, 1:]
        embed = self._language.get_input_embeddings()
        texts = [
            torch.cat((embed(self._before), picture, embed(self._ids(AFTER.format(question=question)))))
            for picture, question in zip(self._projector(hidden), questions, strict=True)
        ]
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        padded = pad_sequence(texts, batch_first=True)  # [b, T, D]
        mask = torch.arange(padded.shape[1], device=self._device) < lengths[:, None]
        labels = self._answer.repeat(len(texts), 1)
        logits = self._language(inputs_embeds=padded, attention_mask=mask.long(), labels=labels).logits
        losses = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")  # [b, tokens of the answer]
        return (-losses.mean(-1)).exp()

    def _ids(self, text: str) -> Tensor:
        """The token ids of a text; each piece of a question has its end token, as published."""
        return torch.tensor(self._tokenizer(text).input_ids, device=self._device)


def open_t5(tensors: Tensors, config: dict[str, Any], dtype: torch.dtype, what: str) -> Any:
    """The language model, from CLIP-FlanT5's tensors.

    Raises:
        ModelError: weights are missing, or have other shapes than config.json says.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    network, report = T5ForConditionalGeneration.from_pretrained(
        None, config=T5Config.from_dict(config), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
        state_dict={name: tensor for name, tensor in tensors.items() if not name.startswith(("mm_", "vision_tower"))},
    )  # fmt: skip
    check_loaded(report, what)
    return network


def open_vision(location: str, dtype: torch.dtype) -> Any:
    """CLIP's image encoder.

    Raises:
        ModelError: weights are missing.
    """
    from transformers import CLIPVisionModel

    network, report = CLIPVisionModel.from_pretrained(
        location, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_loaded(report, f"image encoder {shown(location)}")
    return network
