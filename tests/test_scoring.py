import pickle
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import Tensor

from epd_ray import errors
from epd_ray.errors import ConfigError, EpdRayError, RewardError
from epd_ray.rewards.scoring import REFERENCE, Normalisation, Scorer, mix, standardise

IDS, PROMPTS = ["r1", "r2"], ["one", "two"]
IMAGES = np.stack([np.zeros((3, 2, 2), np.uint8), np.full((3, 2, 2), 255, np.uint8)])


class Head:
    """Answers with whatever its function makes of the images."""

    model_id = "test"

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        self.answer = answer
        self.seen: list[tuple[Tensor, Sequence[str]]] = []

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen.append((images, prompts))
        answer: Tensor = self.answer(images)
        return answer


def fail(_: Tensor) -> Tensor:
    raise KeyError("weights")


def run_out(_: Tensor) -> Tensor:
    raise RuntimeError("out of\n  memory\n")


def refuse(_: Tensor) -> Tensor:
    raise RewardError("http://host/score", "answered 500\n(broken)")


def test_scores_pass_through() -> None:
    head = Head(lambda images: images.double().mean(dim=(1, 2, 3)).requires_grad_())
    values = Scorer("head", head).score(IMAGES, PROMPTS, IDS)
    assert values.dtype == np.float32 and values.tolist() == [0.0, 1.0]
    images, prompts = head.seen[0]
    assert images.dtype == torch.float32 and (images.min(), images.max()) == (0, 1) and prompts == PROMPTS


@pytest.mark.filterwarnings("error")
def test_read_only_images_are_accepted() -> None:
    images = IMAGES.copy()
    images.flags.writeable = False  # as they come out of Ray's object store
    assert Scorer("head", Head(lambda i: i.sub_(1).sum(dim=(1, 2, 3)))).score(images, PROMPTS, IDS).shape == (2,)


@pytest.mark.parametrize(
    ("answer", "problem", "blamed"),
    [
        (lambda _: torch.tensor([0.5, float("nan")]), "1 values that are not finite", ("r2",)),
        (lambda _: torch.tensor([float("inf"), float("-inf")]), "2 values that are not finite", ("r1", "r2")),
        (lambda _: torch.zeros(3), r"shape \(3,\) for 2 images", ("r1", "r2")),
        (lambda _: torch.zeros(2, 1), r"shape \(2, 1\) for 2 images", ("r1", "r2")),
        (lambda _: None, "failed with", ("r1", "r2")),
        (fail, "failed with KeyError: 'weights'", ("r1", "r2")),
        (run_out, r"failed with RuntimeError: out of memory \(rollouts", ("r1", "r2")),
        (refuse, r"http://host/score answered 500 \(broken\) \(rollouts", ("r1", "r2")),
    ],
)
def test_what_is_no_reward_is_an_error(answer: Callable[[Tensor], Any], problem: str, blamed: tuple[str, ...]) -> None:
    with pytest.raises(RewardError, match=f"reward head 'hps': .*{problem}") as caught:
        Scorer("hps", Head(answer)).score(IMAGES, PROMPTS, IDS)
    assert caught.value.head == "hps" and caught.value.rollout_ids == blamed
    assert all(i in str(caught.value) for i in blamed)
    assert "\n" not in str(caught.value) and str(caught.value).count("reward head") == 1


OWN = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]


def example(kind: type[EpdRayError]) -> EpdRayError:
    if issubclass(kind, RewardError):
        return kind("clip", "gave nothing", ["r1", "r2"])
    return kind(["first wrong", "second wrong"]) if issubclass(kind, ConfigError) else kind("wrong value 3")


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
@pytest.mark.parametrize("kind", OWN)
def test_errors_travel(kind: type[EpdRayError], pickler: Any) -> None:
    error = example(kind)
    copy = pickler.loads(pickler.dumps(error))
    assert type(copy) is kind and str(copy) == str(error) and copy.__dict__ == error.__dict__


def test_all_errors_have_one_base() -> None:
    assert all(issubclass(kind, EpdRayError) for kind in OWN)
    assert ConfigError(["a", "b"]).problems == ("a", "b") and str(ConfigError(["a", "b"])) == "a\nb"


def test_mix_by_hand() -> None:
    weights = {"clip": 3.0, "size": 1.0}
    heads = {"clip": Normalisation(shift=-0.2, scale=0.1), "size": Normalisation(low=0.0, high=1.0)}
    scores = {"size": np.array([5.0, -2.0], np.float32), "clip": np.array([0.3, 0.2], np.float32)}
    mixed = mix(scores, weights, heads)  # clip: 1, 0; size: 1, 0; weights 3/4 and 1/4
    assert mixed.dtype == np.float32 and mixed.tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    scores["size"] = np.array([0.5, 0.25], np.float32)
    assert mix(scores, weights, heads).tolist() == pytest.approx([0.875, 0.0625], abs=1e-6)

    assert mix(scores, weights, {}).tolist() == pytest.approx([0.35, 0.2125], abs=1e-6)


def test_standardise() -> None:
    values = np.array([1.0, 2.0, 6.0], np.float32)
    assert standardise(values)(values).tolist() == pytest.approx(((values - 3) / np.sqrt(14 / 3)).tolist(), abs=1e-6)
    assert standardise(np.full(3, 0.7, np.float32))(np.float32([0.7, 1.2])).tolist() == pytest.approx(
        [0, 0.5], abs=1e-6
    )


@pytest.mark.parametrize(
    ("head", "raw", "expected"),
    [("hpsv2.1", 0.28, 0.28), ("pickscore", 20.8, 0.8), ("imagereward", 0.9, 0.4), ("aesthetic", 5.5, 0.55),
     ("clip", 1.7, 1.0), ("imagereward", -4.0, 0.0)],
)  # fmt: skip
def test_the_references_clamps(head: str, raw: float, expected: float) -> None:
    assert REFERENCE[head](np.float32([raw])).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [
        (Normalisation(), [-3.0, 0.5]),
        (Normalisation(shift=1.0, scale=2.0), [-1.0, 0.75]),
        (Normalisation(low=-1.0), [-1.0, 0.5]),
        (Normalisation(shift=1.0, scale=2.0, high=0.5), [-1.0, 0.5]),
    ],
)
def test_normalisation(normalisation: Normalisation, expected: list[float]) -> None:
    values = normalisation(np.array([-3.0, 0.5], np.float32))
    assert values.dtype == np.float32 and values.tolist() == expected
