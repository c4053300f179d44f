"""Soft-TIFA of GenEval 2 (Kamath et al. 2025): how probable a model finds the expected answer to each of a prompt's
questions, its atoms, such as how many of a thing there are.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.errors import ConfigError, RewardError
from epd_ray.rewards.batches import check_batch_size, check_sides, place
from epd_ray.rewards.columns import read_column
from epd_ray.rewards.vlm import ChatModel

COLUMN = "vqa_list"
QUESTION = "{question} Answer in one word."
NUMBERS = {
    word: str(i)
    for i, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), start=1)
}
MEANS = ("geometric", "arithmetic")

Atom = tuple[str, str]
"""A question and its expected answer."""


class GenEval2Head:
    """Scores by the mean, from 0 to 1, of the probabilities of the expected answers to a prompt's questions.

    The column `vqa_list` of a prompt's row has the questions and answers, [["How many cows are in the image?", "two"],
    ["Are the cows brown?", "Yes"]], as a list or as its JSON text; this is the column of GenEval 2's own file. The
    probability of an answer is that of its first token, summed over its spellings: with a capital letter and without,
    after a space or not, and a number also as a digit.

    Args:
        model: directory or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of the network ("auto": bfloat16 on CUDA, else float32).
        batch_size: number of questions per forward pass.
        mean: "geometric" judges the prompt as a whole, "arithmetic" its atoms one by one.

    Raises:
        ModelError: the model is missing, damaged, or of another kind.

    Source: facebookresearch/GenEval2, evaluation.py, soft_tifa_gm and soft_tifa_am.
    """

    needs: tuple[str, ...] = (COLUMN,)

    def __init__(
        self,
        *,
        model: str = "Qwen/Qwen3-VL-8B-Instruct",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
        mean: Literal["geometric", "arithmetic"] = "geometric",
    ) -> None:
        if mean not in MEANS:
            raise ConfigError([f"mean {mean!r} is unknown: use {' or '.join(MEANS)}"])
        self.model_id, self.revision, self.batch_size = model, revision, check_batch_size(batch_size)
        self._geometric = mean == "geometric"
        torch_device, torch_dtype = place(device, dtype, torch.bfloat16)
        self._chat = ChatModel(model, revision, device=torch_device, dtype=torch_dtype, head="geneval2")

    def score(
        self, images: Tensor, prompts: Sequence[str], *, rows: Sequence[Mapping[str, JsonValue]] | None = None
    ) -> Tensor:
        """The scores [B], float32, of images [B, 3, H, W] by the questions in the rows of B prompts.

        Raises:
            RewardError: a row has no questions, or they are not as described above.
        """
        values = read_column("geneval2", COLUMN, prompts, rows)
        lists = [read_atoms(value, prompt) for value, prompt in zip(values, prompts, strict=True)]
        check_sides(images)
        owners = torch.tensor([i for i, atoms in enumerate(lists) for _ in atoms], dtype=torch.long)
        logs = self._answer_logs(images, owners, [atom for atoms in lists for atom in atoms])
        parts = logs if self._geometric else logs.exp()
        counts = torch.tensor([len(atoms) for atoms in lists])
        means = torch.zeros(len(lists)).index_add(0, owners, parts) / counts
        return means.exp() if self._geometric else means

    def _answer_logs(self, images: Tensor, owners: Tensor, atoms: list[Atom]) -> Tensor:
        """The logarithms, float32 on the CPU, of the answers' probabilities; atom i is about images[owners[i]]."""
        found = [torch.empty(0)]
        for start in range(0, len(atoms), self.batch_size):
            part = slice(start, start + self.batch_size)
            questions = [QUESTION.format(question=question) for question, _ in atoms[part]]
            logs = self._chat.log_probabilities(images[owners[part]], questions)
            found.extend(
                row[self._tokens(answer)].logsumexp(0, keepdim=True).cpu()
                for row, (_, answer) in zip(logs, atoms[part], strict=True)
            )
        return torch.cat(found)

    def _tokens(self, answer: str) -> list[int]:
        """The ids of the first tokens of an answer's spellings, each once."""
        return sorted({self._chat.first_token(spelling) for spelling in spellings(answer)})


def spellings(answer: str) -> list[str]:
    """How a model may write an answer of one word."""
    words = [answer.lower(), answer.capitalize(), *([NUMBERS[answer.lower()]] if answer.lower() in NUMBERS else [])]
    return [*words, *(f" {word}" for word in words)]


def read_atoms(value: JsonValue, prompt: str) -> list[Atom]:
    """The questions and answers in a row's column.

    Raises:
        RewardError: it holds no list of pairs of texts.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    pairs = found if isinstance(found, list) else []
    atoms = [atom for pair in pairs if (atom := read_pair(pair))]
    if not atoms or len(atoms) != len(pairs):
        raise RewardError(
            "geneval2",
            f"the column {COLUMN!r} of prompt {prompt[:60]!r} is {str(value)[:60]!r}: give pairs of a question and its "
            'answer, [["Is there a cow?", "Yes"]]',
        )
    return atoms


def read_pair(pair: JsonValue) -> Atom | None:
    """A question and its answer, if `pair` is a list of two texts that are not blank."""
    texts = [text.strip() for text in pair if isinstance(text, str)] if isinstance(pair, list) else []
    return (texts[0], texts[1]) if len(texts) == 2 == len(pair) and all(texts) else None  # type: ignore[arg-type]
