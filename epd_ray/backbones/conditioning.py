"""Encoded prompts, and classifier-free guidance over them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]
"""network(x [B, ...], sigma [B], tensors of B rows each) -> dx/dsigma [B, ...], float32."""


@dataclass(frozen=True)
class TextConditioning:
    """B encoded prompts; with guidance, the first B rows of each tensor are the empty prompt's.

    Attributes:
        tensors: what the network takes beside the latents, each with B rows, or 2B with guidance.
        rows: B.
        guidance_scale: as asked for; what a model with embedded guidance is told.
        guided: whether the network runs for both halves.
    """

    tensors: tuple[Tensor, ...]
    rows: int
    guidance_scale: float
    guided: bool

    def __len__(self) -> int:
        return self.rows

    def repeat(self, k: int) -> "TextConditioning":
        """Each row k times in a row (b*k + i), within each half."""
        tensors = tuple(t.repeat_interleave(k, 0) for t in self.tensors)
        return TextConditioning(tensors, self.rows * k, self.guidance_scale, self.guided)


def guided_drift(network: Network, x: Tensor, sigma: Tensor, conditioning: TextConditioning) -> Tensor:
    """The network's drift; both halves of classifier-free guidance in one forward, mixed in float32.

    Args:
        network: see Network.
        x: [B, ...].
        sigma: [B].
        conditioning: of B rows.

    Returns:
        dx/dsigma [B, ...], float32.

    Source: classifier-free guidance (arXiv 2207.12598); mixing denoisers is mixing drifts.
    """
    if not conditioning.guided:
        return network(x, sigma, conditioning.tensors)
    empty, text = network(torch.cat([x, x]), torch.cat([sigma, sigma]), conditioning.tensors).chunk(2)
    return empty + conditioning.guidance_scale * (text - empty)
