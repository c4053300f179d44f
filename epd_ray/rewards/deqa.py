"""DeQA-Score (You et al. 2025): the quality of a picture, whatever its prompt, as a model that rates it in words."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epd_ray.errors import ModelError, shown
from epd_ray.rewards.batches import cautious, check_batch_size, check_risk, in_batches, place
from epd_ray.rewards.checkpoints import WEIGHT_FILES, companion, find_file, read_sharded
from epd_ray.rewards.owl2 import Owl2, OwlSizes
from epd_ray.rewards.text import open_tokenizer
from epd_ray.rewards.towers import open_square_processor
from epd_ray.storage.documents import parse_record
from epd_ray.weights.hub import opening

TOKENIZER = "hf-internal-testing/llama-tokenizer"
BEFORE = "USER: How would you rate the quality of this image?\n"
AFTER = "\nASSISTANT: The quality of the image is"
RATINGS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}


class DeqaHead:
    """Scores by the expected rating, from 1 (bad) to 5 (excellent); the prompt has no influence.

    The probabilities of the five words after "The quality of the image is" weigh their ratings; the standard deviation
    of the rating under them is the model's uncertainty. A picture that is not square is scored between grey bars.

    Args:
        model: directory or hub id of an mPLUG-Owl2 that was trained to rate.
        revision: branch, tag or commit of `model` on the hub.
        device: name of a torch device; "auto" takes the GPU if there is one, else the CPU.
        dtype: precision of the network ("auto": float16 on CUDA, else float32).
        batch_size: number of pictures per forward pass.
        tokenizer: directory or hub id of Llama's tokenizer as tokenizer.json; None takes the model directory if it
            holds one, else TOKENIZER.
        risk: how many standard deviations are subtracted from the score, >= 0.

    Raises:
        ModelError: the model is missing, damaged, or of another kind.

    Source: zhiyuanyou/DeQA-Score, src/evaluate/scorer.py.
    """

    def __init__(
        self,
        *,
        model: str = "zhiyuanyou/DeQA-Score-Mix3",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 16,
        tokenizer: str | None = None,
        risk: float = 0.0,
    ) -> None:
        from transformers import PreTrainedTokenizerFast

        self.model_id, self.revision, self.batch_size = model, revision, check_batch_size(batch_size)
        self._risk = check_risk(risk)
        self._device, self._dtype = place(device, dtype)
        source = companion(model, tokenizer, TOKENIZER, ["tokenizer.json"])
        with opening(model, "DeQA model"):
            what = f"DeQA model {shown(model)}"
            config = find_file(model, ["config.json"], revision).read_bytes()
            sizes = parse_record(OwlSizes, config, f"{what}: config.json", ModelError, "give an mPLUG-Owl2")
            network = open_owl(model, revision, sizes, self._dtype, what)
            self._pixels = open_square_processor(model, revision)
        words = open_tokenizer(PreTrainedTokenizerFast, source)
        before, after, *ratings = (words(text).input_ids for text in (BEFORE, AFTER, *RATINGS))
        if any(ids[:1] != [words.bos_token_id] or len(ids) < 2 for ids in (before, after, *ratings)):
            raise ModelError(f"tokenizer {shown(source)} begins no text with a token of its own: give Llama's")
        self._before = torch.tensor(before, device=self._device)
        self._after = torch.tensor(after[1:], device=self._device)  # without the token that begins every text
        self._ids = torch.tensor([ids[1] for ids in ratings], device=self._device)
        if max(*before, *after, int(self._ids.max())) >= sizes.vocab_size:
            raise ModelError(
                f"tokenizer {shown(source)} has more tokens than {what}: give the one that it was trained with"
            )
        self._ratings = torch.tensor(list(RATINGS.values()), device=self._device)
        self._network = network.to(self._device).eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return in_batches(self._score, images, prompts, self.batch_size)

    @torch.inference_mode()
    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = self._pixels(images).to(self._device, self._dtype)
        logits = self._network(pixels, self._before, self._after)[:, self._ids]
        shares = torch.softmax(logits.float(), dim=-1)  # [b, 5]
        mean = shares @ self._ratings
        spread = (shares * (self._ratings - mean[:, None]) ** 2).sum(-1).sqrt()
        return cautious("deqa", mean, spread, self._risk)


def open_owl(model: str, revision: str | None, sizes: OwlSizes, dtype: torch.dtype, what: str) -> Owl2:
    """The network in its final precision, from the published checkpoint.

    Raises:
        ModelError: weights are missing, or have other shapes than config.json says.
    """
    tensors = read_sharded(model, WEIGHT_FILES, revision)
    with torch.device("meta"):
        network = Owl2(sizes)
    for name, expected in network.state_dict().items():
        if name not in tensors or tensors[name].shape != expected.shape:
            raise ModelError(f"{what} lacks {name}, or has it in another shape: is it another model's file?")
    wanted = {name: tensors[name].to(dtype) for name in network.state_dict()}  # tables that it computes itself are left
    network.load_state_dict(wanted, assign=True)
    return network
