"""Build the embedded model from nothing: draw its data, train its three networks, and write its folders.

    python jobs/build_shapes.py vae --out build/shapes            # AutoencoderKL on random crops
    python jobs/build_shapes.py clip --out build/shapes           # shapes-clip, the reward model
    python jobs/build_shapes.py transformer --out build/shapes    # SD3 transformer and its two text encoders
    python jobs/build_shapes.py export --out build/shapes         # epd_ray/embedded/shapes*, and their cards

Every stage resumes from its checkpoint, because a batch is a function of seed and step. A stage shows its progress, and
runs data-parallel over `--processes` with one torch thread each; on a GPU one process is enough.
"""

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm

from epd_ray.embedded import scenes as world
from epd_ray.embedded.networks import Denoiser, load_ema, make_clip, make_tokenizer, make_vae, tokenize
from epd_ray.embedded.release import release
from epd_ray.embedded.training import Stage, autocast, device, launch

MAX_LATENTS = 100_000  # pictures that are encoded once, before the transformer is trained

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
OutOption = Annotated[Path, typer.Option(help="Working folder for checkpoints and encoded scenes.")]


def batch_rng(seed: int, step: int, rank: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, rank])


def draw(rng: np.random.Generator, count: int) -> list[world.Scene]:
    return list(itertools.islice(world.random_scenes(rng, "train"), count))


# -- stages -----------------------------------------------------------------------------------------------------------


def vae_stage(rank: int, world_size: int, *, seed: int, batch: int) -> Stage:
    torch.manual_seed(seed)
    vae = make_vae().to(device(), memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        rng = batch_rng(seed, step, rank)
        images = world.render(draw(rng, batch), rng)
        corners = rng.integers(0, 33, (batch, 2))
        crops = np.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(images, corners, strict=True)])
        x = (2 * torch.from_numpy(crops) - 1).to(device(), memory_format=torch.channels_last)
        noise = torch.from_numpy(rng.standard_normal((batch, 8, 8, 8), np.float32)).to(device())
        with autocast():
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * noise
            decoded = vae.decode(z).sample.float()
        difference = decoded - x
        kl = posterior.kl().mean() / noise[0].numel()
        return difference.abs().mean() + 2 * difference.square().mean() + 2e-4 * kl

    adam = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.01)
    return Stage("vae", vae, [adam], loss)


