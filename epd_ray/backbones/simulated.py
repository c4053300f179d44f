"""A backbone that sleeps instead of computing, to test scaling, scheduling and failures without a GPU."""

import math
import time
from collections.abc import Sequence

from pydantic import JsonValue
from torch import Tensor

from epd_ray.backbones.gaussian import GaussianBackbone, GaussianConditioning
from epd_ray.errors import ModelError
from epd_ray.types import Conditioning, Form


class SimulatedBackbone:
    """A small Gaussian mixture of two components in flow form, with a fixed delay in each evaluation.

    The image is a function of table, prompt and noise, so that training can improve the table.

    Args:
        model: any text; another text is another model.
        latency: seconds that each call of the drift sleeps, whatever the size of its batch, >= 0.
        size: height and width of the images in pixels, >= 1.

    Raises:
        ModelError: a value outside its range.
    """

    family = "simulated"
    default_guidance = 1.0
    classifier_free = False

    def __init__(self, *, model: str | None = None, latency: float = 0.0, size: int = 8) -> None:
        if not (math.isfinite(latency) and latency >= 0):
            raise ModelError(f"latency is {latency:g} seconds, expected a finite number of at least 0")
        self.model_id = model or "simulated"
        self.facts: dict[str, JsonValue] = {"resolution": size, "revision": None}
        self._latency = latency
        self.form: Form = "flow"
        self._inner = GaussianBackbone(model=self.model_id, form=self.form, components=2, size=size)
        self.schedule = self._inner.schedule

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> GaussianConditioning:
        """Conditioning of length B for B prompts."""
        return self._inner.encode(prompts, guidance_scale)

    def truncated(self, prompts: Sequence[str]) -> int:
        """Always 0: prompts may have any length."""
        return 0

    def sigmas(self, num_intervals: int, *, final_zero: bool = False) -> Tensor:
        """Flow sigmas [num_intervals + 1], float64, decreasing from 1; ends at 0 only when `final_zero`."""
        return self._inner.sigmas(num_intervals, final_zero=final_zero)

    def noise(self, seed: int) -> Tensor:
        """One unit-normal latent [3, size, size], float32, drawn on the CPU from the seed alone."""
        return self._inner.noise(seed)

    def initial(self, noise: Tensor) -> Tensor:
        """State at sigmas[0] from unit noise [B, 3, size, size]."""
        return self._inner.initial(noise)

    def drift(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """dx/dsigma at x [B, 3, size, size], sigma [B], after `latency` seconds."""
        time.sleep(self._latency)
        return self._inner.drift(x, sigma, conditioning)

    def decode(self, x: Tensor) -> Tensor:
        """Images [B, 3, size, size], float32 in [0, 1], on the CPU."""
        return self._inner.decode(x)
