"""Prompts to token ids: cleaned as each model's own tokenizer cleans them, cut where its text encoder ends."""

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
    """Mend encodings, straighten quotes, split ligatures, undo HTML entities.

    Source: OpenAI's CLIP tokenizer. transformers' does none of it, so other ids come out of curly quotes or "&amp;".
    """
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def open_tokenizer(kind: Any, location: str, revision: str | None = None) -> Any:
    """A tokenizer of a transformers class, from a directory, a hub id or an embedded model's name.

    Raises:
        ModelError: its files are missing; transformers would make up a tokenizer without words.
    """
    with opening(location, "tokenizer"):
        find_file(location, TOKENIZER_FILES, revision)
        tokenizer = kind.from_pretrained(resolve_model(location), revision=revision)
    require_vocabulary(location, [tokenizer])
    return tokenizer


class PromptTokenizer:
    """A transformers tokenizer at one length, which says once that prompts are longer.

    Args:
        tokenizer: of transformers.
        length: tokens that the text encoder takes, special ones included.
        head: whose warning it is.
        cleaned: whether prompts go through `clean` first.
        padding: the id behind a prompt's end; the tokenizer's own when None.

    Attributes:
        cut: prompts that were longer, so far.
    """

    def __init__(
        self, tokenizer: Any, length: int, *, head: str, cleaned: bool = False, padding: int | None = None
    ) -> None:
        self.tokenizer, self.length, self.head, self.cleaned = tokenizer, length, head, cleaned
        self.padding, self.cut = padding, 0

    def __call__(self, prompts: Sequence[str]) -> Any:
        """input_ids and attention_mask, [B, length] each."""
        texts = [clean(prompt) if self.cleaned else prompt for prompt in prompts]
        whole = self.tokenizer(texts, verbose=False).input_ids  # verbose: transformers' own warning names no prompt
        too_long = [prompt for prompt, ids in zip(prompts, whole, strict=True) if len(ids) > self.length]
        if too_long and not self.cut:
            logger.warning(
                "%s reads %d tokens: %d of %d prompts are longer and were cut, %r among them (said once)",
                self.head, self.length, len(too_long), len(texts), too_long[0][:60],
            )  # fmt: skip
        self.cut += len(too_long)
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        if self.padding is not None:
            tokens["input_ids"] = tokens.input_ids.masked_fill(tokens.attention_mask == 0, self.padding)
        return tokens
