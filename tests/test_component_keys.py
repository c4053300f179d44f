"""Every key in the configuration of a model's parts is obeyed as by the diffusers pipeline, refused, or does nothing.

A key that a new version of diffusers adds makes the first two tests fail: decide which of the three it is.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from epd_ray.drawing.sampler import baseline
from epd_ray.errors import ModelError
from tests import tiny_models
from tests.families import MODELS, edit, folder, load, run
from tests.test_backbones import pipeline_images

# -- what the pipelines themselves read -------------------------------------------------------------------------------

SIZES = "vae.block_out_channels unet.sample_size unet.in_channels"  # shapes: a wrong one cannot draw
READ = {  # by hand from the pipelines' source; "self" is the pipeline's own configuration
    "StableDiffusionPipeline": f"{SIZES} vae.scaling_factor unet.time_cond_proj_dim text_encoder.use_attention_mask "
    "scheduler.steps_offset scheduler.clip_sample unet._diffusers_version",
    "StableDiffusionXLPipeline": f"{SIZES} vae.scaling_factor vae.latents_mean vae.latents_std vae.force_upcast "
    "unet.time_cond_proj_dim unet.addition_time_embed_dim text_encoder_2.projection_dim "
    "scheduler.num_train_timesteps self.force_zeros_for_empty_prompt",
    "StableDiffusion3Pipeline": "vae.block_out_channels vae.scaling_factor vae.shift_factor transformer.sample_size "
    "transformer.patch_size transformer.joint_attention_dim transformer.in_channels scheduler.use_dynamic_shifting "
    "scheduler.base_image_seq_len scheduler.max_image_seq_len scheduler.base_shift scheduler.max_shift",
    "FluxPipeline": "vae.block_out_channels vae.scaling_factor vae.shift_factor transformer.in_channels "
    "transformer.guidance_embeds scheduler.use_flow_sigmas scheduler.base_image_seq_len scheduler.max_image_seq_len "
    "scheduler.base_shift scheduler.max_shift",
    "DDPMPipeline": "unet.sample_size unet.in_channels",
    "DDIMPipeline": "unet.sample_size unet.in_channels",
    "LDMPipeline": "unet.sample_size unet.in_channels vqvae.scaling_factor",
}


@pytest.mark.parametrize("name", READ)
def test_the_pipelines_read_no_other_keys(name: str) -> None:
    tree = ast.parse(inspect.getsource(sys.modules[getattr(diffusers, name).__module__]))
    assert set(_reads(tree)) == set(READ[name].split())


def _reads(tree: ast.AST) -> Iterator[str]:
    """The keys in `part.config.key`, `part.config.get("key")` and `hasattr(part.config, "key")`, as part.key."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _part(node.value) and node.attr != "get":
            yield f"{_part(node.value)}.{node.attr}"
        if isinstance(node, ast.Call):
            called = node.func
            owner = called.value if isinstance(called, ast.Attribute) and called.attr == "get" else None
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            if ast.unparse(called) in ("hasattr", "getattr"):
                owner = node.args[0]
            if owner is not None and _part(owner):
                yield f"{_part(owner)}.{names[0]}"


def _part(node: ast.AST) -> str | None:
    """The part's name, if a node is its configuration."""
    if isinstance(node, ast.Attribute) and node.attr == "config":
        return ast.unparse(node.value).rpartition(".")[2]
    return None


# -- what there is to set ---------------------------------------------------------------------------------------------

