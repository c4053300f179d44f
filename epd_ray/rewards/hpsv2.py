"""HPS v2.1 (Wu et al. 2023): CLIP ViT-H/14 fine-tuned on human preference."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from epd_ray.errors import shown
from epd_ray.rewards.batches import check_batch_size, place
from epd_ray.rewards.checkpoints import TOKENIZER_FILES, companion, find_file, read_tensors
from epd_ray.rewards.preprocess import tensor_pixels
from epd_ray.rewards.text import PromptTokenizer, open_tokenizer
from epd_ray.rewards.towers import ClipTowers
from epd_ray.rewards.vit_h import build_clip, from_open_clip
from epd_ray.weights.hub import opening

CHECKPOINTS = ("HPS_v2.1_compressed.safetensors", "HPS_v2.1_compressed.pt")


class HpsV21Head:
    """Scores by the cosine of image and text embedding; most scores lie between 0.2 and 0.35.

    Of a picture that is not square the central square is scored (the hpsv2 package adds black bars instead).

    Args:
        model: directory or hub id that holds HPS_v2.1_compressed.pt or .safetensors, with open_clip's weight names.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of the network ("auto": float16 on CUDA, else float32); the cosine is computed in float32.
        batch_size: number of pictures per forward pass.
        tokenizer: directory or hub id of CLIP's tokenizer; None takes the model directory if it holds one, else
            OpenAI's CLIP.

    Raises:
        ModelError: the model is missing, damaged, or of another kind.
    """

    def __init__(
        self,
        *,
        model: str = "xswu/HPSv2",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 32,
        tokenizer: str | None = None,
    ) -> None:
        from transformers import CLIPTokenizer

        self.model_id, self.revision = model, revision
        torch_device, torch_dtype = place(device, dtype)
        tokenizer_source = companion(model, tokenizer, "openai/clip-vit-large-patch14", TOKENIZER_FILES)
        with opening(model, "HPSv2.1 model"):
            tensors = read_tensors(find_file(model, CHECKPOINTS, revision))
            network = build_clip(from_open_clip(tensors), f"HPSv2.1 model {shown(model)}")
        clip_tokenizer = open_tokenizer(CLIPTokenizer, tokenizer_source)
        length = network.config.text_config.max_position_embeddings
        self._towers = ClipTowers(
            network,
            PromptTokenizer(clip_tokenizer, length, head="hpsv2.1", cleaned=True, padding=0),  # open_clip pads with 0
            partial(tensor_pixels, size=network.config.vision_config.image_size),
            device=torch_device, dtype=torch_dtype, batch_size=check_batch_size(batch_size),
        )  # fmt: skip

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._towers.cosine(images, prompts)
