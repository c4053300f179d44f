"""UnifiedReward (Wang et al. 2025): a chat model that writes marks from 1 to 5 for a picture and its prompt."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from epd_ray.errors import ConfigError, RewardError
from epd_ray.rewards.batches import check_batch_size, in_batches, place
from epd_ray.rewards.vlm import ChatModel, check_question, fill

QUESTION = """\
You are presented with a generated image and its associated text caption. Your task is to analyze the image across \
multiple dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""
MARKS = ("Alignment", "Coherence", "Style")
LOW, HIGH = 1.0, 5.0


class UnifiedRewardHead:
    """Scores by (x - 1) / 4, from 0 to 1, where x is the mean of the marks in the answer that the model writes.

    Args:
        model: directory or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of the network ("auto": bfloat16 on CUDA, else float32).
        batch_size: number of pictures per forward pass.
        question: what the model is asked, with {prompt} where the prompt stands. The default is that of version 2.0.
        marks: the words before " Score" whose marks are wanted, such as ["Final"] for the first version's question.
        max_new_tokens: largest length of an answer, in tokens.

    Raises:
        ModelError: the model is missing, damaged, or of another kind.

    Source: CodeGoat24/UnifiedReward, UnifiedReward-2.0-inference/point_score_ACS_image_generation.py. The most likely
        answer is taken.
    """

    def __init__(
        self,
        *,
        model: str = "CodeGoat24/UnifiedReward-2.0-qwen-7b",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
        question: str = QUESTION,
        marks: Sequence[str] = MARKS,
        max_new_tokens: int = 4096,
    ) -> None:
        if not marks or max_new_tokens < 1:
            raise ConfigError([f"marks {list(marks)} and max_new_tokens {max_new_tokens}: give at least one of each"])
        self.model_id, self.revision, self.batch_size = model, revision, check_batch_size(batch_size)
        self._question, self._marks, self._longest = check_question(question), tuple(marks), max_new_tokens
        torch_device, torch_dtype = place(device, dtype, torch.bfloat16)
        self._chat = ChatModel(model, revision, device=torch_device, dtype=torch_dtype, head="unifiedreward")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores [B], float32, of images [B, 3, H, W] and B prompts.

        Raises:
            RewardError: an answer lacks a mark; it is quoted from its beginning.
        """
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        questions = [fill(self._question, prompt) for prompt in prompts]
        answers = self._chat.answers(images, questions, self._longest)
        means = torch.tensor([mean_mark(answer, self._marks) for answer in answers])
        return (means - LOW) / (HIGH - LOW)


def mean_mark(answer: str, marks: Sequence[str]) -> float:
    """The mean, from 1 to 5, of the marks in an answer such as "Alignment Score (1-5): 2.69".

    Args:
        answer: the text that the model wrote.
        marks: the words before " Score", each of which has to be there once.

    Raises:
        RewardError: a mark is missing, there twice, or outside 1 to 5.
    """
    found = []
    for mark in marks:
        values = re.findall(rf"\b{re.escape(mark)} Score(?: \(1-5\))?:\s*(\d+(?:\.\d+)?)", answer)
        if len(values) != 1 or not LOW <= float(values[0]) <= HIGH:
            raise RewardError(
                "unifiedreward",
                f"an answer has no {mark} Score from {LOW:g} to {HIGH:g}: it begins {answer[:80]!r} (is it a model of "
                "UnifiedReward, and is `question` its question?)",
            )
        found.append(float(values[0]))
    return sum(found) / len(found)
