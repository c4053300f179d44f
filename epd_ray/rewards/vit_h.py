"""Builds a transformers CLIPModel from the weights of a CLIP ViT-H/14, with open_clip's or transformers' names."""

import re
from typing import Any

import torch

from epd_ray.errors import ModelError, shown
from epd_ray.rewards.checkpoints import Tensors, check_loaded, count_layers

TEXT_HEAD_WIDTH, VISION_HEAD_WIDTH = 64, 80  # those of ViT-H/14, because they do not follow from the weights' shapes

PLAIN = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def from_open_clip(tensors: Tensors) -> Tensors:
    """Rename open_clip's state dict to a CLIPModel's, and split the joint matrix of query, key and value in three.

    Raises:
        ModelError: a weight has a name that open_clip's ViT models do not have.
    """
    converted: Tensors = {}
    for key, value in tensors.items():
        block = BLOCK.fullmatch(key.replace("in_proj_", "in_proj."))
        if key in PLAIN:
            converted[PLAIN[key]] = value
        elif key in TRANSPOSED:
            converted[TRANSPOSED[key]] = value.T
        elif block and (block[3] in INSIDE or block[3] == "attn.in_proj"):
            layer = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"
            if block[3] in INSIDE:
                converted[f"{layer}.{INSIDE[block[3]]}.{block[4]}"] = value
            else:
                for name, third in zip("qkv", value.chunk(3), strict=True):
                    converted[f"{layer}.self_attn.{name}_proj.{block[4]}"] = third
        else:
            raise ModelError(
                f"the checkpoint has a weight {shown(key)}, which no open_clip ViT has: is it another model's file?"
            )
    return converted


def build_clip(tensors: Tensors, what: str) -> Any:
    """Build a CLIPModel in float32 from its state dict; its layer sizes follow from the shapes of the weights.

    Args:
        tensors: the state dict, with transformers' names.
        what: kind and name of the model, for the error message.

    Raises:
        ModelError: weights are missing, or have shapes that do not fit together.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        vocabulary, text_width = tensors["text_model.embeddings.token_embedding.weight"].shape
        positions = len(tensors["text_model.embeddings.position_embedding.weight"])
        width, _, patch, _ = tensors["vision_model.embeddings.patch_embedding.weight"].shape
        patches = len(tensors["vision_model.embeddings.position_embedding.weight"]) - 1
        projection = len(tensors["text_projection.weight"])
        text_inner = len(tensors["text_model.encoder.layers.0.mlp.fc1.weight"])
        vision_inner = len(tensors["vision_model.encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise ModelError(f"{what} lacks {error.args[0]}: is it another model's file?") from error
    shared = {"hidden_act": "gelu", "projection_dim": projection}
    text = shared | {
        "hidden_size": text_width,
        "intermediate_size": text_inner,
        "num_attention_heads": max(1, text_width // TEXT_HEAD_WIDTH),
        "num_hidden_layers": count_layers(tensors, "text_model.encoder.layers."),
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "bos_token_id": vocabulary - 2,  # the last two tokens of CLIP's vocabulary mark start and end of a text
        "eos_token_id": vocabulary - 1,
        "pad_token_id": 0,
    }
    vision = shared | {
        "hidden_size": width,
        "intermediate_size": vision_inner,
        "num_attention_heads": max(1, width // VISION_HEAD_WIDTH),
        "num_hidden_layers": count_layers(tensors, "vision_model.encoder.layers."),
        "image_size": round(patches**0.5) * patch,
        "patch_size": patch,
    }
    network, report = CLIPModel.from_pretrained(
        None, config=CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection), state_dict=tensors,
        dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    check_loaded(report, what)
    return network