INSIDE = {  # read by the part's own class, which is the same object here and in the pipeline
    "AutoencoderKL": "in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block "
    "act_fn latent_channels norm_num_groups sample_size use_quant_conv use_post_quant_conv mid_block_add_attention",
    "VQModel": "in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block act_fn "
    "latent_channels sample_size num_vq_embeddings norm_num_groups vq_embed_dim norm_type mid_block_add_attention "
    "lookup_from_codebook force_upcast",
    "UNet2DConditionModel": "center_input_sample flip_sin_to_cos freq_shift down_block_types mid_block_type "
    "up_block_types only_cross_attention block_out_channels layers_per_block downsample_padding mid_block_scale_factor "
    "dropout act_fn norm_num_groups norm_eps cross_attention_dim transformer_layers_per_block "
    "reverse_transformer_layers_per_block encoder_hid_dim attention_head_dim num_attention_heads dual_cross_attention "
    "use_linear_projection addition_time_embed_dim upcast_attention resnet_time_scale_shift resnet_skip_time_act "
    "resnet_out_scale_factor time_embedding_type time_embedding_dim time_embedding_act_fn timestep_post_act "
    "conv_in_kernel conv_out_kernel projection_class_embeddings_input_dim attention_type class_embeddings_concat "
    "mid_block_only_cross_attention cross_attention_norm addition_embed_type_num_heads",
    "UNet2DModel": "center_input_sample time_embedding_type time_embedding_dim freq_shift flip_sin_to_cos "
    "down_block_types mid_block_type up_block_types block_out_channels layers_per_block mid_block_scale_factor "
    "downsample_padding downsample_type upsample_type dropout act_fn attention_head_dim norm_num_groups "
    "attn_norm_num_groups norm_eps resnet_time_scale_shift add_attention num_train_timesteps",
    "SD3Transformer2DModel": "patch_size num_layers attention_head_dim num_attention_heads joint_attention_dim "
    "caption_projection_dim pooled_projection_dim dual_attention_layers qk_norm",
    "FluxTransformer2DModel": "patch_size num_layers num_single_layers attention_head_dim num_attention_heads "
    "joint_attention_dim pooled_projection_dim axes_dims_rope",
}
OBEYED = {  # each with a case in CHANGES, or with a test in test_backbones or test_backbone_options
    "AutoencoderKL": "scaling_factor shift_factor latents_mean latents_std force_upcast",
    "VQModel": "scaling_factor",
    "UNet2DConditionModel": "sample_size time_cond_proj_dim",
    "UNet2DModel": "sample_size",
    "SD3Transformer2DModel": "sample_size",
    "FluxTransformer2DModel": "guidance_embeds",
    "VE scheduler": "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type",
    "FlowMatchEulerDiscreteScheduler": "shift use_dynamic_shifting base_shift max_shift base_image_seq_len "
    "max_image_seq_len shift_terminal use_karras_sigmas use_exponential_sigmas use_beta_sigmas time_shift_type",
    "StableDiffusionXLPipeline": "force_zeros_for_empty_prompt",
}
REFUSED = {  # each, with a value that is not the usual one, has a case in REFUSALS or in test_backbones
    "UNet2DConditionModel": "in_channels out_channels encoder_hid_dim_type class_embed_type addition_embed_type "
    "num_class_embeds",
    "UNet2DModel": "in_channels out_channels class_embed_type num_class_embeds",
    "SD3Transformer2DModel": "in_channels out_channels pos_embed_max_size",
    "FluxTransformer2DModel": "in_channels out_channels",
    "VE scheduler": "rescale_betas_zero_snr timestep_type use_flow_sigmas",
    "FlowMatchEulerDiscreteScheduler": "num_train_timesteps invert_sigmas",
}
WITHOUT_INFLUENCE = {
    # How a scheduler itself steps from one noise level to the next, and which levels it visits: a solver replaces that.
    "VE scheduler": "skip_prk_steps set_alpha_to_one timestep_spacing steps_offset interpolation_type "
    "use_karras_sigmas use_exponential_sigmas use_beta_sigmas sigma_min sigma_max final_sigmas_type variance_type "
    "clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value solver_order "
    "algorithm_type solver_type lower_order_final euler_at_final use_lu_lambdas flow_shift lambda_min_clipped "
    "use_dynamic_shifting time_shift_type predict_x0 disable_corrector solver_p shift_terminal",
    "FlowMatchEulerDiscreteScheduler": "stochastic_sampling",
    # The checker replaces finished pictures by black ones; a reward must see what the model drew.
    "StableDiffusionPipeline": "requires_safety_checker",
    # An invisible mark, put on the finished picture where a further package is installed.
    "StableDiffusionXLPipeline": "add_watermarker",
}
VE_SCHEDULERS = (
    "PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "HeunDiscreteScheduler",
)  # fmt: skip
CLASSES = {
    **{name: name for name in (*INSIDE, "FlowMatchEulerDiscreteScheduler", *READ)},
    **dict.fromkeys(VE_SCHEDULERS, "VE scheduler"),
}
PARTS = {
    "vae", "vqvae", "unet", "transformer", "scheduler", "safety_checker", "feature_extractor", "image_encoder",
    *(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CLASSES.items())
def test_each_key_has_its_place(name: str, kind: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.keys() - {"self", "kwargs"}
    places = [set(table.get(kind, "").split()) for table in (INSIDE, OBEYED, REFUSED, WITHOUT_INFLUENCE)]
    known = set().union(*places)
    assert len(known) == sum(map(len, places))
    assert parameters - PARTS <= known, f"new in {name}: {parameters - PARTS - known}"
    if kind == name:
        assert known <= parameters, f"gone from {name}: {known - parameters}"


# -- obeyed: the picture changes as the pipeline's does ---------------------------------------------------------------

LATENTS = {"latents_mean": [-1.6, 0.2, 1.4, 0.5], "latents_std": [8.4, 5.9, 5.2, 4.1]}
SHIFT = {"base_shift": 0.9, "max_shift": 2.0, "base_image_seq_len": 8, "max_image_seq_len": 32}
CHANGES: list[tuple[str, str, dict[str, Any], bool]] = [  # the last: whether the pipeline's picture changes
    ("sd", "vae/config.json", {"scaling_factor": 0.4}, True),
    ("sd", "vae/config.json", {"shift_factor": 0.5, **LATENTS}, False),
    ("sd", "scheduler/scheduler_config.json", {"beta_end": 0.02}, True),
    ("sd", "scheduler/scheduler_config.json", {"steps_offset": 0, "skip_prk_steps": False}, False),
    ("sdxl", "vae/config.json", {"scaling_factor": 0.4}, True),
    ("sdxl", "vae/config.json", LATENTS, True),
    ("sdxl", "vae/config.json", {"latents_mean": LATENTS["latents_mean"]}, False),
    ("sdxl", "vae/config.json", {"shift_factor": 0.5}, False),
    ("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": False}, True),
    ("sd3_t5", "vae/config.json", {"scaling_factor": 0.4}, True),
    ("sd3_t5", "vae/config.json", {"shift_factor": 0.5}, True),
    ("sd3_t5", "vae/config.json", LATENTS, False),
    ("sd3_t5", "scheduler/scheduler_config.json", {"shift": 4.0}, True),
    ("sd3_t5", "scheduler/scheduler_config.json", {"shift_terminal": 0.1}, True),
    ("sd3_t5", "scheduler/scheduler_config.json", {"use_karras_sigmas": True}, True),
    ("sd3_dynamic", "scheduler/scheduler_config.json", SHIFT, True),
    ("flux", "vae/config.json", {"scaling_factor": 0.4, "shift_factor": 0.5}, True),
    ("flux", "vae/config.json", LATENTS, False),
    ("flux", "scheduler/scheduler_config.json", SHIFT, True),
    ("flux", "scheduler/scheduler_config.json", {"time_shift_type": "linear"}, True),
    ("ldm", "vqvae/config.json", {"scaling_factor": 0.4}, True),
]


@pytest.mark.parametrize(
    ("name", "file", "changes", "matters"), CHANGES, ids=lambda v: "+".join(v) if isinstance(v, dict) else str(v)
)
def test_a_change_is_the_pipelines_change(
    name: str, file: str, changes: dict[str, Any], matters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "ldm":  # a code that flips for a difference in the last bits would hide what is measured
        quantizer = diffusers.models.autoencoders.vq_model.VectorQuantizer
        monkeypatch.setattr(quantizer, "forward", lambda _, latents: (latents, torch.zeros(()), None))
    model = MODELS[name](tmp_path / "m")
    edit(model / file, **changes)
    theirs, before = (pipeline_images(name, path, 4, 5.0) for path in (model, folder(name)))
    assert bool((theirs - before).abs().max() > 1e-3) == matters
    backbone = load(model)
    ours = backbone.decode(run(backbone, baseline("euler@model", 4), 5.0))
    assert (ours - theirs).abs().max() < (1e-4 if name == "ldm" else 2e-5)


@pytest.mark.parametrize(("name", "save"), [("sd", tiny_models.save_sd), ("sdxl", tiny_models.save_sdxl)])
def test_guidance_that_the_network_embeds(name: str, save: Callable[..., Path], tmp_path: Path) -> None:
    """As in latent consistency models: one pass of the network, which is told the scale."""
    model = save(tmp_path / "m", time_cond_proj_dim=8)
    backbone = load(model)
    pictures = {}
    for scale in (1.0, 7.5):
        assert not backbone.encode(["red"], scale).guided
        pictures[scale] = backbone.decode(run(backbone, baseline("euler@model", 4), scale))
        assert (pictures[scale] - pipeline_images(name, model, 4, scale)).abs().max() < 2e-5
    assert (pictures[1.0] - pictures[7.5]).abs().max() > 1e-3


# -- refused ----------------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[str, str, dict[str, Any], str]] = [
    ("sd", "scheduler/scheduler_config.json", {"timestep_type": "continuous"}, "timestep_type='continuous'"),
    ("sd", "scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
    ("sd3_t5", "scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "num_train_timesteps=500"),
    ("flux", "scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "num_train_timesteps=500"),
    ("flux", "scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas=True"),
]


@pytest.mark.parametrize(("name", "file", "changes", "message"), REFUSALS)
def test_what_a_scheduler_cannot_mean_is_refused(
    name: str, file: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = MODELS[name](tmp_path / "m")
    if "scheduler" in file and name == "sd":
        kind = diffusers.EulerDiscreteScheduler if "timestep_type" in changes else diffusers.DPMSolverMultistepScheduler
        kind(**tiny_models.SD_BETAS).save_pretrained(model / "scheduler")
        edit(model / "model_index.json", scheduler=["diffusers", kind.__name__])
    edit(model / file, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load(model)
    assert "\n" not in str(caught.value) and str(model) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "network", "message"),
    [
        ("sd", {"in_channels": 9}, r"takes 9 channels and gives 4.*have 4"),
        ("sd", {"out_channels": 8}, r"takes 4 channels and gives 8"),
        ("sd", {"num_class_embeds": 10}, "num_class_embeds=10"),
        ("sd", {"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ("sd", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        ("sdxl", {"addition_embed_type": "text_image"}, "addition_embed_type='text_image'"),
        ("sd", {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type='image_proj'"),
        ("sd3_t5", {"in_channels": 8}, r"takes 8 channels"),
        ("flux", {"in_channels": 96}, r"takes 96 channels and gives 96.*have 16"),
    ],
)
def test_networks_for_other_tasks_are_refused(
    name: str, network: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration is changed after the network is built, because not each of these can be built this small."""
    kind = {"sd3_t5": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}.get(name, "UNet2DConditionModel")
    cls = getattr(diffusers, kind)
    original = cls.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(cls, *args, **kwargs)
        made.register_to_config(**network)
        return made

    monkeypatch.setattr(cls, "from_pretrained", classmethod(from_pretrained))
    with pytest.raises(ModelError, match=message) as caught:
        load(folder(name))
    assert "\n" not in str(caught.value)
