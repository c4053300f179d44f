"""How well the text that a picture was asked to show can be read in it."""

from collections.abc import Mapping, Sequence

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.errors import RewardError
from epd_ray.rewards.batches import check_batch_size, in_batches, place
from epd_ray.rewards.columns import read_column
from epd_ray.rewards.readers import RAPID, GotReader, RapidReader

COLUMN = "target_text"


class OcrHead:
    """Scores by 1 - distance / length, from 0 to 1, of the text that is read in a picture and the one it should show.

    The column `target_text` of a prompt's row has that text. Case and spaces do not count. The distance is the number
    of letters to insert, delete or replace; it is 0 if the text stands anywhere in what was read, and at most the
    text's length, so that other words in the picture cost at most everything.

    Args:
        model: directory or hub id of GOT-OCR 2.0 in transformers' format, or rapidocr: the small reader for a CPU that
            comes with the extra "ocr" of this package.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU. rapidocr runs on the CPU.
        dtype: precision of the network ("auto": bfloat16 on CUDA, else float32).
        batch_size: number of pictures per forward pass.
        max_new_tokens: largest length of a text that GOT-OCR writes, in tokens.

    Raises:
        ModelError: the model is missing, damaged, or of another kind, or the extra is not installed.

    Source: flow_grpo, OcrScorer, whose reader is PaddleOCR. An error of the reader is raised here instead of scored 0.
    """

    needs: tuple[str, ...] = (COLUMN,)

    def __init__(
        self,
        *,
        model: str = "stepfun-ai/GOT-OCR-2.0-hf",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 8,
        max_new_tokens: int = 512,
    ) -> None:
        self.model_id, self.revision, self.batch_size = model, revision, check_batch_size(batch_size)
        torch_device, torch_dtype = place(device, dtype, torch.bfloat16)
        self._reader: GotReader | RapidReader = (
            RapidReader()
            if model == RAPID
            else GotReader(model, revision, device=torch_device, dtype=torch_dtype, longest=max_new_tokens)
        )

    def score(
        self, images: Tensor, prompts: Sequence[str], *, rows: Sequence[Mapping[str, JsonValue]] | None = None
    ) -> Tensor:
        """The scores [B], float32, of images [B, 3, H, W] by the texts in the rows of B prompts.

        Raises:
            RewardError: a row has no text.
        """
        values = read_column("ocr", COLUMN, prompts, rows)
        targets = [bare(str(value)) for value in values]
        if "" in targets:
            raise RewardError(
                "ocr", f"the column {COLUMN!r} of {prompts[targets.index('')][:60]!r} is blank: fill it in"
            )
        return in_batches(self._score, images, targets, self.batch_size)

    def _score(self, images: Tensor, targets: list[str]) -> Tensor:
        texts = self._reader.read(images)
        return torch.tensor([likeness(bare(text), target) for text, target in zip(texts, targets, strict=True)])


def bare(text: str) -> str:
    """A text in lower case without white space."""
    return "".join(text.lower().split())


def likeness(text: str, target: str) -> float:
    """1 - distance / length of two texts, from 0 to 1; the target has at least one letter."""
    if target in text:
        return 1.0
    return 1 - min(edit_distance(text, target), len(target)) / len(target)


def edit_distance(first: str, second: str) -> int:
    """The smallest number of letters to insert, delete or replace that turns one text into the other."""
    row = list(range(len(second) + 1))  # row[j]: distance of what was read of `first` and the first j of `second`
    for i, letter in enumerate(first, start=1):
        corner, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (letter != other))
    return row[-1]
