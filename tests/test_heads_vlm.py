"""The heads on vision-language models against the published formulas, one picture at a time, on the same weights."""

import functools
import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import gmean
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessorPil,
    GotOcr2Processor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    T5Config,
    T5ForConditionalGeneration,
)

from epd_ray.errors import ConfigError, ModelError, RewardError
from epd_ray.rewards import HEADS, hpsv3
from epd_ray.rewards.batches import cautious
from epd_ray.rewards.geneval2 import spellings
from epd_ray.rewards.ocr import edit_distance, likeness
from epd_ray.rewards.readers import read_pieces
from epd_ray.rewards.unifiedreward import mean_mark
from tests.tiny_vlms import (
    PIXELS,
    RATINGS,
    WIDTH,
    edit_json,
    pictures,
    qwen2,
    save_chat,
    save_clip_t5,
    save_deqa,
    save_geneval2,
    save_got,
    save_hpsv3,
    save_unifiedreward,
    save_vqascore,
)

PROMPTS = ["a small red circle", "a large blue star, {x}", "two", "Yes, a much longer prompt of twelve words, or so"]
ROWS: list[dict[str, Any]] = [
    {"vqa_list": [["How many circles are in the image?", "two"], ["Is it red?", "Yes"]], "target_text": "Open Daily"},
    {"vqa_list": '[["Are there stars?", "Yes"]]', "target_text": "op q"},
    {
        "vqa_list": [["How many things are there?", "two"], ["Is it?", "Yes"], ["Blue?", "Yes"]],
        "target_text": "TENdaily",
    },
    {"vqa_list": [["How many?", "two"]], "target_text": "zzz"},
]
IMAGES = pictures(4)
SAVE: dict[str, Callable[[Path], Path]] = {
    "deqa": save_deqa,
    "geneval2": save_geneval2,
    "hpsv3": save_hpsv3,
    "ocr": save_got,
    "unifiedreward": save_unifiedreward,
    "vqascore": save_vqascore,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "hpsv3": {"pixels": PIXELS}, "ocr": {"max_new_tokens": 8}, "unifiedreward": {"max_new_tokens": 8},
}  # fmt: skip
NAMES = list(SAVE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda name: SAVE[name](tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def head(folder: Callable[[str], Path]) -> Callable[[str], Any]:
    return functools.cache(lambda name: make(name, folder(name)))


def make(name: str, directory: Path, **options: Any) -> Any:
    return HEADS.get(name)(model=str(directory), device="cpu", **OPTIONS.get(name, {}) | options)


def score(head: Any, images: Tensor, prompts: Sequence[str], rows: Sequence[dict[str, Any]]) -> Tensor:
    found: Tensor = head.score(images, prompts, rows=rows) if hasattr(head, "needs") else head.score(images, prompts)
    return found


def assert_near(scores: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert scores.shape == expected.shape and scores.dtype == torch.float32 and scores.device.type == "cpu"
    assert expected.std() > 100 * tolerance  # so a mixed-up order would show
    assert (scores - expected).abs().max() < tolerance


def as_files(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.round(255 * i.permute(1, 2, 0).numpy()).astype(np.uint8)) for i in images]


class Published:
    """A chat model as the published scripts use it: one message with one picture, without padding."""

    def __init__(self, directory: Path) -> None:
        self.network = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(directory)

    def generate(self, picture: Image.Image, question: str, count: int) -> Any:
        seen = self.processor(images=[picture], return_tensors="pt")
        pad = "<|image_pad|>" * (int(seen["image_grid_thw"][0].prod()) // 4)
        ids = self.tokenizer(
            f"<|im_start|>user\n<|vision_start|>{pad}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n",
            return_tensors="pt",
        ).input_ids
        types = (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
        out = self.network.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **seen, max_new_tokens=count,
            do_sample=False, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        return out.scores[0][0], self.tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)


def test_vqascore(folder: Callable[[str], Path], head: Callable[[str], Any]) -> None:
    published = Published(folder("vqascore"))
    yes = published.tokenizer.encode("Yes", add_special_tokens=False)[0]
    expected = []
    for picture, prompt in zip(as_files(IMAGES), PROMPTS, strict=True):
        logits, _ = published.generate(picture, f'Does this figure show "{prompt}"? Please answer Yes or No.', 1)
        expected.append(F.softmax(logits / 1.0, dim=-1)[yes])
    assert_near(head("vqascore").score(IMAGES, PROMPTS), torch.stack(expected))


@pytest.mark.parametrize(("size", "tolerance"), [((56, 56), 1e-6), ((40, 60), 1e-5)])
def test_vqascore_on_clip_t5(clip_t5: Path, size: tuple[int, int], tolerance: float) -> None:
    images = pictures(4, *size)
    tensors = torch.load(clip_t5 / "pytorch_model.bin", weights_only=True)
    network = T5ForConditionalGeneration(T5Config.from_dict(json.loads((clip_t5 / "config.json").read_text()))).eval()
    network.load_state_dict({name: tensor for name, tensor in tensors.items() if "mm_" not in name})
    vision = CLIPVisionModel.from_pretrained(clip_t5 / "tower").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(clip_t5)
    processor = CLIPImageProcessorPil.from_pretrained(clip_t5 / "tower")
    expected = []
    for picture, prompt in zip(as_files(images), PROMPTS, strict=True):
        pixels = processor(on_grey(picture), return_tensors="pt").pixel_values
        text = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <image>\n"
            f'Does this figure show "{prompt}"? Please answer yes or no. ASSISTANT: '
        )
        before, after = (torch.tensor(tokenizer(chunk).input_ids) for chunk in text.split("<image>"))
        labels = torch.tensor([tokenizer("Yes").input_ids])
        with torch.inference_mode():
            seen = vision(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
            for layer in (0, 2):
                seen = linear(tensors, f"mm_projector.{layer}", seen if layer == 0 else F.gelu(seen))
            embeds = torch.cat([network.shared(before), seen, network.shared(after)])[None]
            logits = network(inputs_embeds=embeds, labels=labels).logits
        expected.append((-nn.CrossEntropyLoss(reduction="mean")(logits[0], labels[0])).exp())
    head = HEADS.get("vqascore")(model=str(clip_t5), device="cpu", batch_size=3)
    assert_near(head.score(images, PROMPTS), torch.stack(expected), tolerance)


@pytest.fixture(scope="module")
def clip_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip_t5(tmp_path_factory.mktemp("clip_t5"))


def on_grey(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in (0.48145466, 0.4578275, 0.40821073)))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_vision_tower": None}, "names no mm_vision_tower"),
        ({"mm_vision_tower": "/nowhere/clip"}, "image encoder of CLIP-FlanT5|is no directory"),
        ({"d_ff": 90}, "CLIP-FlanT5 model .* lacks .* or has them in another shape"),
    ],
)
def test_a_clip_t5_that_is_not_whole(clip_t5: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    shutil.copytree(clip_t5, tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", **change)
    with pytest.raises(ModelError, match=message) as caught:
        HEADS.get("vqascore")(model=str(tmp_path / "model"), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_geneval2(folder: Callable[[str], Path], mean: str) -> None:
    published = Published(folder("geneval2"))
    expected = []
    for picture, row in zip(as_files(IMAGES), ROWS, strict=True):
        asked = row["vqa_list"] if isinstance(row["vqa_list"], list) else json.loads(row["vqa_list"])
        soft = []
        for question, answer in asked:
            answers = ["Yes", "yes", " yes", " Yes"]
            if question.startswith("How many"):
                answers = [answer, answer.capitalize(), " " + answer, " " + answer.capitalize(), "2", " 2"]
            logits, _ = published.generate(picture, f"{question} Answer in one word.", 1)
            shares = F.softmax(logits, dim=-1)
            tokens = [published.tokenizer.encode(text)[0] for text in answers]
            assert len(set(tokens)) == len(tokens)
            soft.append(sum(shares[token].item() for token in tokens))
        expected.append(gmean(soft) if mean == "geometric" else sum(soft) / len(soft))
    found = make("geneval2", folder("geneval2"), mean=mean, batch_size=3).score(IMAGES, PROMPTS, rows=ROWS)
    assert_near(found, torch.tensor(expected, dtype=torch.float32))


def test_spellings_of_an_answer() -> None:
    assert spellings("Yes") == ["yes", "Yes", " yes", " Yes"]
    assert spellings("seven") == ["seven", "Seven", "7", " seven", " Seven", " 7"]


def test_unifiedreward(folder: Callable[[str], Path], head: Callable[[str], Any]) -> None:
    published = Published(folder("unifiedreward"))
    question = (
        "You are presented with a generated image and its associated text caption. "
        "Your task is to analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
        "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
        "- Alignment Score: How well the image matches the caption in terms of content.\n"
        "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, "
        "etc.).\n- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
        "Output your evaluation using the format below:\n\nAlignment Score (1-5): X\nCoherence Score (1-5): Y\n"
        "Style Score (1-5): Z\n\nYour task is provided as follows:\nText Caption: [{}]"
    )
    expected = []
    for picture, prompt in zip(as_files(IMAGES), PROMPTS, strict=True):
        _, answer = published.generate(picture, question.format(prompt), 8)
        marks = [float(line.partition("(1-5): ")[2]) for line in answer.splitlines()]
        assert len(marks) == 3
        expected.append((sum(marks) / 3 - 1) / 4)
    assert_near(head("unifiedreward").score(IMAGES, PROMPTS), torch.tensor(expected), 1e-6)


def test_an_answer_without_marks_is_an_error_that_quotes_it(folder: Callable[[str], Path]) -> None:
    good = "Alignment Score (1-5): 2.6947\nCoherence Score (1-5): 5\nStyle Score: 1"
    assert mean_mark(good, ["Alignment", "Coherence", "Style"]) == pytest.approx((2.6947 + 5 + 1) / 3)
    assert mean_mark("so.\nFinal Score: 4.5.", ["Final"]) == 4.5
    for bad in ("I like it", good.replace("5): 5", "5): 10"), good.replace("1-5): 2", "1-5): x"), f"{good}\n{good}"):
        with pytest.raises(RewardError, match=re.escape(f"begins {bad[:80]!r}")):
            mean_mark(bad, ["Alignment", "Coherence", "Style"])
    with pytest.raises(RewardError, match=r"an answer has no Final Score from 1 to 5: it begins 'Alignment Score"):
        make("unifiedreward", folder("unifiedreward"), marks=["Final"]).score(IMAGES[:1], PROMPTS[:1])


def published_hpsv3(directory: Path) -> Tensor:
    """Both outputs [4, 2] of Qwen2VLRewardModelBT, whose names of weights are the old ones."""
    tensors = load_file(directory / "HPSv3.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    config = Qwen2VLConfig.from_pretrained(directory)
    config.text_config.vocab_size = len(tokenizer)
    network = Qwen2VLForConditionalGeneration(config).eval()
    network.rm_head = nn.Sequential(
        nn.Linear(WIDTH, 32), nn.ReLU(), nn.Dropout(0.05), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2)
    ).eval()
    renamed = {re.sub("^model", "model.language_model", re.sub("^visual", "#", k)): t for k, t in tensors.items()}
    network.load_state_dict({k.replace("#", "model.visual"): t for k, t in renamed.items()}, strict=True)
    processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
    out = []
    for picture, prompt in zip(as_files(IMAGES), PROMPTS, strict=True):
        seen = processor([picture], return_tensors="pt")
        before, after = hpsv3.QUESTION.split("{prompt}")
        text = (
            f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * (len(seen['pixel_values']) // 4)}<|vision_end|>"
            f"{before}{prompt}{after}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        types = (ids == config.image_token_id).long()
        with torch.inference_mode():
            hidden = network.model(input_ids=ids, mm_token_type_ids=types, **seen)[0]
            logits = network.rm_head(hidden.float())
        special = ids == tokenizer.convert_tokens_to_ids("<|Reward|>")
        out.append(logits[special].view(1, -1))
    return torch.cat(out)


def test_hpsv3(folder: Callable[[str], Path], head: Callable[[str], Any], caplog: pytest.LogCaptureFixture) -> None:
    mean, log_deviation = published_hpsv3(folder("hpsv3")).unbind(-1)
    assert_near(head("hpsv3").score(IMAGES, PROMPTS), mean, 2e-5)
    with caplog.at_level(logging.INFO, logger="epd_ray.rewards.batches"):
        wary = make("hpsv3", folder("hpsv3"), risk=0.5).score(IMAGES, PROMPTS)
    assert_near(wary, mean - 0.5 * log_deviation.exp(), 1e-4)
    logged = [float(number) for number in re.findall(r"(?<=is |nd |ch )[\d.e+-]+", caplog.messages[0])]
    deviations = log_deviation.exp()
    assert logged == pytest.approx([deviations.mean().item(), deviations.max().item(), 0.5], rel=1e-3)


def test_hpsv3_asks_what_it_was_trained_with() -> None:
    question = hpsv3.QUESTION
    assert question.startswith("\nYou are tasked with evaluating a generated image based on Visual Quality and Text")
    assert "\n\n**Visual Quality:**  \nEvaluate" in question and ". \n\n**Text Alignment:**  \nAssess" in question
    assert question.endswith("description.\nTextual prompt - {prompt}\n\n\n\nPlease provide the overall ratings of "
                             "this image: <|Reward|>\n\nEND\n")  # fmt: skip
    assert question.count("\n- **") == 10 and question.count("<|Reward|>") == 1


def test_risk_is_subtracted_in_standard_deviations() -> None:
    means, deviations = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    assert cautious("x", means, deviations, 0.0).tolist() == [1, 2]
    assert cautious("x", means, deviations, 2.0).tolist() == [0, -4]


@pytest.mark.parametrize("name", ["hpsv3", "deqa"])
@pytest.mark.parametrize("risk", [-0.1, float("nan")])
def test_a_risk_below_nothing_is_refused(name: str, risk: float) -> None:
    with pytest.raises(ConfigError, match="is not a number of at least 0"):
        HEADS.get(name)(model="owner/name", risk=risk)


@functools.cache
def levenshtein(first: str, second: str) -> int:
    if not first or not second:
        return len(first) + len(second)
    if first[0] == second[0]:
        return levenshtein(first[1:], second[1:])
    tails = (first[1:], second), (first, second[1:]), (first[1:], second[1:])
    return 1 + min(levenshtein(*tail) for tail in tails)


def test_ocr(folder: Callable[[str], Path], head: Callable[[str], Any]) -> None:
    directory = folder("ocr")
    processor = GotOcr2Processor(
        GotOcr2ImageProcessorPil.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    )
    network = GotOcr2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    expected = []
    for picture, row in zip(as_files(IMAGES), ROWS, strict=True):
        inputs = processor(picture, return_tensors="pt", num_image_tokens=4)
        ids = network.generate(**inputs, do_sample=False, tokenizer=processor.tokenizer, stop_strings="<|im_end|>",
                               max_new_tokens=8)  # fmt: skip
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        read, target = text.replace(" ", "").lower(), row["target_text"].replace(" ", "").lower()
        distance = 0 if target in read else levenshtein(read, target)
        expected.append(1 - min(distance, len(target)) / len(target))
    assert len(set(expected)) > 2
    assert_near(head("ocr").score(IMAGES, PROMPTS, rows=ROWS), torch.tensor(expected), 1e-6)


def test_likeness_of_texts() -> None:
    for first, second in (("kitten", "sitting"), ("", "abc"), ("flaw", "lawn"), ("same", "same"), ("abcdef", "azced")):
        assert edit_distance(first, second) == levenshtein(first, second)
    assert likeness("xxopendailyxx", "opendaily") == 1  # other words beside it cost nothing
    assert likeness("opendaly", "opendaily") == pytest.approx(8 / 9)
    assert likeness("something else altogether", "open") == likeness("", "open") == 0


def test_the_small_reader_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ModelError, match=r'pip install "epd-ray\[ocr\]"'):
        HEADS.get("ocr")(model="rapidocr")
    assert read_pieces(None) == "" and read_pieces([[[], "Open", 0.9], [[], "Daily", 0.8]]) == "Open Daily"


def test_the_small_reader_reads() -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    from PIL import ImageDraw, ImageFont

    picture = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(picture).text((20, 20), "OPEN DAILY", "red", ImageFont.load_default(48))
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    rows = [{"target_text": "Open daily"}, {"target_text": "Open dairy"}]
    found = HEADS.get("ocr")(model="rapidocr").score(image.repeat(2, 1, 1, 1), ["", ""], rows=rows)
    assert found.tolist() == pytest.approx([1.0, 8 / 9])


def linear(t: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))


def norm(t: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def rms(t: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * t[f"{name}.weight"]


def weigh(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | float = 0.0) -> Tensor:
    """Attention of one picture's [heads, T, head]."""
    shares = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5 + mask).softmax(-1)
    return (shares @ value).transpose(0, 1).flatten(1)


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(len(x), count, -1).transpose(0, 1)


def owl_picture(t: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """What mPLUG-Owl2 makes of one picture [3, S, S]: tokens [Q + 1, D]."""
    v, a = "model.vision_model.", "model.visual_abstractor."
    patches = F.conv2d(pixels[None], t[f"{v}embeddings.patch_embed.weight"], stride=14)[0].flatten(1).T
    x = torch.cat([t[f"{v}embeddings.cls_token"][0], patches]) + t[f"{v}embeddings.position_embedding"][0]
    x = norm(t, f"{v}embeddings.pre_layernorm", x, 1e-6)
    for i in range(2):
        b = f"{v}encoder.layers.{i}."
        mixed = linear(t, f"{b}self_attn.query_key_value", norm(t, f"{b}input_layernorm", x, 1e-6))
        parts = mixed.view(len(x), 2, 3, 16)
        out = weigh(*(parts[:, :, k].transpose(0, 1) for k in range(3)))
        x = x + linear(t, f"{b}self_attn.dense", out)
        inner = linear(t, f"{b}mlp.fc1", norm(t, f"{b}post_attention_layernorm", x, 1e-6))
        x = x + linear(t, f"{b}mlp.fc2", inner * torch.sigmoid(1.702 * inner))
    seen = norm(t, f"{v}post_layernorm", x, 1e-6)
    x = t[f"{a}query_embeds"][0]
    for i in range(2):
        c = f"{a}encoder.layers.{i}.crossattention."
        x = norm(t, f"{c}norm1", x, 1e-5)
        both = torch.cat([x, norm(t, f"{c}normk", seen, 1e-5)])
        places = torch.cat([t[f"{c}attention.q_pos_embed"], t[f"{c}attention.k_pos_embed"]])
        query = linear(t, f"{c}attention.query", x + t[f"{c}attention.q_pos_embed"])
        key, value = linear(t, f"{c}attention.key", both + places), linear(t, f"{c}attention.value", both)
        x = x + linear(t, f"{c}output.out_proj", weigh(heads(query, 2), heads(key, 2), heads(value, 2)))
        m, y = f"{c}output.mlp.", norm(t, f"{c}output.norm2", x, 1e-5)
        gated = norm(t, f"{m}ffn_ln", F.silu(linear(t, f"{m}w1", y)) * linear(t, f"{m}w3", y), 1e-6)
        x = x + linear(t, f"{m}w2", gated)
    return torch.cat([linear(t, f"{a}visual_fc", x), t[f"{a}vit_eos"][0]])


def owl_logits(t: dict[str, Tensor], pixels: Tensor, before: list[int], after: list[int]) -> Tensor:
    """The logits of the next token, token by token through the right one of two ways."""
    picture, table = owl_picture(t, pixels), t["model.embed_tokens.weight"]
    x = torch.cat([table[before], picture, table[after]])
    way = [0] * len(before) + [1] * len(picture) + [0] * len(after)

    def multiway(name: str, y: Tensor, f: Callable[[dict[str, Tensor], str, Tensor], Tensor]) -> Tensor:
        return torch.stack([f(t, f"{name}.multiway.{w}", row) for w, row in zip(way, y, strict=True)])

    angles = torch.arange(len(x))[:, None] * 500.0 ** (-torch.arange(0, 16, 2) / 16)
    turn = torch.polar(torch.ones_like(angles), angles)

    def turned(y: Tensor) -> Tensor:
        number = torch.complex(y[..., :8], y[..., 8:]) * turn
        return torch.cat((number.real, number.imag), -1)

    mask = torch.full((len(x), len(x)), -torch.inf).triu(1)
    for i in range(2):
        b = f"model.layers.{i}."
        y = multiway(f"{b}input_layernorm", x, rms)
        query = turned(heads(linear(t, f"{b}self_attn.q_proj", y), 4))
        key = turned(heads(multiway(f"{b}self_attn.k_proj", y, linear), 2)).repeat_interleave(2, 0)
        value = heads(multiway(f"{b}self_attn.v_proj", y, linear), 2).repeat_interleave(2, 0)
        x = x + linear(t, f"{b}self_attn.o_proj", weigh(query, key, value, mask))
        y = multiway(f"{b}post_attention_layernorm", x, rms)
        gate = F.silu(linear(t, f"{b}mlp.gate_proj", y)) * linear(t, f"{b}mlp.up_proj", y)
        x = x + linear(t, f"{b}mlp.down_proj", gate)
    return linear(t, "lm_head", rms(t, "model.norm", x[-1]))


@pytest.mark.parametrize("size", [(56, 56), (40, 60), (75, 50)])
def test_deqa(folder: Callable[[str], Path], head: Callable[[str], Any], size: tuple[int, int]) -> None:
    directory, images = folder("deqa"), pictures(4, *size)
    t: dict[str, Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        t |= load_file(shard)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    before = tokenizer("USER: How would you rate the quality of this image?\n").input_ids
    after = tokenizer("\nASSISTANT: The quality of the image is").input_ids[1:]
    ids = [ids[1] for ids in tokenizer(RATINGS).input_ids]
    means, deviations = [], []
    for picture in as_files(images):
        pixels = CLIPImageProcessorPil.from_pretrained(directory)(on_grey(picture), return_tensors="pt").pixel_values[0]
        shares = owl_logits(t, pixels, before, after)[ids].softmax(-1)
        levels = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
        means.append(shares @ levels)
        deviations.append((shares @ levels**2 - means[-1] ** 2).sqrt())
    assert_near(head("deqa").score(images, PROMPTS), torch.stack(means))
    if size == (56, 56):
        wary = make("deqa", directory, risk=2).score(images, PROMPTS)
        assert_near(wary, torch.stack(means) - 2 * torch.stack(deviations), 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_batches_change_nothing(
    folder: Callable[[str], Path], head: Callable[[str], Any], name: str
) -> None:
    whole = score(head(name), IMAGES, PROMPTS, ROWS)
    alone = torch.cat([score(head(name), IMAGES[i : i + 1], PROMPTS[i : i + 1], ROWS[i : i + 1]) for i in range(4)])
    assert_near(whole, alone, 2e-5 if name == "hpsv3" else 1e-6)
    parts = make(name, folder(name), batch_size=3, revision="v1")
    assert_near(score(parts, IMAGES, PROMPTS, ROWS), whole, 2e-5 if name == "hpsv3" else 1e-6)
    assert parts.model_id == str(folder(name)) and parts.revision == "v1"
    assert score(head(name), IMAGES[:0], [], []).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_network_gives_float32_scores(
    folder: Callable[[str], Path], head: Callable[[str], Any], name: str
) -> None:
    exact = score(head(name), IMAGES, PROMPTS, ROWS)
    half = score(make(name, folder(name), dtype="bfloat16"), IMAGES, PROMPTS, ROWS)
    assert half.dtype == torch.float32 and half.isfinite().all()
    if name not in ("ocr", "unifiedreward"):  # which write the same words
        assert not torch.equal(half, exact) and (half - exact).abs().max() < 0.5 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_pictures_that_are_too_long_are_refused(head: Callable[[str], Any], name: str) -> None:
    with pytest.raises(RewardError, match=r"1 x 17 .* 16 times"):
        score(head(name), torch.zeros(1, 3, 1, 17), PROMPTS[:1], ROWS[:1])
    longest = score(head(name), pictures(1, 2, 32), PROMPTS[:1], ROWS[:1])
    assert longest.shape == (1,) and longest.isfinite().all()


@pytest.mark.parametrize("make_network", [qwen2], ids=["qwen2_vl"])
def test_another_model_of_the_family(tmp_path: Path, make_network: Any) -> None:
    published = Published(save_chat(tmp_path, make_network))
    logits, _ = published.generate(as_files(IMAGES)[0], "Is this two? Yes or no.", 1)
    found = make("vqascore", tmp_path, question="Is this {prompt}? Yes or no.").score(IMAGES[:1], ["two"])
    yes = published.tokenizer.encode("Yes")[0]
    assert found.item() == pytest.approx(logits.softmax(-1)[yes].item(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("geneval2", None, "needs the column 'vqa_list' of each prompt's row"),
        ("geneval2", [{}], "column 'vqa_list' is empty for 1 prompts, such as 'a small red circle'"),
        ("geneval2", [{"vqa_list": "How many?"}], "is 'How many\\?': give pairs of a question and its answer"),
        ("geneval2", [{"vqa_list": [["How many?"]]}], "give pairs"),
        ("geneval2", [{"vqa_list": [["How many?", 2]]}], "give pairs"),
        ("geneval2", [{"vqa_list": [["How many?", " "]]}], "give pairs"),
        ("geneval2", [{"vqa_list": "[" * 5000}], "give pairs"),
        ("ocr", None, "needs the column 'target_text'"),
        ("ocr", [{"target_text": ""}], "column 'target_text' is empty"),
        ("ocr", [{"target_text": "  "}], "column 'target_text' of 'a small red circle' is blank"),
    ],
)
def test_what_a_row_lacks_is_named(head: Callable[[str], Any], name: str, rows: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        head(name).score(IMAGES[:1], PROMPTS[:1], rows=rows)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(("name", "token"), [("vqascore", "<|image_pad|>"), ("hpsv3", "<|Reward|>")])
def test_prompts_with_a_token_of_the_model_are_refused(head: Callable[[str], Any], name: str, token: str) -> None:
    with pytest.raises(RewardError, match=re.escape(f"contains {token}, which has a meaning of its own")):
        head(name).score(IMAGES[:1], [f"a {token}"])


def test_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"question 'Is it\?' lacks \{prompt\}"):
        HEADS.get("vqascore")(model="owner/name", question="Is it?")
    with pytest.raises(ConfigError, match="mean 'harmonic' is unknown: use geometric or arithmetic"):
        HEADS.get("geneval2")(model="owner/name", mean="harmonic")
    with pytest.raises(ConfigError, match=r"marks \[\] and max_new_tokens 4096: give at least one of each"):
        HEADS.get("unifiedreward")(model="owner/name", marks=[])


def drop(file: str, key: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / file)
        del tensors[key]
        save_file(tensors, directory / file, {"format": "pt"})

    return damage


def cut(file: str) -> Callable[[Path], object]:
    return lambda directory: (directory / file).write_bytes((directory / file).read_bytes()[:50])


def other_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages[0].content[1].text }}")


def no_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()


CHAT, HPS, GOT = "model.safetensors", "HPSv3.safetensors", "language_model.lm_head.weight"
LAST = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("vqascore", shutil.rmtree, "is no directory"),
        ("vqascore", lambda d: (d / CHAT).unlink(), "vqascore model .* cannot be opened"),
        ("vqascore", cut(CHAT), "vqascore model .* cannot be opened: .*damaged"),
        ("vqascore", drop(CHAT, "lm_head.weight"), "vqascore model .* lacks lm_head.weight"),
        ("vqascore", lambda d: edit_json(d / "config.json", model_type="llava"), "is a llava: give a model of"),
        ("vqascore", lambda d: (d / "preprocessor_config.json").unlink(), "without preprocessor_config.json"),
        ("vqascore", lambda d: (d / "tokenizer.json").unlink(), "without tokenizer.json"),
        ("vqascore", other_template, "chat template of .* shows no picture"),
        ("vqascore", no_template, "without chat_template.json"),
        ("geneval2", cut("config.json"), "geneval2 model .* cannot be opened"),
        ("hpsv3", lambda d: (d / HPS).unlink(), "is a directory without HPSv3.safetensors"),
        ("hpsv3", cut(HPS), "HPSv3.safetensors' cannot be read"),
        ("hpsv3", drop(HPS, "model.norm.weight"), "HPSv3 model .* lacks model.language_model.norm.weight"),
        ("hpsv3", drop(HPS, "model.embed_tokens.weight"), "lacks embed_tokens.weight or rm_head"),
        ("hpsv3", drop(HPS, "rm_head.5.weight"), "lacks rm_head.5.weight"),
        ("ocr", lambda d: edit_json(d / "config.json", model_type="qwen2_vl"), "is a qwen2_vl: give a got_ocr2"),
        ("ocr", drop(CHAT, GOT), "ocr model .* lacks lm_head.weight"),
        ("ocr", lambda d: (d / "preprocessor_config.json").unlink(), "without preprocessor_config.json"),
        ("deqa", lambda d: (d / "config.json").write_text("{}"), "vocab_size: Field required.*give an mPLUG-Owl2"),
        ("deqa", lambda d: (d / LAST).unlink(), f"is a directory without {LAST}"),
        ("deqa", drop(LAST, "model.norm.weight"), "DeQA model .* lacks model.norm.weight"),
        ("deqa", lambda d: edit_json(d / "config.json", intermediate_size=5), "or has it in another shape"),
        ("deqa", lambda d: edit_json(d / "model.safetensors.index.json", weight_map={"a": "../b"}), "names no files"),
    ],
)
def test_damage_is_a_model_error(
    tmp_path: Path, folder: Callable[[str], Path], name: str, damage: Callable[[Path], object], message: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(folder(name), directory)
    damage(directory)
    with pytest.raises(ModelError, match=message) as caught:
        make(name, directory)
    assert "\n" not in str(caught.value)


def test_the_template_may_lie_in_a_file_of_its_own(folder: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folder("vqascore"), tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    (tmp_path / "model" / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    expected = make("vqascore", folder("vqascore")).score(IMAGES, PROMPTS)
    assert torch.equal(make("vqascore", tmp_path / "model").score(IMAGES, PROMPTS), expected)
