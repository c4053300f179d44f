"""The embedded model opens as anyone would open it, and draws and judges what its cards say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPModel

from epd_ray.backbones.auto import open_backbone
from epd_ray.drawing.sampler import baseline
from epd_ray.embedded.models import EMBEDDED
from epd_ray.embedded.release import measure_clip, measure_pipeline
from epd_ray.embedded.scenes import distinct_scenes, render
from epd_ray.rewards.clip import ClipHead
from epd_ray.solvers.conditioned import noises

ASSETS = Path(next(iter(EMBEDDED.values()))).parent


def open_pipeline(**options):
    return StableDiffusion3Pipeline.from_pretrained(
        EMBEDDED["shapes"], text_encoder_3=None, tokenizer_3=None, **options
    )


def test_both_open_with_plain_calls_and_fit_16_megabytes():
    pipeline = open_pipeline()
    assert 1.5e6 <= sum(p.numel() for p in pipeline.transformer.parameters()) <= 4e6
    clip = CLIPModel.from_pretrained(EMBEDDED["shapes-clip"])
    assert clip.config.vision_config.image_size == 64
    files = [f for f in ASSETS.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert sum(f.stat().st_size for f in files) <= 16e6
    assert {f.suffix for f in files if f.stat().st_size > 1e6} == {".safetensors"}


def test_euler_equals_the_pipeline_on_the_shipped_weights():
    pipeline = open_pipeline(torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    backbone = open_backbone(model="shapes", device="cpu", dtype="float32", max_sequence_length=20)
    prompts = [s.caption for s in distinct_scenes("test", 3, 0, 0.5)]
    noise = noises(backbone, [1, 2, 3])
    theirs = pipeline(
        prompts, latents=noise.clone(), num_inference_steps=4, guidance_scale=7.0, max_sequence_length=20,
        output_type="latent",
    ).images  # fmt: skip
    ours = baseline("euler", 4).run(backbone, backbone.encode(prompts, 7.0), noise)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_words_are_single_tokens():
    tokenizer = open_pipeline().tokenizer
    caption = "a small yellow triangle at the bottom right on a purple background"
    assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2


def test_clip_retrieves_held_out_captions():
    scenes = distinct_scenes("test", 128, 1, 0.5)
    head = ClipHead(model="shapes-clip", device="cpu")
    images = torch.from_numpy(render(scenes, np.random.default_rng(0)))
    right = head.score(images, [s.caption for s in scenes])
    wrong = head.score(images, [s.caption for s in scenes[1:] + scenes[:1]])
    assert right.mean() > 0.8 and wrong.mean() < 0.5
    assert (right > wrong).float().mean() > 0.97


@pytest.mark.slow
def test_cards_figures_hold():
    drawn = measure_pipeline(EMBEDDED["shapes"], 48, 50)
    assert drawn["one_object"] >= 0.9 and drawn["two_objects"] >= 0.8
    assert measure_clip(EMBEDDED["shapes-clip"], 512)["retrieval"] >= 0.9
