"""Run with an interpreter that has image-reward: python imagereward_scores.py DIRECTORY, filled as for hpsv2.

Besides ImageReward it holds OpenAI's CLIP, the aesthetic predictor over it, and a transformers of its own, in which
PickScore's published example runs.
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
from common import allow_torchvision, randomise, save_bpe
from PIL import Image

allow_torchvision()
sys.modules.setdefault("ImageReward.ReFL", ModuleType("ImageReward.ReFL"))  # the training half, with diffusers

import clip  # noqa: E402
from clip.model import CLIP  # noqa: E402
from clip.simple_tokenizer import SimpleTokenizer  # noqa: E402
from ImageReward.ImageReward import ImageReward  # noqa: E402
from ImageReward.models.AestheticScore import MLP, AestheticScore  # noqa: E402
from ImageReward.models.BLIP import blip_pretrain, vit  # noqa: E402
from ImageReward.models.CLIPScore import CLIPScore  # noqa: E402
from torch import nn  # noqa: E402
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast  # noqa: E402


def imagereward(directory: Path, prompts: list, files: list) -> torch.Tensor:
    """The package's own class, with a small image tower; its text tower's sizes are med_config.json's."""

    def small_vit(*_: object) -> tuple:
        return vit.VisionTransformer(img_size=224, patch_size=16, embed_dim=128, depth=2, num_heads=2), 128

    if "--full" not in sys.argv:
        blip_pretrain.create_vit = small_vit
    network = ImageReward(str(directory / "med_config.json"))
    randomise(network, 1)
    torch.save(network.state_dict(), directory / "ImageReward.pt")
    network.eval()
    with torch.no_grad():
        return torch.tensor([network.score(p, str(f)) for p, f in zip(prompts, files, strict=True)])


def openai_clip(directory: Path, prompts: list, files: list) -> dict:
    """The package's CLIPScore and AestheticScore, without the downloads of their constructors."""
    network = CLIP(64, 224, 2, 128, 32, 77, 49408, 128, 2, 2).eval()
    randomise(network, 2)
    torch.save(network.state_dict(), directory / "openai.pt")
    answers = {"clip tokens": clip.tokenize(prompts, truncate=True)}
    for name, head in {"clip": CLIPScore, "aesthetic": AestheticScore}.items():
        scorer = head.__new__(head)
        nn.Module.__init__(scorer)
        scorer.device, scorer.clip_model, scorer.preprocess = "cpu", network, clip.clip._transform(224)
        if name == "aesthetic":
            scorer.mlp = MLP(64)
            randomise(scorer.mlp, 3)
            torch.save(scorer.mlp.state_dict(), directory / "sac+logos+ava1-l14-linearMSE.pth")
            scorer.mlp.eval()
        with torch.no_grad():
            answers[name] = torch.tensor([scorer.score(p, str(f)) for p, f in zip(prompts, files, strict=True)])
    preprocess = clip.clip._transform(224)
    answers["pixels"] = torch.stack([preprocess(Image.open(file, formats=["PNG"])) for file in files])
    return answers


def pickscore(directory: Path, prompts: list, files: list) -> torch.Tensor:
    """The model card's example."""
    shared = {"num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": 64}
    text = shared | {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    vision = shared | {"hidden_size": 160, "num_attention_heads": 2, "intermediate_size": 320, "patch_size": 14}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).eval()
    randomise(network, 4)
    network.save_pretrained(directory)
    processor, tokenizer = (
        CLIPImageProcessor(),
        CLIPTokenizerFast.from_pretrained(directory),
    )  # what AutoProcessor gives
    processor.save_pretrained(directory)
    pixels = processor(images=[Image.open(file, formats=["PNG"]) for file in files], return_tensors="pt")
    words = tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        image = network.get_image_features(**pixels)
        text = network.get_text_features(**words)
        image, text = (e / torch.norm(e, dim=-1, keepdim=True) for e in (image, text))
        return torch.diagonal(network.logit_scale.exp() * (text @ image.T))


def main(directory: Path) -> None:
    prompts = json.loads((directory / "prompts.json").read_text())
    files = [directory / f"{i}.png" for i in range(len(prompts))]
    bpe = SimpleTokenizer()
    for name in ("clip", "pickscore"):
        save_bpe(directory / name, bpe.encoder, bpe.bpe_ranks)
    os.chdir(directory)  # where the package finds "bert-base-uncased"
    answers = {"imagereward": imagereward(directory, prompts, files), **openai_clip(directory, prompts, files)}
    answers["pickscore"] = pickscore(directory / "pickscore", prompts, files)
    torch.save(answers, directory / "answers.pt")


main(Path(sys.argv[1]))
