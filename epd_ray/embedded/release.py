"""Writes the folders of the embedded models, measures the models, and writes their model cards with the figures."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tqdm import tqdm
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from epd_ray.embedded import scenes as world
from epd_ray.embedded.judge import scene_accuracy
from epd_ray.embedded.networks import TOKENS, Denoiser, load_ema, make_clip, make_tokenizer, make_vae, tokenize
from epd_ray.randomness import Purpose, stream, torch_generator

SHIFT = 2.0  # shift of the sigmas in the shipped scheduler
GUIDANCE = 4.0  # guidance scale at which the model is measured
SCENES = 150  # number of test scenes with one and with two objects; only 173 test scenes with one object exist


def release(out: Path, assets: Path, prompts: int, steps: int) -> dict[str, float]:
    """Write the two model folders, measure both models on held-out scenes, and write their model cards.

    Args:
        out: folder with the checkpoints of jobs/build_shapes.py.
        assets: folder in which the model folders are written.
        prompts: number of captions among which shapes-clip must find the right one.
        steps: number of Euler steps with which shapes is measured.

    Returns:
        The measured shares, in [0, 1], by name.
    """
    tokenizer = make_tokenizer(world.WORDS)
    export_pipeline(out, assets / "shapes", tokenizer)
    export_clip(out, assets / "shapes-clip", tokenizer)
    figures = measure_pipeline(assets / "shapes", SCENES, steps) | measure_clip(assets / "shapes-clip", prompts)
    stages = {name: json.loads((out / f"{name}.json").read_text()) for name in ("vae", "clip", "transformer")}
    values = card_values(figures, stages) | {"prompts": prompts, "steps": steps, "guidance": GUIDANCE, "scenes": SCENES}
    (assets / "shapes" / "README.md").write_text(PIPELINE_CARD.format(**values))
    (assets / "shapes-clip" / "README.md").write_text(CLIP_CARD.format(**values))
    return figures


def export_pipeline(out: Path, folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Save a StableDiffusion3Pipeline in the diffusers layout, with float16 weights."""
    denoiser = Denoiser(tokenizer)
    load_ema(denoiser, out / "transformer.pt")
    latents = json.loads((out / "latents.json").read_text())
    vae = load_ema(make_vae(), out / "vae.pt")
    vae.register_to_config(scaling_factor=latents["scale"], shift_factor=latents["shift"])
    pipeline = StableDiffusion3Pipeline(
        transformer=denoiser.transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder=denoiser.text_encoder, tokenizer=tokenizer,
        text_encoder_2=denoiser.text_encoder_2, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline.to(dtype=torch.float16).save_pretrained(folder)


def export_clip(out: Path, folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Save a CLIPModel with its tokenizer and image processor, with float16 weights."""
    clip = load_ema(make_clip(tokenizer), out / "clip.pt")
    clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": world.CANVAS}
    crop = {"height": world.CANVAS, "width": world.CANVAS}
    CLIPImageProcessorPil(size=size, crop_size=crop, image_mean=half, image_std=half).save_pretrained(folder)


def measure_pipeline(folder: Path, count: int, steps: int) -> dict[str, float]:
    """The shares of `count` held-out scenes that are drawn right, for scenes with one object and with two objects."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.bfloat16, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    figures = {}
    for name, two_things in (("one_object", 0.0), ("two_objects", 1.0)):
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
    images = (world.render(scenes, stream(Purpose.RENDERING, 0)) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    with torch.inference_mode():
        image = clip.get_image_features(**processor(list(images), return_tensors="pt")).pooler_output
        text = clip.get_text_features(tokenize(tokenizer, [s.caption for s in scenes])).pooler_output
    nearest = (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).argmax(1)
    return {"retrieval": float((nearest == torch.arange(prompts)).float().mean())}


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
# shapes

A real, tiny text-to-image model in the layout of Stable Diffusion 3: an SD3 transformer of 3.5 M parameters (6 layers,
4 heads of 32), an AutoencoderKL (64 px to 8 x 16 x 16) and two CLIP text encoders. It draws one or two flat shapes at
64 x 64 px.

```python
pipe = StableDiffusion3Pipeline.from_pretrained("shapes", text_encoder_3=None, tokenizer_3=None)
prompt = "a small red circle left of a large blue star on a white background"
pipe(prompt, guidance_scale=4, max_sequence_length=20).images[0]
```

**Data.** Scenes drawn by `epd_ray/embedded/scenes.py`: 6 colours, 5 shapes, 2 sizes, 3 grounds; one object in
9 places or two in 4 relations; 60 % with two. A fifth of all scenes, fixed by a hash of the caption, was never trained
on.

**Training** (`jobs/build_shapes.py`, CPU, one thread per process): autoencoder {vae_minutes} minutes ({vae_steps}
steps) on {vae_processes} core; transformer and text encoders together {transformer_minutes} minutes
({transformer_steps} steps of 96) on {transformer_processes} cores.

**Held-out scenes drawn right** ({scenes} of each kind) at {steps} Euler steps, guidance {guidance}, every attribute,
place or relation and the ground, judged from the pixels (`epd_ray/embedded/judge.py`): one object {one_object}, two
objects {two_objects}.

It knows the words of its captions, in their order, and nothing else.
"""

CLIP_CARD = """\
---
license: apache-2.0
library_name: transformers
---
# shapes-clip

A CLIPModel (1.7 M parameters, 64 px, patch 8, 128 wide) on the scenes and captions of `shapes`, trained with in-batch
negatives and with captions in which one attribute is altered: {clip_minutes} minutes ({clip_steps} steps of 192) on
{clip_processes} core by `jobs/build_shapes.py`.

It finds the right caption among {prompts} held-out ones for {retrieval} of held-out pictures.
"""
