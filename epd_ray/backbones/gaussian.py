"""Gaussian mixtures as diffusion models: the drift is exact, and for a single Gaussian the ODE's solution too."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor

from epd_ray.errors import ModelError, shown
from epd_ray.randomness import torch_generator
from epd_ray.solvers.schedules import flow_shifted, polynomial
from epd_ray.types import Conditioning, Form


@dataclass(frozen=True, eq=False)
class Mixture:
    """Isotropic Gaussians over clean latents.

    Args:
        means: [M, ...], or [B, M, ...] for one mixture per sample.
        std: [M], > 0.
        probs: [M], > 0, summing to 1.
    """

    means: Tensor
    std: Tensor
    probs: Tensor

    def denoise(self, x: Tensor, sigma: Tensor, form: Form) -> Tensor:
        """E[clean | x].

        Args:
            x: [B, ...].
            sigma: [B], > 0; at most 1 in flow form.
            form: how noise enters x, "ve" or "flow".

        Returns:
            [B, ...], in the dtype of x.
        """
        means, std = self._means(x), self.std.to(x)  # [B or 1, M, D], [M]
        flat = x.flatten(1).unsqueeze(1)  # [B, 1, D]
        alpha, sigma = (_alpha(sigma, form)[:, None], sigma[:, None])  # [B, 1]
        variance = (alpha * std) ** 2 + sigma**2  # [B, M]
        error = flat - alpha[..., None] * means  # [B, M, D]
        log_prob = -0.5 * (error.square().sum(-1) / variance + flat.shape[-1] * variance.log())
        posterior = (log_prob + self.probs.to(x).log()).softmax(-1)  # [B, M]
        expected = means + (alpha * std**2 / variance)[..., None] * error  # [B, M, D]
        denoised: Tensor = (posterior[..., None] * expected).sum(1)  # [B, D]
        return denoised.reshape(x.shape)

    def drift(self, x: Tensor, sigma: Tensor, form: Form) -> Tensor:
        """dx/dsigma at x [B, ...] and sigma [B], > 0: (x - denoised) / sigma."""
        return (x - self.denoise(x, sigma, form)) / sigma.reshape(-1, *[1] * (x.ndim - 1))

    def solution(self, x: Tensor, start: float, end: float, form: Form) -> Tensor:
        """The solution of the ODE at sigma `end` >= 0 from x [B, ...] at sigma `start`, for a single Gaussian.

        Raises:
            ModelError: the mixture has several Gaussians, so there is no closed solution.
        """
        if len(self.std) != 1:
            raise ModelError(f"a mixture of {len(self.std)} Gaussians has no closed solution, expected 1")
        mean, std = self._means(x)[:, 0].reshape(-1, *x.shape[1:]), self.std.to(x)
        grid = torch.tensor([start, end]).to(x)
        alpha = _alpha(grid, form)
        scale = ((alpha * std) ** 2 + grid**2).sqrt()
        return alpha[1] * mean + scale[1] / scale[0] * (x - alpha[0] * mean)

    def _means(self, x: Tensor) -> Tensor:
        per_sample = self.means.ndim == x.ndim + 1
        means = self.means.to(x).flatten(2 if per_sample else 1)
        return means if per_sample else means.unsqueeze(0)


@dataclass(frozen=True, eq=False)
class GaussianConditioning:
    """Encoded prompts: offsets [B, ...] that are added to every mean, already multiplied by the guidance scale."""

    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets)

    def repeat(self, k: int) -> "GaussianConditioning":
        """Each row k times in a row (b*k + i)."""
        return GaussianConditioning(self.offsets.repeat_interleave(k, dim=0))


class GaussianBackbone:
    """Small images [3, size, size] from a Gaussian mixture around a picture that depends on the prompt's text.

    The guidance scale multiplies the prompt's picture. For a single Gaussian this is the same as classifier-free
    guidance whose unconditional mean is zero.

    Args:
        model: any text; the means of the mixture depend on it, so that another text is another model.
        form: how noise enters x, "ve" or "flow".
        components: number of Gaussians, >= 1. A single one has its mean at the prompt's picture and a closed solution.
        std: standard deviation of each Gaussian, > 0.
        size: height and width of the images in pixels, >= 1.
        sigma_min: last sigma above 0; in flow form, before the shift by 3. None means 0.002 (VE) or 0.001 (flow).
        sigma_max: first sigma, in VE form only; None means 80.

    Raises:
        ModelError: a value outside its range.
        ScheduleError: sigma_min and sigma_max do not make a schedule.
    """

    family = "gaussian"
    default_guidance = 1.0
    classifier_free = False

    def __init__(
        self,
        *,
        model: str | None = None,
        form: Form = "flow",
        components: int = 1,
        std: float = 0.25,
        size: int = 8,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> None:
        if form not in ("ve", "flow"):
            raise ModelError(f"form is {shown(form)}, expected 've' or 'flow'")
        for name, value in {"components": components, "size": size}.items():
            if value < 1:
                raise ModelError(f"{name} is {value}, expected at least 1")
        if not 0 < std < float("inf"):
            raise ModelError(f"std is {std:g}, expected a finite number above 0")
        if form == "flow" and sigma_max is not None:
            raise ModelError(f"sigma_max is {sigma_max:g}, but a flow model starts at 1 (leave it out)")
        self.model_id = model or f"gaussian-{form}"
        self.form: Form = form
        self.schedule = "shift" if form == "flow" else "polynomial"
        self._shape = (3, size, size)
        self.facts: dict[str, JsonValue] = {"resolution": size, "revision": None}
        low = (1e-3 if form == "flow" else 2e-3) if sigma_min is None else sigma_min
        self._bounds = (low, 80.0 if sigma_max is None else sigma_max)
        means = text_normal(f"model:{self.model_id}", (components, *self._shape)) * (0.5 if components > 1 else 0.0)
        self._mixture = Mixture(means, torch.full((components,), std), torch.full((components,), 1 / components))
        self.sigmas(1)

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> GaussianConditioning:
        """Conditioning of length B for B prompts: each text stands for its own picture, a colour plus a texture."""
        pictures = [
            0.5 * text_normal(f"colour:{prompt}", (3, 1, 1)) + 0.2 * text_normal(f"texture:{prompt}", self._shape)
            for prompt in prompts
        ]
        return GaussianConditioning(guidance_scale * torch.stack(pictures))

    def truncated(self, prompts: Sequence[str]) -> int:
        """Always 0: prompts may have any length."""
        return 0

    def sigmas(self, num_intervals: int, *, final_zero: bool = False) -> Tensor:
        """Sigmas [num_intervals + 1], float64: polynomial with rho 7 (VE) or shifted by 3 (flow).

        They end at 0 if `final_zero` is true, else at sigma_min (in flow form, sigma_min after the shift).
        """
        low, high = self._bounds
        count = num_intervals + (not final_zero)
        grid = flow_shifted(count, t_min=low) if self.form == "flow" else polynomial(count, low, high)
        return torch.cat([grid, grid.new_zeros(1)]) if final_zero else grid

    def noise(self, seed: int) -> Tensor:
        """One unit-normal latent [3, size, size], float32, drawn on the CPU from the seed alone."""
        return torch.randn(self._shape, generator=torch_generator(seed))

    def initial(self, noise: Tensor) -> Tensor:
        """State at sigmas[0] from unit noise [B, 3, size, size]."""
        return noise if self.form == "flow" else self._bounds[1] * noise

    def drift(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """dx/dsigma at x [B, 3, size, size], sigma [B], > 0; exact, in the dtype of x."""
        return self.mixture(conditioning).drift(x, sigma, self.form)

    def exact(self, x: Tensor, start: float, end: float, conditioning: Conditioning) -> Tensor:
        """The solution of the ODE at sigma `end` >= 0 from x [B, 3, size, size] at sigma `start`, for one component.

        Raises:
            ModelError: there is more than one component.
        """
        return self.mixture(conditioning).solution(x, start, end, self.form)

    def mixture(self, conditioning: Conditioning) -> Mixture:
        """The distribution of clean images for each row of a conditioning that `encode` returned."""
        if not isinstance(conditioning, GaussianConditioning):
            raise TypeError(
                f"conditioning is a {type(conditioning).__name__}, expected what this backbone's encode gave"
            )
        means = self._mixture.means + conditioning.offsets.unsqueeze(1)  # [B, M, 3, size, size]
        return Mixture(means, self._mixture.std, self._mixture.probs)

    def decode(self, x: Tensor) -> Tensor:
        """Images [B, 3, size, size], float32 in [0, 1], on the CPU."""
        return (x.float().cpu() / 2 + 0.5).clamp(0, 1)


def text_normal(text: str, shape: tuple[int, ...]) -> Tensor:
    """Unit normals, float32, that depend on the text alone; Python's hash would differ between processes."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.randn(shape, generator=torch_generator(seed))


def _alpha(sigma: Tensor, form: Form) -> Tensor:
    return 1 - sigma if form == "flow" else torch.ones_like(sigma)
