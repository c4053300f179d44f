"""Turns prompts into token ids, cleaned as by each model's original tokenizer and truncated to the model's length."""

import html
import logging
from collections.abc import Sequence
from typing import Any

import ftfy

from epd_ray.embedded.models import require_vocabulary, resolve_model
from epd_ray.rewards.checkpoints import TOKENIZER_FILES, find_file
from epd_ray.weights.hub import opening

logger = logging.getLogger(__name__)


def clean(text: str) -> str:
    """Repair wrong encodings, straighten quotes, split ligatures, decode HTML entities, and strip whitespace.

    Source: OpenAI's CLIP tokenizer. The one of transformers omits this, so that curly quotes or "&amp;" give other ids.
    """
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def open_tokenizer(kind: Any, location: str, revision: str | None = None) -> Any:
    """Open a tokenizer.

    Args:
        kind: tokenizer class of transformers.
        location: directory, hub id, or name of an embedded model.
        revision: branch, tag or commit on the hub; None is the default branch.

    Raises:
        ModelError: its files are missing; transformers itself would silently create a tokenizer without a vocabulary.
    """
    with opening(location, "tokenizer"):
        find_file(location, TOKENIZER_FILES, revision)
        tokenizer = kind.from_pretrained(resolve_model(location), revision=revision)
    require_vocabulary(location, [tokenizer])
    return tokenizer


class PromptTokenizer:
    """Tokenizes prompts to a fixed length, and warns once when prompts are truncated.

    Args:
        tokenizer: a tokenizer of transformers.
        length: number of tokens that the text encoder takes, special tokens included.
        head: name of the reward head in the warning.
        cleaned: whether `clean` is applied to the prompts first.
        padding: token id after a prompt's end; None takes the tokenizer's own.

    Attributes:
        cut: number of prompts truncated so far.
    """

    def __init__(
        self, tokenizer: Any, length: int, *, head: str, cleaned: bool = False, padding: int | None = None
    ) -> None:
        self.tokenizer, self.length, self.head, self.cleaned = tokenizer, length, head, cleaned
        self.padding, self.cut = padding, 0

    def __call__(self, prompts: Sequence[str]) -> Any:
        """The input_ids and attention_mask of B prompts, [B, length] each, as transformers returns them."""
        texts = [clean(prompt) if self.cleaned else prompt for prompt in prompts]
        untruncated = self.tokenizer(texts, verbose=False).input_ids  # transformers' own warning would name no prompt
        too_long = [prompt for prompt, ids in zip(prompts, untruncated, strict=True) if len(ids) > self.length]
        if too_long and not self.cut:
            logger.warning(
                "%s takes %d tokens: %d of %d prompts are longer and were truncated, such as %r (this warning is not"
                " repeated)", self.head, self.length, len(too_long), len(texts), too_long[0][:60],
            )  # fmt: skip
        self.cut += len(too_long)
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        if self.padding is not None:
            tokens["input_ids"] = tokens.input_ids.masked_fill(tokens.attention_mask == 0, self.padding)
        return tokens
