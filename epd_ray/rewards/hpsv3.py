"""HPSv3 (Ma et al. 2025): Qwen2-VL with a small network that reads a score and its uncertainty off a token of its own.

The question is the one that the model was trained with, character by character.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from epd_ray.embedded.models import resolve_model
from epd_ray.errors import ModelError, shown
from epd_ray.rewards.batches import cautious, check_batch_size, check_risk, in_batches, place
from epd_ray.rewards.checkpoints import (
    Tensors,
    check_loaded,
    companion,
    find_file,
    linear_layers,
    part,
    read_tensors,
)
from epd_ray.rewards.vlm import PLACE, ChatInputs, fill, open_config, refuse_token
from epd_ray.weights.hub import opening

CHECKPOINTS = ("HPSv3.safetensors", "HPSv3.pth")
BASE = "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28  # of a picture: 256 tokens
TOKEN = "<|Reward|>"
QUESTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being "
    "the best. \n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. "
    "\n\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
    "without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, "
    "but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the "
    "image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    f"Textual prompt - {PLACE}\n\n\n"
    f"\nPlease provide the overall ratings of this image: {TOKEN}\n\nEND\n"
)


class HpsV3Head:
    """Scores human preference, on a scale without bounds; the model also says how certain it is.

    Args:
        model: directory or hub id that holds HPSv3.safetensors.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of Qwen2-VL ("auto": bfloat16 on CUDA, else float32); the last network runs in float32.
        batch_size: number of pictures per forward pass.
        base: directory or hub id of the configuration, tokenizer and image processor; None takes the model directory if
            it holds them, else BASE, which HPSv3 was fine-tuned from.
        pixels: the number of pixels that each picture is resized to, about.
        risk: how many standard deviations, of the model's own uncertainty, are subtracted from its score, >= 0.

    Raises:
        ModelError: the model is missing, damaged, or of another kind.

    Source: MizzenAI/HPSv3, HPSv3RewardInferencer.reward (the first of two outputs); exp of the second is the standard
        deviation, as in its training loss.
    """

    def __init__(
        self,
        *,
        model: str = "MizzenAI/HPSv3",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
        base: str | None = None,
        pixels: int = PIXELS,
        risk: float = 0.0,
    ) -> None:
        self.model_id, self.revision, self.batch_size = model, revision, check_batch_size(batch_size)
        self._risk = check_risk(risk)
        self._device, self._dtype = place(device, dtype, torch.bfloat16)
        source = companion(model, base, BASE, ["config.json"])
        with opening(source, "base model of HPSv3"):
            config = open_config(source, None, "base model of HPSv3")
        with opening(model, "HPSv3 model"):
            tensors = read_tensors(find_file(model, CHECKPOINTS, revision))
            network = open_network(tensors, config, self._dtype, f"HPSv3 model {shown(model)}")
            layers = linear_layers(tensors, "rm_head.")
        self._inputs = ChatInputs(resolve_model(source), None, config, head="hpsv3", pixels=pixels, added=[TOKEN])
        self._token = self._inputs.tokenizer.convert_tokens_to_ids(TOKEN)
        if self._token >= config.text_config.vocab_size:
            raise ModelError(
                f"HPSv3 model {shown(model)} has {config.text_config.vocab_size} tokens, but {TOKEN} is number "
                f"{self._token} of the tokenizer of {shown(source)}: set `base` to the model that it was trained from"
            )
        self._network = network.to(self._device).eval().requires_grad_(False)
        self._layers = with_relu(layers).to(self._device)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return in_batches(self._score, images, prompts, self.batch_size)

    @torch.inference_mode()
    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        for prompt in prompts:
            refuse_token("hpsv3", prompt, TOKEN)
        inputs = self._inputs(images, [fill(QUESTION, prompt) for prompt in prompts])
        inputs = {name: tensor.to(self._device) for name, tensor in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        hidden = self._network(**inputs).last_hidden_state
        mean, log_deviation = self._layers(hidden[inputs["input_ids"] == self._token].float()).unbind(-1)  # [b, 2]
        return cautious("hpsv3", mean, log_deviation.exp(), self._risk)


def open_network(tensors: Tensors, config: Any, dtype: torch.dtype, what: str) -> Any:
    """Qwen2-VL without its last layer, from HPSv3's tensors, which have the names of any version of transformers.

    Args:
        tensors: the checkpoint; those of the last network are left out.
        config: the base model's configuration, which takes the checkpoint's number of tokens.
        dtype: precision of the network.
        what: kind and name of the model, for the error message.

    Raises:
        ModelError: weights are missing, or have other shapes than the configuration says.
    """
    from transformers import AutoModelForImageTextToText

    embeddings = [tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight")]
    if len(embeddings) != 1 or not part(tensors, "rm_head."):
        raise ModelError(f"{what} lacks embed_tokens.weight or rm_head.*: is it another model's file?")
    config.text_config.vocab_size = len(embeddings[0])  # the trainer has cut the unused ones and added its own
    kind = AutoModelForImageTextToText._model_mapping[type(config)]
    network, report = kind.from_pretrained(
        None, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
        state_dict={name: tensor for name, tensor in tensors.items() if not name.startswith("rm_head.")},
    )  # fmt: skip
    check_loaded(report, what)
    return network.model


def with_relu(layers: nn.Sequential) -> nn.Sequential:
    """The same linear layers with ReLU between them.

    Raises:
        ModelError: the last one does not give two numbers, a score and its uncertainty.
    """
    if layers[-1].out_features != 2:
        raise ModelError(
            f"last layer of HPSv3 gives {layers[-1].out_features} numbers, expected 2: is it another model?"
        )
    spaced = [module for layer in layers for module in (layer, nn.ReLU())]
    return nn.Sequential(*spaced[:-1])
