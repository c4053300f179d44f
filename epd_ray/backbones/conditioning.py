"""Encoded prompts, and classifier-free guidance over them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from epd_ray.errors import TableError

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


def per_row(scale: float | Tensor, x: Tensor) -> Tensor:
    """A guidance scale for each row of x [B, ...], [B]; `scale` is one number or already [B]."""
    return scale.to(x).expand(len(x)) if isinstance(scale, Tensor) else x.new_full(x.shape[:1], scale)


def guided_at(
    network: Callable[[Tensor, Tensor, tuple[Tensor, ...], Tensor | float], Tensor],
    x: Tensor,
    sigma: Tensor,
    conditioning: TextConditioning,
    scale: Tensor | None,
    difference: Tensor | None,
    *,
    classifier_free: bool,
) -> tuple[Tensor, Tensor | None]:
    """The drift at a guidance scale of its own, see `types.Guidable`.

    Args:
        network: see `Network`; its last argument is the scale, which a model with embedded guidance takes as an input.
        x: [B, ...], the state.
        sigma: [B], > 0.
        conditioning: B encoded prompts.
        scale: a number or [B]; None takes that of the conditioning.
        difference: [B, ...], of an earlier evaluation; None asks for both passes.
        classifier_free: whether the model's guidance asks the network again without the prompt.
    """
    own: Tensor | float = conditioning.guidance_scale if scale is None else scale.to(x)
    if not classifier_free:
        return network(x, sigma, conditioning.tensors, own), None
    highest = float(torch.as_tensor(own).max())
    if highest > 1 and not conditioning.guided:
        raise TableError(
            f"the table sets guidance scale {highest:g}, but the prompts were encoded for "
            f"{conditioning.guidance_scale:g}: give a guidance scale above 1"
        )
    factor = own.reshape(-1, *[1] * (x.ndim - 1)) if isinstance(own, Tensor) and own.ndim else own
    if difference is not None or highest <= 1:
        rows = conditioning.rows
        text = network(x, sigma, tuple(t[-rows:] for t in conditioning.tensors), own)
        return text if difference is None else text + (factor - 1) * difference.to(text), None
    empty, text = network(torch.cat([x, x]), torch.cat([sigma, sigma]), conditioning.tensors, own).chunk(2)
    return empty + factor * (text - empty), text - empty


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
