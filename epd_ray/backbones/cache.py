"""A cache of prompt embeddings with a bounded size."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor

Embedding = tuple[Tensor, ...]

Prompt = str | None
"""A prompt; None stands for no prompt, which classifier-free guidance needs and models may embed unlike the text ""."""


class EmbeddingCache:
    """A least-recently-used cache with a bound in bytes.

    Prompts are encoded one at a time, so that the last bits of an embedding do not depend on the other prompts of a
    batch.

    Args:
        encode: returns the tensors of one prompt.
        max_bytes: bound on the size of all kept tensors together.
    """

    def __init__(self, encode: Callable[[Prompt], Embedding], max_bytes: int) -> None:
        self._encode, self.max_bytes = encode, max_bytes
        self._kept: OrderedDict[Prompt, Embedding] = OrderedDict()
        self.num_bytes = 0

    def __call__(self, prompts: Sequence[Prompt]) -> list[Embedding]:
        """The embeddings of the prompts, in order."""
        return [self._one(prompt) for prompt in prompts]

    def clear(self) -> None:
        """Drop all embeddings."""
        self._kept.clear()
        self.num_bytes = 0

    def _one(self, prompt: Prompt) -> Embedding:
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
        embedding = self._encode(prompt)
        self._kept[prompt] = embedding
        self.num_bytes += _size(embedding)
        while self.num_bytes > self.max_bytes and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= _size(dropped)
        return embedding


def _size(embedding: Embedding) -> int:
    return sum(t.numel() * t.element_size() for t in embedding)
