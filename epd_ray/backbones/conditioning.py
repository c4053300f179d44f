"""Encoded prompts, and classifier-free guidance over them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]
"""network(x [B, ...], sigma [B], tensors of B rows each) returns dx/dsigma [B, ...], float32."""


@dataclass(frozen=True)
class TextConditioning:
    """B encoded prompts; with classifier-free guidance, each tensor has B rows for no prompt before them.

    Attributes:
        tensors: the network's inputs beside the latents, each with B rows, or 2B with classifier-free guidance.
        rows: B.
        guidance_scale: the guidance scale; a model with embedded guidance takes it as an input.
        guided: whether classifier-free guidance is used, so that the network runs for both halves.
    """

    tensors: tuple[Tensor, ...]
    rows: int
    guidance_scale: float
    guided: bool

    def __len__(self) -> int:
        return self.rows

    def repeat(self, k: int) -> "TextConditioning":
        """Each row k times in a row (row b * k + i), separately in each half."""
        tensors = tuple(t.repeat_interleave(k, 0) for t in self.tensors)
        return TextConditioning(tensors, self.rows * k, self.guidance_scale, self.guided)


def guided_drift(network: Network, x: Tensor, sigma: Tensor, conditioning: TextConditioning) -> Tensor:
    """The drift with guidance: both halves of classifier-free guidance are one forward pass, mixed in float32.

    Args:
        network: returns the drift without guidance, see `Network`.
        x: [B, ...], the state.
        sigma: [B], > 0.
        conditioning: B encoded prompts.

    Returns:
        dx/dsigma [B, ...], float32.

    Source: classifier-free guidance (arXiv 2207.12598); mixing denoised pictures is the same as mixing drifts.
    """
    if not conditioning.guided:
        return network(x, sigma, conditioning.tensors)
    empty, text = network(torch.cat([x, x]), torch.cat([sigma, sigma]), conditioning.tensors).chunk(2)
    return empty + conditioning.guidance_scale * (text - empty)
