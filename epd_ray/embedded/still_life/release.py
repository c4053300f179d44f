"""Writes the folders of the embedded models, measures the models, and writes their model cards with the figures."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from epd_ray.embedded.networks import (
    TOKENS,
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
from epd_ray.embedded.still_life.damage import DAMAGES
from epd_ray.embedded.still_life.drafts import SHIFT
from epd_ray.embedded.still_life.drawing import compose, draw, render
from epd_ray.embedded.still_life.judge import scene_accuracy
from epd_ray.randomness import Purpose, stream, torch_generator

GUIDANCE = 3.0  # guidance scale at which the model is measured
SCENES = 150  # number of test scenes that name one and two things
PAIRS = 64  # number of test scenes that are damaged in each way
STAGES = ("vae", "transformer", "clip", "preference", "features")


def release(out: Path, assets: Path, prompts: int, steps: int) -> dict[str, float]:
    """Write the model folders, measure the models on held-out scenes, and write their model cards.

    Args:
        out: folder with the checkpoints of jobs/build_still_life.py.
        assets: folder in which the model folders are written.
        prompts: number of captions among which still-life-clip must find the right one.
        steps: number of Euler steps with which still-life is measured.

    Returns:
        The measured shares, in [0, 1], by name.
    """
    tokenizer = make_tokenizer(world.WORDS)
    export_pipeline(out, assets / "still-life", tokenizer)
    for name in ("clip", "preference"):
        export_clip(load_ema(make_clip(tokenizer), out / f"{name}.pt"), assets / f"still-life-{name}", tokenizer)
    export_clip(load_part("clip", make_features(), out / "features.pt"), assets / "still-life-features", tokenizer)
    figures = measure_pipeline(assets / "still-life", SCENES, steps) | measure_clip(assets / "still-life-clip", prompts)
    told_apart = measure_preference(assets / "still-life-preference", PAIRS)
    figures["told_apart"] = float(np.mean(list(told_apart.values())))
    stages = {name: json.loads((out / f"{name}.json").read_text()) for name in STAGES}
    values = card_values(figures, stages) | {"prompts": prompts, "steps": steps, "guidance": GUIDANCE, "scenes": SCENES}
    values["kinds"] = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in told_apart.items())
    values["pairs"] = PAIRS
    for name, card in CARDS.items():
        (assets / name / "README.md").write_text(card.format(**values))
    return figures | told_apart


def export_pipeline(out: Path, folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Save a StableDiffusion3Pipeline in the diffusers layout, with float16 weights."""
    denoiser = Denoiser(tokenizer)
    load_part("denoiser", denoiser, out / "transformer.pt")
    latents = json.loads((out / "latents.json").read_text())
    vae = load_ema(make_vae(), out / "vae.pt")
    vae.register_to_config(scaling_factor=latents["scale"], shift_factor=latents["shift"])
    pipeline = StableDiffusion3Pipeline(
        transformer=denoiser.transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder=denoiser.text_encoder, tokenizer=tokenizer,
        text_encoder_2=denoiser.text_encoder_2, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(folder)


def export_clip(clip: CLIPModel, folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Save a CLIPModel with a tokenizer and an image processor, with float16 weights."""
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": world.CANVAS}
    crop = {"height": world.CANVAS, "width": world.CANVAS}
    CLIPImageProcessorPil(size=size, crop_size=crop, image_mean=half, image_std=half).save_pretrained(folder)


def measure_pipeline(folder: Path, count: int, steps: int) -> dict[str, float]:
    """The shares of `count` held-out captions that are drawn right, which name at most one thing or two."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.bfloat16, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    figures = {}
    for name, two_things in (("one_thing", 0.0), ("two_things", 1.0)):
        scenes = world.distinct_scenes("test", count, 0, two_things)
        right: list[bool] = []
        for i in tqdm(range(0, len(scenes), 32), desc=name):
            chunk = scenes[i : i + 32]
            images = pipeline(
                [s.caption for s in chunk], num_inference_steps=steps, guidance_scale=GUIDANCE, output_type="np",
                max_sequence_length=TOKENS, generator=torch_generator(i),
            ).images  # fmt: skip
            right += scene_accuracy(images.transpose(0, 3, 1, 2).astype(np.float32), chunk).tolist()
        figures[name] = float(np.mean(right))
    return figures


def measure_clip(folder: Path, prompts: int) -> dict[str, float]:
    """The share of held-out pictures whose embedding is nearest to their own caption's among `prompts` captions."""
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    scenes = world.distinct_scenes("test", prompts, 0, 0.5)
    images = (render(scenes, stream(Purpose.RENDERING, 0)) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    with torch.inference_mode():
        image = clip.get_image_features(**processor(list(images), return_tensors="pt")).pooler_output
        text = clip.get_text_features(tokenize(tokenizer, [s.caption for s in scenes])).pooler_output
    nearest = (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).argmax(1)
    return {"retrieval": float((nearest == torch.arange(prompts)).float().mean())}


@torch.inference_mode()
def measure_preference(folder: Path, count: int) -> dict[str, float]:
    """The shares of `count` held-out scenes whose true picture is preferred to its damaged one, by kind of damage."""
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    rng = stream(Purpose.RENDERING, 1)
    scenes = world.distinct_scenes("test", count, 1, 0.5)
    pictures = [compose(scene, rng) for scene in scenes]
    tokens = tokenize(tokenizer, [s.caption for s in scenes])
    text = F.normalize(clip.get_text_features(tokens).pooler_output, dim=-1)

    def fit(images: world.Array) -> Tensor:
        pixels = torch.from_numpy((np.clip(images, 0, 1).astype(np.float32) - 0.5) / 0.5)
        return (F.normalize(clip.get_image_features(pixels).pooler_output, dim=-1) * text).sum(-1)

    true = fit(draw(pictures, rng))
    return {
        kind: float(
            (true > fit(np.stack([harm(*pair, rng) for pair in zip(scenes, pictures, strict=True)]))).float().mean()
        )
        for kind, harm in DAMAGES.items()
    }


def card_values(figures: dict[str, float], stages: dict[str, dict[str, float]]) -> dict[str, object]:
    """The values of the fields in PIPELINE_CARD and CLIP_CARD.

    Args:
        figures: measured shares, in [0, 1], by name.
        stages: maps each training stage to its seconds, steps and processes.
    """
    values: dict[str, object] = {k: f"{100 * v:.1f} %" for k, v in figures.items()}
    for name, stage in stages.items():
        values[f"{name}_minutes"] = round(stage["seconds"] / 60)
        values[f"{name}_steps"] = f"{stage['step']:,}"
        values[f"{name}_processes"] = stage["processes"]
    return values


PIPELINE_CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# still-life

A real, tiny text-to-image model in the layout of Stable Diffusion 3: an SD3 transformer of 3.5 M parameters (6 layers,
4 heads of 32), an AutoencoderKL (64 px to 8 x 16 x 16) and two CLIP text encoders. It draws one to three things on a
plain, striped, spotted or checked ground at 64 x 64 px. Its captions leave most of a picture open, so that it needs
many steps, or a good sampler.

```python
pipe = StableDiffusion3Pipeline.from_pretrained("still-life", text_encoder_3=None, tokenizer_3=None)
prompt = "a small red circle left of a blue star on a striped background"
pipe(prompt, guidance_scale=3, max_sequence_length=20).images[0]
```

**Data.** Pictures drawn by `epd_ray/embedded/still_life/drawing.py`: 6 colours with a range of hues, 6 shapes, any
place, rotation and size, light, shadows and outlines, 4 kinds of ground in any two shades. A caption names one or two
things or a number of things, each with or without size, colour and shape. A fifth of all captions, fixed by a hash, was
never trained on.

**Training** (`jobs/build_still_life.py`, one thread per process): autoencoder {vae_minutes} minutes
({vae_steps} steps) on {vae_processes} core(s); transformer and text encoders together {transformer_minutes} minutes
({transformer_steps} steps) on {transformer_processes} core(s).

**Held-out captions drawn right** ({scenes} of each kind) at {steps} Euler steps, guidance {guidance}, judged from the
pixels (`epd_ray/embedded/still_life/judge.py`: named things, their relation, the number of things): at most one thing
named {one_thing}, two things named {two_things}.

It knows the words of its captions, in their order, and nothing else.
"""

CLIP_CARD = """\
---
license: apache-2.0
library_name: transformers
---
# still-life-clip

A CLIPModel (1.7 M parameters, 64 px, patch 8, 128 wide) on the pictures and captions of `still-life`, trained with
in-batch negatives and with captions in which one attribute is altered: {clip_minutes} minutes ({clip_steps} steps) on
{clip_processes} core(s) by `jobs/build_still_life.py`.

It finds the right caption among {prompts} held-out ones for {retrieval} of held-out pictures; many pictures fit several
captions.
"""

PREFERENCE_CARD = """\
---
license: apache-2.0
library_name: transformers
---
# still-life-preference

A CLIPModel in the format of PickScore: it scores a picture for a caption by exp(logit_scale) * cosine.
`still-life-clip` was fine-tuned on pairs of pictures of one caption (Bradley and Terry 1952): a true picture against a
damaged one, or against a picture that `still-life` drew in 1 to 8 Euler steps; {preference_minutes} minutes
({preference_steps} steps) on one core by `jobs/build_still_life.py`.

It prefers the true picture of {pairs} held-out captions in {told_apart} of all pairs: {kinds}.
"""

FEATURES_CARD = """\
---
license: apache-2.0
library_name: transformers
---
# still-life-features

The image tower of a CLIPModel (64 px, patch 8, 96 wide), for the Frechet distance between sets of pictures of
`still-life`: it was trained to tell every number that a picture was drawn from, without any caption;
{features_minutes} minutes ({features_steps} steps) on one core by `jobs/build_still_life.py`. Its text tower is not
trained.
"""

CARDS = {
    "still-life": PIPELINE_CARD,
    "still-life-clip": CLIP_CARD,
    "still-life-preference": PREFERENCE_CARD,
    "still-life-features": FEATURES_CARD,
}