def clip_stage(rank: int, world_size: int, *, seed: int, batch: int) -> Stage:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(world.WORDS)
    clip = make_clip(tokenizer).to(device())
    clip.vision_model.compile(dynamic=False)
    clip.text_model.compile(dynamic=False)

    def loss(step: int) -> Tensor:
        rng = batch_rng(seed + 1, step, rank)
        batch_scenes = draw(rng, batch)
        captions = [s.caption for s in batch_scenes] + [world.altered(s, rng).caption for s in batch_scenes]
        images = world.render(batch_scenes, rng)
        images += rng.standard_normal(images.shape, np.float32) * rng.uniform(0, 0.12, (batch, 1, 1, 1)).astype(
            np.float32
        )
        pixels = torch.from_numpy((images.clip(0, 1) - 0.5) / 0.5).to(device())
        with autocast():
            image = clip.get_image_features(pixels).pooler_output.float()
            text = clip.get_text_features(tokenize(tokenizer, captions).to(device())).pooler_output.float()
        logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * clip.logit_scale.exp().clamp(max=100)
        target = torch.arange(batch, device=logits.device)
        return F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :batch].T, target)

    adam = torch.optim.AdamW(clip.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    return Stage("clip", clip, [adam], loss, warmup=100)


def encoded_scenes(out: Path, rank: int, world_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normalised latents [n, 8, 16, 16], float16, and token ids [n, 20] of this process's share, encoded once."""
    path = out / f"scenes-{rank}-of-{world_size}.pt"
    if not path.exists() or path.stat().st_mtime < (out / "vae.pt").stat().st_mtime:
        vae = load_ema(make_vae(), out / "vae.pt").to(device(), memory_format=torch.channels_last)
        latents: list[Tensor] = []
        captions: list[str] = []
        rng = batch_rng(seed + 2, 0, rank)
        for _ in tqdm(range(0, MAX_LATENTS // world_size, 100), desc="encode", disable=rank > 0, mininterval=5):
            chunk = draw(rng, 100)
            x = torch.from_numpy(2 * world.render(chunk, rng) - 1).to(device(), memory_format=torch.channels_last)
            with torch.inference_mode(), autocast():
                latents.append(vae.encode(x).latent_dist.mean.half().cpu())
            captions += [s.caption for s in chunk]
        stacked = torch.cat(latents)
        shift, scale = latent_statistics(out, stacked, rank, world_size)
        normalised = ((stacked.float() - shift) * scale).half().contiguous()
        torch.save({"latents": normalised, "captions": captions}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    saved = torch.load(path, weights_only=True)
    return saved["latents"], tokenize(make_tokenizer(world.WORDS), saved["captions"])


def latent_statistics(out: Path, latents: Tensor, rank: int, world_size: int) -> tuple[float, float]:
    """Shift and scale (1 / std) of the VAE's latents over all processes, kept beside the checkpoints."""
    moments = torch.tensor([latents.float().mean(), latents.float().square().mean()]) / world_size
    if world_size > 1:
        dist.all_reduce(moments)
    shift, scale = float(moments[0]), float((moments[1] - moments[0] ** 2) ** -0.5)
    if rank == 0:
        (out / "latents.json").write_text(json.dumps({"shift": shift, "scale": scale}))
    return shift, scale


def transformer_stage(rank: int, world_size: int, *, out: Path, seed: int, batch: int) -> Stage:
    latents, tokens = encoded_scenes(out, rank, world_size, seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(world.WORDS)
    denoiser = Denoiser(tokenizer).to(device())
    denoiser.transformer.compile(dynamic=False)  # twice as fast on a CPU; one graph per number of empty tokens
    blank = tokenize(tokenizer, [""])[0]

    def loss(step: int) -> Tensor:
        rng = batch_rng(seed + 3, step, rank)
        rows = rng.integers(0, len(latents), batch)
        x = latents[rows].float().to(device())
        words = tokens[rows].clone()
        words[rng.random(batch) < 0.1] = blank  # the empty prompt, which guidance subtracts
        noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(device())
        # Logit-normal towards the noisy end, because the places of things are decided early.
        sigma = torch.sigmoid(0.4 + 1.2 * torch.from_numpy(rng.standard_normal(batch, np.float32))).to(device())
        # The pipeline adds `max_sequence_length` empty T5 tokens, by default 256: the network learns to ignore them.
        empty = int(np.random.default_rng([seed, step]).choice([1, 20, 256], p=[0.80, 0.17, 0.03]))
        mixed = torch.lerp(x, noise, sigma[:, None, None, None])
        with autocast():
            velocity = denoiser(mixed, sigma, words.to(device()), empty)
        return F.mse_loss(velocity.float(), noise - x)

    hidden = [p for n, p in denoiser.transformer.named_parameters() if p.ndim == 2 and (".attn." in n or ".ff" in n)]
    chosen = {id(p) for p in hidden}
    others = [p for p in denoiser.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(hidden, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    return Stage("transformer", denoiser, [muon, adam], loss, ema_decay=0.999)


@app.command()
def vae(out: OutOption, steps: int = 1_779, batch: int = 32, seed: int = 0, processes: int = 1) -> None:
    """Train the autoencoder."""
    launch(partial(vae_stage, seed=seed, batch=batch), "vae", out, steps, processes)


@app.command()
def clip(out: OutOption, steps: int = 678, batch: int = 192, seed: int = 0, processes: int = 1) -> None:
    """Train shapes-clip, with the other captions of a batch and altered captions as negatives."""
    launch(partial(clip_stage, seed=seed, batch=batch), "clip", out, steps, processes)


@app.command()
def transformer(out: OutOption, steps: int = 3_386, batch: int = 48, seed: int = 0, processes: int = 2) -> None:
    """Train the denoiser; `batch` is the number of pictures of each process."""
    launch(partial(transformer_stage, out=out, seed=seed, batch=batch), "transformer", out, steps, processes)


@app.command()
def export(out: OutOption, assets: Path = Path("epd_ray/embedded"), prompts: int = 512, steps: int = 50) -> None:
    """Write the folders shapes and shapes-clip of epd_ray/embedded, with measured figures on their cards."""
    typer.echo(json.dumps(release(out, assets, prompts, steps), indent=2))


if __name__ == "__main__":
    app()
