"""Vision-language chat models of the Qwen-VL kind, which are asked a question about each picture, in batches."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epd_ray.embedded.models import resolve_model
from epd_ray.errors import ConfigError, ModelError, RewardError, shown
from epd_ray.rewards.checkpoints import PROCESSOR_FILES, check_loaded, find_file
from epd_ray.rewards.preprocess import as_pictures
from epd_ray.rewards.text import open_tokenizer
from epd_ray.weights.hub import opening

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""The model types, in transformers' words, whose inputs are the ones that ChatInputs makes."""

PLACE = "{prompt}"  # where a prompt stands in a question


def fill(question: str, prompt: str) -> str:
    """The question about a picture with this prompt."""
    return question.replace(PLACE, prompt)


def check_question(question: str) -> str:
    """Return a question if it has a place for the prompt.

    Raises:
        ConfigError: it has none.
    """
    if PLACE not in question:
        raise ConfigError([f"question {shown(question)} lacks {PLACE}: write it where the prompt is to stand"])
    return question


def refuse_token(head: str, prompt: str, token: str) -> None:
    """Refuse a prompt that contains a token with a meaning of its own, since the model would read it as that.

    Raises:
        RewardError: the prompt contains the token.
    """
    if token in prompt:
        raise RewardError(head, f"prompt {prompt[:60]!r} contains {token}, which has a meaning of its own: remove it")


def open_config(model: str, revision: str | None, what: str) -> Any:
    """The configuration of a model of one of FAMILIES.

    Raises:
        ModelError: the model is of another kind.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolve_model(model), revision=revision)
    if config.model_type not in FAMILIES:
        raise ModelError(f"{what} {shown(model)} is a {config.model_type}: give a model of {', '.join(FAMILIES)}")
    return config


class ChatInputs:
    """Turns pictures and the questions about them into the inputs of a chat model.

    Args:
        location: directory or hub id that holds the tokenizer and the image processor.
        revision: branch, tag or commit on the hub; None is the default branch.
        config: the model's configuration, of one of FAMILIES.
        head: name of the reward head, for error messages.
        pixels: the number of pixels that each picture is resized to, about; None leaves it to the image processor.
        added: tokens that the model was trained with, beside those that its tokenizer has.

    Raises:
        ModelError: files are missing or damaged, or the chat template shows no pictures.
    """

    def __init__(
        self,
        location: str,
        revision: str | None,
        config: Any,
        *,
        head: str,
        pixels: int | None = None,
        added: Sequence[str] = (),
    ) -> None:
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

        self.head = head
        self.tokenizer = open_tokenizer(AutoTokenizer, location, revision)
        self.tokenizer.add_tokens(list(added), special_tokens=True)
        with opening(location, "image processor"):
            find_file(location, PROCESSOR_FILES, revision)  # transformers would take sizes of its own without them
            self._processor = Qwen2VLImageProcessorPil.from_pretrained(resolve_model(location), revision=revision)
            self._template = self.tokenizer.chat_template or read_template(location, revision)
        self._size = {} if pixels is None else {"size": {"shortest_edge": pixels, "longest_edge": pixels}}
        self._image_id = config.image_token_id
        self._image_token: str = self.tokenizer.convert_ids_to_tokens(self._image_id)
        if self._chat("").count(self._image_token) != 1:
            raise ModelError(f"chat template of {shown(location)} shows no picture: give a model that sees pictures")

    def __call__(self, images: Tensor, questions: Sequence[str]) -> dict[str, Tensor]:
        """The inputs for images [b, 3, H, W] in [0, 1] and b questions; texts are padded on the left.

        Raises:
            RewardError: a question contains the token that stands for a picture.
        """
        seen = self._processor(as_pictures(images), return_tensors="pt", **self._size)
        counts = seen.image_grid_thw.prod(-1) // self._processor.merge_size**2
        texts = [self._text(q, count) for q, count in zip(questions, counts.tolist(), strict=True)]
        tokens = self.tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        return {
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "mm_token_type_ids": (tokens.input_ids == self._image_id).int(),
            "pixel_values": seen.pixel_values,
            "image_grid_thw": seen.image_grid_thw,
        }

    def _text(self, question: str, count: int) -> str:
        refuse_token(self.head, question, self._image_token)
        return self._chat(question).replace(self._image_token, self._image_token * count)

    def _chat(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self._template, tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        return text


def read_template(location: str, revision: str | None) -> str:
    """The chat template of a model that keeps it beside its tokenizer, in chat_template.json.

    Raises:
        ModelError: there is no such file, or it holds no template.
    """
    found = json.loads(find_file(location, ["chat_template.json"], revision).read_text())
    template = found.get("chat_template") if isinstance(found, dict) else None
    if not isinstance(template, str):
        raise ModelError(f"chat_template.json of {shown(location)} holds no chat_template: fetch the published file")
    return template


class ChatModel:
    """A chat model that answers questions about pictures.

    Args:
        model: directory or hub id of a model of one of FAMILIES.
        revision: branch, tag or commit on the hub; None is the default branch.
        device: the device that the network runs on.
        dtype: precision of the network; the probabilities are computed in float32.
        head: name of the reward head, for error messages.

    Raises:
        ModelError: the model is missing, damaged, or of another kind.
    """

    def __init__(
        self, model: str, revision: str | None, *, device: torch.device, dtype: torch.dtype, head: str
    ) -> None:
        from transformers import AutoModelForImageTextToText, GenerationConfig

        what = f"{head} model"
        with opening(model, what):
            config = open_config(model, revision, what)
            # Opened in its final precision, since a model of 8 billion weights takes 32 GB in float32.
            network, report = AutoModelForImageTextToText.from_pretrained(
                resolve_model(model), revision=revision, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
            check_loaded(report, f"{what} {shown(model)}")
        self._inputs = ChatInputs(model, revision, config, head=head)
        self._device, self._dtype, self._model = device, dtype, model
        tokenizer = self._inputs.tokenizer
        ends = network.generation_config.eos_token_id or tokenizer.eos_token_id
        # The answer is the most likely one; a model's own settings would draw one, or punish repetition.
        network.generation_config = GenerationConfig(
            do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        )
        self._network = network.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def log_probabilities(self, images: Tensor, questions: Sequence[str]) -> Tensor:
        """The logarithms [b, V] of the probabilities of an answer's first token, float32, on the head's device."""
        logits = self._network(**self._prepared(images, questions), logits_to_keep=1).logits[:, -1]
        return torch.log_softmax(logits.float(), dim=-1)

    @torch.inference_mode()
    def answers(self, images: Tensor, questions: Sequence[str], max_new_tokens: int) -> list[str]:
        """The most likely answers to b questions about images [b, 3, H, W], of at most `max_new_tokens` each."""
        inputs = self._prepared(images, questions)
        tokens = self._network.generate(**inputs, max_new_tokens=max_new_tokens)
        written = tokens[:, inputs["input_ids"].shape[1] :]
        decoded: list[str] = self._inputs.tokenizer.batch_decode(written, skip_special_tokens=True)
        return decoded

    def first_token(self, text: str) -> int:
        """The id of the first token of a text."""
        ids: list[int] = self._inputs.tokenizer.encode(text, add_special_tokens=False)
        return ids[0]

    def _prepared(self, images: Tensor, questions: Sequence[str]) -> dict[str, Tensor]:
        inputs = {name: tensor.to(self._device) for name, tensor in self._inputs(images, questions).items()}
        return inputs | {"pixel_values": inputs["pixel_values"].to(self._dtype)}
