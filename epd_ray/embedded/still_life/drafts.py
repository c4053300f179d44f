"""Pictures from the checkpoints of a training: of few plain Euler steps, and of the autoencoder alone."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from epd_ray.embedded.networks import Denoiser, load_ema, load_part, make_tokenizer, make_vae, tokenize
from epd_ray.embedded.still_life import scenes as world
from epd_ray.embedded.still_life.scenes import Array

SHIFT = 2.0  # shift of the sigmas in the shipped scheduler


class Drafts:
    """Draws with the averaged weights of the stages vae and transformer.

    Args:
        out: the working folder of jobs/build_still_life.py.
        device: where the networks compute.
    """

    def __init__(self, out: Path, device: torch.device) -> None:
        self._tokenizer, self._device = make_tokenizer(world.WORDS), device
        self._denoiser = load_part("denoiser", Denoiser(self._tokenizer), out / "transformer.pt").to(device)
        self._vae = load_ema(make_vae(), out / "vae.pt").to(device, memory_format=torch.channels_last)
        latents = json.loads((out / "latents.json").read_text())
        self._shift, self._scale = latents["shift"], latents["scale"]

    @torch.inference_mode()
    def passed(self, images: Array) -> Tensor:
        """Pictures [B, 3, 64, 64], float32 in [0, 1], after the autoencoder, uint8."""
        pixels = torch.from_numpy(2 * images - 1).to(self._device, memory_format=torch.channels_last)
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            return self._pixels(self._vae.encode(pixels).latent_dist.mean)

    @torch.inference_mode()
    def drawn(self, captions: list[str], steps: int, guidance: float, rng: np.random.Generator) -> Tensor:
        """Pictures of B captions after some Euler steps, uint8 [B, 3, 64, 64]."""
        noise = rng.standard_normal((len(captions), 8, 16, 16), np.float32)
        x = torch.from_numpy(noise).to(self._device)
        told = tokenize(self._tokenizer, captions).to(self._device)
        blank = tokenize(self._tokenizer, [""] * len(captions)).to(self._device)
        even = torch.linspace(1, 0, steps + 1)
        sigmas = SHIFT * even / (1 + (SHIFT - 1) * even)
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
                at = torch.full((2 * len(x),), sigma, device=self._device)
                both = self._denoiser(torch.cat([x, x]), at, torch.cat([told, blank]), 1).float()
                with_caption, without = both.chunk(2)
                x = x + (following - sigma) * (without + guidance * (with_caption - without))
            return self._pixels(x / self._scale + self._shift)

    def _pixels(self, latents: Tensor) -> Tensor:
        images: Tensor = self._vae.decode(latents.to(memory_format=torch.channels_last)).sample.float()
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
