"""Readers of the text in pictures: GOT-OCR 2.0 on transformers, and RapidOCR, which is an extra of this package."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from epd_ray.embedded.models import resolve_model
from epd_ray.errors import ModelError, shown
from epd_ray.rewards.checkpoints import PROCESSOR_FILES, check_loaded, find_file
from epd_ray.rewards.preprocess import as_pictures
from epd_ray.rewards.text import open_tokenizer
from epd_ray.weights.hub import opening

RAPID = "rapidocr"
KIND = "got_ocr2"
IMAGE, END = "<imgpad>", "<|im_end|>"
BEFORE = (
    "<|im_start|>system\nYou should follow the instructions carefully and explain your answers in detail.<|im_end|>"
    "<|im_start|>user\n<img>"
)
AFTER = "</img>\n OCR: <|im_end|><|im_start|>assistant\n"
SHRINK = 16  # patches of the picture per token, after two convolutions that halve both sides


class GotReader:
    """Reads plain text with GOT-OCR 2.0 (Wei et al. 2024), asked as by its own processor in transformers.

    Args:
        model: directory or hub id, in transformers' format.
        revision: branch, tag or commit on the hub; None is the default branch.
        device: the device that the network runs on.
        dtype: precision of the network.
        longest: largest number of tokens that are written for a picture.

    Raises:
        ModelError: the model is missing, damaged, or of another kind.
    """

    def __init__(
        self, model: str, revision: str | None, *, device: torch.device, dtype: torch.dtype, longest: int
    ) -> None:
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GotOcr2ForConditionalGeneration
        from transformers import GotOcr2ImageProcessorPil as Processor

        with opening(model, "ocr model"):
            config = AutoConfig.from_pretrained(resolve_model(model), revision=revision)
            if config.model_type != KIND:
                raise ModelError(f"ocr model {shown(model)} is a {config.model_type}: give a {KIND}, or {RAPID}")
            network, report = GotOcr2ForConditionalGeneration.from_pretrained(
                resolve_model(model), revision=revision, dtype=dtype, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
            check_loaded(report, f"ocr model {shown(model)}")
            find_file(model, PROCESSOR_FILES, revision)
            self._processor = Processor.from_pretrained(resolve_model(model), revision=revision)
        self._tokenizer = open_tokenizer(AutoTokenizer, model, revision)
        ends = [self._tokenizer.convert_tokens_to_ids(END), self._tokenizer.eos_token_id]
        network.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=longest, eos_token_id=[end for end in ends if end is not None],
            pad_token_id=self._tokenizer.pad_token_id,
        )  # fmt: skip
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        self._question = BEFORE + IMAGE * (patches // SHRINK) + AFTER
        self._device, self._dtype = device, dtype
        self._network = network.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def read(self, images: Tensor) -> list[str]:
        """The texts in images [b, 3, H, W], float in [0, 1]."""
        pixels = self._processor(as_pictures(images), return_tensors="pt").pixel_values.to(self._device, self._dtype)
        tokens = self._tokenizer([self._question] * len(images), return_tensors="pt", add_special_tokens=False)
        ids = tokens.input_ids.to(self._device)
        written = self._network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels
        )[:, ids.shape[1] :]  # fmt: skip
        texts: list[str] = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return texts


class RapidReader:
    """Reads with RapidOCR, which has the small networks of PaddleOCR in its package and runs on the CPU.

    Raises:
        ModelError: the package is not installed.
    """

    def __init__(self) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ModelError(f'ocr model {RAPID} needs a package: pip install "epd-ray[ocr]" ({error})') from error
        self._engine: Any = RapidOCR()

    def read(self, images: Tensor) -> list[str]:
        """The texts in images [b, 3, H, W], float in [0, 1]: the pieces that were found, as the engine orders them."""
        return [read_pieces(self._engine(picture)[0]) for picture in as_pictures(images)]


def read_pieces(found: Sequence[Sequence[Any]] | None) -> str:
    """The text of RapidOCR's pieces (corners, text, confidence); None stands for none."""
    return " ".join(str(piece[1]) for piece in found or [])
