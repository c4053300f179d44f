"""Build the embedded models from nothing: draw their data, train the five networks, and write their folders.

    python jobs/build_still_life.py vae --out build/still-life          # AutoencoderKL on random crops
    python jobs/build_still_life.py features --out build/still-life     # an image tower that knows such pictures
    python jobs/build_still_life.py transformer --out build/still-life  # SD3 transformer and its two text encoders
    python jobs/build_still_life.py clip --out build/still-life         # does a picture fit its caption?
    python jobs/build_still_life.py preference --out build/still-life   # which of two pictures is better?
    python jobs/build_still_life.py export --out build/still-life       # epd_ray/embedded/still-life*, with cards

Every stage resumes from its checkpoint, because a batch is a function of seed and step. A stage shows its progress, and
runs data-parallel over `--processes` with one torch thread each; on a GPU one process is enough.
"""

import itertools
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from tqdm import tqdm

from epd_ray.embedded.networks import (
    Denoiser,
    load_ema,
    load_part,
    make_clip,
    make_features,
    make_tokenizer,
    make_vae,
    tokenize,
)
from epd_ray.embedded.still_life import scenes as world
from epd_ray.embedded.still_life.damage import damaged
from epd_ray.embedded.still_life.drafts import Drafts
from epd_ray.embedded.still_life.drawing import compose, facts, render
from epd_ray.embedded.still_life.drawing import draw as render_pictures
from epd_ray.embedded.still_life.release import release
from epd_ray.embedded.training import Stage, autocast, device, launch

READ_BLOCK, READ_WEIGHT = 2, 0.5  # the block whose tokens are read, and the weight of that loss
PAIRS = 6_400  # pairs of pictures that have passed through the autoencoder, for the preference model

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
        images = render(draw(rng, batch), rng)
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
        images = render(batch_scenes, rng)
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


@dataclass(frozen=True)
class Encoded:
    """One process's share of the pictures that the transformer is trained on.

    Attributes:
        latents: normalised latents [n, 8, 16, 16], float16.
        seen: what the image tower of still-life-features makes of each 8 x 8 pixels, [n, 64, 96], float16.
        captions: the n captions.
    """

    latents: Tensor
    seen: Tensor
    captions: list[str]


