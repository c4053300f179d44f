"""VQAScore (Lin et al. 2024): the probability that a model answers "Yes" when asked whether a picture shows its prompt.

The published package offers this question for the Qwen-VL models; its other models differ in wording alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from epd_ray.rewards.batches import check_batch_size, in_batches, place
from epd_ray.rewards.vlm import ChatModel, check_question, fill

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'
ANSWER = "Yes"


class VqaScoreHead:
    """Scores by the probability, from 0 to 1, that the answer to the question begins with "Yes".

    Args:
        model: directory or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of the network ("auto": bfloat16 on CUDA, else float32).
        batch_size: number of pictures per forward pass.
        question: what the model is asked, with {prompt} where the prompt stands.

    Raises:
        ModelError: the model is missing, damaged, or of another kind.

    Source: linzhiqiu/t2v_metrics, Qwen2VLModel.forward, without the penalty on repeated words that the settings of
        some models add to the probabilities.
    """

    def __init__(
        self,
        *,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
        question: str = QUESTION,
    ) -> None:
        self.model_id, self.revision, self.batch_size = model, revision, check_batch_size(batch_size)
        self._question = check_question(question)
        torch_device, torch_dtype = place(device, dtype, torch.bfloat16)
        self._chat = ChatModel(model, revision, device=torch_device, dtype=torch_dtype, head="vqascore")
        self._yes = self._chat.first_token(ANSWER)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        questions = [fill(self._question, prompt) for prompt in prompts]
        return self._chat.log_probabilities(images, questions)[:, self._yes].exp()
