"""VQAScore (Lin et al. 2024): how probable a model finds the answer "Yes" to whether a picture shows its prompt."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from epd_ray.errors import ModelError, shown
from epd_ray.rewards import clip_t5
from epd_ray.rewards.batches import check_batch_size, in_batches, place
from epd_ray.rewards.checkpoints import find_file
from epd_ray.rewards.clip_t5 import ClipT5
from epd_ray.rewards.vlm import ChatModel, check_question, fill
from epd_ray.weights.hub import opening

Judge = Callable[[Tensor, Sequence[str]], Tensor]
"""A function from images [b, 3, H, W] and b questions to the probabilities [b] of ANSWER."""

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'
ANSWER = "Yes"


class VqaScoreHead:
    """Scores by the probability, from 0 to 1, that the answer to the question begins with "Yes".

    Args:
        model: directory or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model, or of a CLIP-FlanT5.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of the network ("auto": bfloat16 on CUDA, else float32).
        batch_size: number of pictures per forward pass.
        question: what the model is asked, with {prompt} where the prompt stands; None is the published package's
            question for that kind of model.

    Raises:
        ModelError: the model is missing, damaged, or of another kind.

    Source: linzhiqiu/t2v_metrics, Qwen2VLModel.forward and CLIPT5Model.forward, without the penalty on repeated words
        that the settings of some models add to the probabilities.
    """

    def __init__(
        self,
        *,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
        question: str | None = None,
    ) -> None:
        self.model_id, self.revision, self.batch_size = model, revision, check_batch_size(batch_size)
        if question is not None:
            check_question(question)
        torch_device, torch_dtype = place(device, dtype, torch.bfloat16)
        with opening(model, "vqascore model"):
            config = read_config(model, revision)
        if config.get("model_type") == clip_t5.KIND:
            self._question = question or clip_t5.QUESTION
            self._judge: Judge = ClipT5(
                model, revision, config, device=torch_device, dtype=torch_dtype, answer=ANSWER
            ).probabilities
        else:
            self._question = question or QUESTION
            self._judge = ask_chat(ChatModel(model, revision, device=torch_device, dtype=torch_dtype, head="vqascore"))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self._judge(images, [fill(self._question, prompt) for prompt in prompts])


def ask_chat(chat: ChatModel) -> Judge:
    """The probability that a chat model's answer begins with ANSWER."""
    token = chat.first_token(ANSWER)
    return lambda images, questions: chat.log_probabilities(images, questions)[:, token].exp()


def read_config(model: str, revision: str | None) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        ModelError: it is missing, or no JSON object.
    """
    found = json.loads(find_file(model, ["config.json"], revision).read_text())
    if not isinstance(found, dict):
        raise ModelError(f"config.json of vqascore model {shown(model)} holds no object: fetch the published file")
    return found