def encoded_scenes(out: Path, rank: int, world_size: int, seed: int, count: int) -> Encoded:
    """Draw and encode `count` pictures once, among all processes; a process takes its own share."""
    path = out / f"scenes-{rank}-of-{world_size}.pt"
    newest = max((out / f"{name}.pt").stat().st_mtime for name in ("vae", "features"))
    if not path.exists() or path.stat().st_mtime < newest:
        vae = load_ema(make_vae(), out / "vae.pt").to(device(), memory_format=torch.channels_last)
        vae.encoder.compile(dynamic=False)
        tower = load_part("clip", make_features(), out / "features.pt").vision_model.to(device())
        latents: list[Tensor] = []
        seen: list[Tensor] = []
        captions: list[str] = []
        rng = batch_rng(seed + 2, 0, rank)
        for _ in tqdm(range(0, count // world_size, 100), desc="encode", disable=rank > 0, mininterval=5):
            chunk = draw(rng, 100)
            x = torch.from_numpy(2 * render(chunk, rng) - 1).to(device(), memory_format=torch.channels_last)
            with torch.inference_mode(), autocast():
                latents.append(vae.encode(x).latent_dist.mean.half().cpu())
                seen.append(tower(x).last_hidden_state[:, 1:].half().cpu())  # without the token of the whole picture
            captions += [s.caption for s in chunk]
        stacked = torch.cat(latents)
        shift, scale = latent_statistics(out, stacked, rank, world_size)
        normalised = ((stacked.float() - shift) * scale).half().contiguous()
        saved = {"latents": normalised, "seen": torch.cat(seen), "captions": captions}
        torch.save(saved, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return Encoded(**torch.load(path, weights_only=True))


def latent_statistics(out: Path, latents: Tensor, rank: int, world_size: int) -> tuple[float, float]:
    """Shift and scale (1 / std) of the VAE's latents over all processes, kept beside the checkpoints."""
    moments = torch.tensor([latents.float().mean(), latents.float().square().mean()]) / world_size
    if world_size > 1:
        dist.all_reduce(moments)
    shift, scale = float(moments[0]), float((moments[1] - moments[0] ** 2) ** -0.5)
    if rank == 0:
        (out / "latents.json").write_text(json.dumps({"shift": shift, "scale": scale}))
    return shift, scale


def transformer_stage(rank: int, world_size: int, *, out: Path, seed: int, batch: int, pictures: int) -> Stage:
    """Train the transformer and its text encoders to tell the velocity.

    A middle block's image tokens are trained to tell what a network that knows such pictures makes of the clean one,
    because that is learned sooner than the velocity, and helps to learn it (REPA, Yu et al. 2025).
    """
    encoded = encoded_scenes(out, rank, world_size, seed, pictures)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(world.WORDS)
    tokens = tokenize(tokenizer, encoded.captions)
    denoiser = Denoiser(tokenizer).to(device())
    reader = nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, encoded.seen.shape[-1])).to(device())
    middle: list[Tensor] = []
    denoiser.transformer.transformer_blocks[READ_BLOCK].register_forward_hook(lambda *call: middle.append(call[2][1]))
    denoiser.transformer.compile(dynamic=False)  # twice as fast on a CPU; one graph per number of empty tokens
    blank = tokenize(tokenizer, [""])[0]

    def loss(step: int) -> Tensor:
        rng = batch_rng(seed + 3, step, rank)
        rows = rng.integers(0, len(encoded.latents), batch)
        x = encoded.latents[rows].float().to(device())
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
            told = reader(middle.pop())
        agreement = F.cosine_similarity(told.float(), encoded.seen[rows].float().to(device()), dim=-1).mean()
        return F.mse_loss(velocity.float(), noise - x) + READ_WEIGHT * (1 - agreement)

    hidden = [p for n, p in denoiser.transformer.named_parameters() if p.ndim == 2 and (".attn." in n or ".ff" in n)]
    chosen = {id(p) for p in hidden}
    module = nn.ModuleDict({"denoiser": denoiser, "reader": reader})
    others = [p for p in module.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(hidden, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    return Stage("transformer", module, [muon, adam], loss, ema_decay=0.999)


def preference_stage(rank: int, world_size: int, *, out: Path, seed: int, batch: int) -> Stage:
    """Fine-tune the CLIP model on pairs of pictures of a caption, of which one is better (Bradley and Terry 1952)."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(world.WORDS)
    clip = load_ema(make_clip(tokenizer), out / "clip.pt").to(device()).train()
    clip.vision_model.compile(dynamic=False)
    clip.text_model.compile(dynamic=False)
    pairs = drawn_pairs(out, seed)

    def loss(step: int) -> Tensor:
        rng = batch_rng(seed + 5, step, rank)
        half = batch // 2
        scenes = draw(rng, half)
        pictures = [compose(scene, rng) for scene in scenes]
        fresh = np.stack([render_pictures(pictures, rng), damaged(scenes, pictures, rng)[0]])
        rows = torch.from_numpy(rng.integers(0, len(pairs.captions), half))
        images = torch.cat([torch.from_numpy(fresh), pairs.images[:, rows].float() / 255], dim=1)  # [2, batch, ...]
        captions = [s.caption for s in scenes] + [pairs.captions[int(row)] for row in rows]
        pixels = ((images.flatten(0, 1) - 0.5) / 0.5).to(device())
        with autocast():
            image = clip.get_image_features(pixels).pooler_output.float()
            text = clip.get_text_features(tokenize(tokenizer, captions).to(device())).pooler_output.float()
        logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * clip.logit_scale.exp().clamp(max=100)
        better, worse = logits[:batch].diagonal(), logits[batch:].diagonal()
        target = torch.arange(batch, device=logits.device)
        fits = F.cross_entropy(logits[:batch], target)  # so that a good picture of another caption stays bad
        return F.softplus(worse - better).mean() + 0.2 * fits

    adam = torch.optim.AdamW(clip.parameters(), lr=5e-4, betas=(0.9, 0.98), weight_decay=0.05)
    return Stage("preference", clip, [adam], loss, warmup=100)


@dataclass(frozen=True)
class Pairs:
    """Pairs of pictures: images uint8 [2, n, 3, 64, 64], the better ones first, and their n captions."""

    images: Tensor
    captions: list[str]


def drawn_pairs(out: Path, seed: int) -> Pairs:
    """Pairs that have all passed through the autoencoder: true scenes against damaged ones and the sampler's drafts."""
    path = out / "pairs.pt"
    newest = max((out / f"{name}.pt").stat().st_mtime for name in ("vae", "transformer"))
    if not path.exists() or path.stat().st_mtime < newest:
        sampler = Drafts(out, device())
        better, worse, captions = [], [], []
        rng = batch_rng(seed + 4, 0, 0)
        for i in tqdm(range(0, PAIRS, 64), desc="pairs", mininterval=5):
            scenes = draw(rng, 64)
            pictures = [compose(scene, rng) for scene in scenes]
            better.append(sampler.passed(render_pictures(pictures, rng)))
            if i % 128:
                worse.append(sampler.passed(damaged(scenes, pictures, rng)[0]))
            else:
                steps, guidance = int(rng.integers(1, 9)), float(rng.uniform(1, 7))
                worse.append(sampler.drawn([s.caption for s in scenes], steps, guidance, rng))
            captions += [s.caption for s in scenes]
        torch.save({"images": torch.stack([torch.cat(better), torch.cat(worse)]), "captions": captions}, path)
    return Pairs(**torch.load(path, weights_only=True))


def features_stage(rank: int, world_size: int, *, seed: int, batch: int) -> Stage:
    """Train the image tower of still-life-features to tell everything that a picture shows; no caption is read."""
    torch.manual_seed(seed + 6)
    clip = make_features().to(device())
    clip.vision_model.compile(dynamic=False)
    reader = nn.Linear(clip.config.projection_dim, len(facts(compose(world.Scene(()), batch_rng(0, 0, 0)))))
    module = nn.ModuleDict({"clip": clip, "reader": reader.to(device())})

    def loss(step: int) -> Tensor:
        rng = batch_rng(seed + 6, step, rank)
        pictures = [compose(scene, rng) for scene in draw(rng, batch)]
        pixels = torch.from_numpy((render_pictures(pictures, rng) - 0.5) / 0.5).to(device())
        target = torch.from_numpy(np.stack([facts(picture) for picture in pictures])).to(device())
        with autocast():
            told = reader(clip.get_image_features(pixels).pooler_output).float()
        return F.mse_loss(told, target)

    adam = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    return Stage("features", module, [adam], loss, warmup=100)


@app.command()
def vae(out: OutOption, steps: int = 1_645, batch: int = 32, seed: int = 0, processes: int = 1) -> None:
    """Train the autoencoder."""
    launch(partial(vae_stage, seed=seed, batch=batch), "vae", out, steps, processes)


@app.command()
def clip(out: OutOption, steps: int = 800, batch: int = 192, seed: int = 0, processes: int = 1) -> None:
    """Train still-life-clip, with the other captions of a batch and altered captions as negatives."""
    launch(partial(clip_stage, seed=seed, batch=batch), "clip", out, steps, processes)


@app.command()
def transformer(
    out: OutOption,
    steps: int = 8_000,
    batch: int = 48,
    seed: int = 0,
    processes: int = 2,
    pictures: Annotated[int, typer.Option(help="Pictures that are encoded once, before the training.")] = 60_000,
) -> None:
    """Train the denoiser; `batch` is the number of pictures of each process."""
    stage = partial(transformer_stage, out=out, seed=seed, batch=batch, pictures=pictures)
    launch(stage, "transformer", out, steps, processes)


@app.command()
def preference(out: OutOption, steps: int = 600, batch: int = 96, seed: int = 0) -> None:
    """Train still-life-preference from still-life-clip, once the stages vae, transformer and clip have run."""
    launch(partial(preference_stage, out=out, seed=seed, batch=batch), "preference", out, steps, 1)


@app.command()
def features(out: OutOption, steps: int = 713, batch: int = 96, seed: int = 0) -> None:
    """Train still-life-features."""
    launch(partial(features_stage, seed=seed, batch=batch), "features", out, steps, 1)


@app.command()
def export(out: OutOption, assets: Path = Path("epd_ray/embedded"), prompts: int = 512, steps: int = 50) -> None:
    """Write the folders still-life and still-life-clip of epd_ray/embedded, with measured figures on their cards."""
    typer.echo(json.dumps(release(out, assets, prompts, steps), indent=2))


if __name__ == "__main__":
    app()
