"""Which errors are this package's own mistakes, and that no message for users hides one."""

import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import fs
from torch import Tensor

from epd_ray.actors.reward_pool import RewardActor
from epd_ray.actors.serving import ServedHead
from epd_ray.errors import (
    SHOWN_CHARS,
    ModelError,
    RewardError,
    TableError,
    UnknownNameError,
    importing,
    is_own_bug,
    shown,
)
from epd_ray.evaluation.suites.feature_pool import FeatureActor
from epd_ray.registry import Registry
from epd_ray.rewards.requests import Limits
from epd_ray.rewards.scoring import Scorer
from epd_ray.storage import lock, mirror
from epd_ray.storage.lock import Lease
from epd_ray.storage.mirror import Mirror
from epd_ray.weights.hub import opening

MISTAKES = {
    "attribute": ("None.nothing", AttributeError),
    "call": ("len(1, 2)", TypeError),
    "key": ("{}['nothing']", KeyError),
    "index": ("[][0]", IndexError),
    "name": ("nothing_of_this_name", NameError),
    "argument": ("__import__('json').loads(None)", TypeError),  # the traceback ends in the standard library
}


def code_of(module: str, expression: str) -> Callable[..., Any]:
    """A function as if it were in a module."""
    names: dict[str, Any] = {"__name__": module}
    exec(f"def made_up(*_, **__):\n    return {expression}", names)
    made: Callable[..., Any] = names["made_up"]
    return made


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_ours_where_the_traceback_ends_here(mistake: str) -> None:
    expression, kind = MISTAKES[mistake]
    for module, ours in (("epd_ray.made_up", True), ("diffusers.made_up", False)):
        with pytest.raises(kind) as caught:
            code_of(module, expression)()
        assert is_own_bug(caught.value) is ours


def test_what_a_user_can_mend_is_no_mistake_of_ours() -> None:
    for error in (OSError("no such file"), ValueError("damaged"), RuntimeError("size mismatch"), ModelError("gated")):
        assert not is_own_bug(error)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_opening_a_model_hides_no_mistake_of_ours(mistake: str) -> None:
    expression, kind = MISTAKES[mistake]
    with pytest.raises(kind), opening("m"):
        code_of("epd_ray.made_up", expression)()
    with pytest.raises(kind), opening("m"):  # also where a download failed before
        try:
            raise OSError("no such file")
        except OSError:
            code_of("epd_ray.made_up", expression)()
    if mistake not in ("name", "index"):
        with pytest.raises(ModelError, match="model 'm' cannot be opened: "), opening("m"):
            code_of("diffusers.made_up", expression)()


BUG = code_of("epd_ray.made_up", "None.nothing")


def test_a_storage_that_fails_hides_no_mistake_of_ours(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root, tries = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), []

    def bug(*_: Any) -> None:
        tries.append(1)
        BUG()

    with pytest.raises(AttributeError):
        Mirror(root, tmp_path, "there", bug).push()
    assert len(tries) == 1 and mirror.ATTEMPTS > 1
    monkeypatch.setattr(Lease, "_read", bug)
    with pytest.raises(AttributeError), Lease(root, "there").held():
        pass
    assert lock.LEASE not in [path.name for path in tmp_path.iterdir()]


@pytest.mark.parametrize("ours", [True, False])
def test_what_cannot_be_built_hides_no_mistake_of_ours(ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    build = code_of("epd_ray.made_up" if ours else "theirs", "None.nothing")
    monkeypatch.setattr(Registry, "build", build)
    expected, said = (AttributeError, "nothing") if ours else (ModelError, "cannot be built: AttributeError: ")
    for start in (
        RewardActor("mine", "x", {}).ready,
        FeatureActor("x", {}).describe,
        ServedHead("x", {}, Limits()).ready,
    ):
        with pytest.raises(expected, match=said):
            start()


class Head:
    """Scores by a function."""

    model_id = "made up"

    def __init__(self, score: Callable[..., Any]) -> None:
        self._score = score

    def score(self, images: Tensor, prompts: Any) -> Tensor:
        made: Tensor = torch.as_tensor(self._score(images, prompts))
        return made


def test_a_head_that_fails_hides_no_mistake_of_ours() -> None:
    images = np.zeros((1, 3, 2, 2), np.uint8)
    with pytest.raises(AttributeError):
        Scorer("mine", Head(BUG)).score(images, ["a"], ["r"])
    with pytest.raises(RewardError, match="failed with AttributeError: "):
        Scorer("mine", Head(code_of("theirs", "None.nothing"))).score(images, ["a"], ["r"])


def test_a_registry_hides_no_mistake_of_the_module_that_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    known: Registry[Any] = Registry("thing", {"a": "json:no_such_thing", "b": "no_such_module:x", "c": ":x"})
    for name, said in (("a", "'json' has no attribute 'no_such_thing'"), ("b", "No module"), ("c", "module:attribute")):
        with pytest.raises(UnknownNameError, match=f"^thing '{name}' cannot be imported: .*{said}"):
            known.get(name)
    assert known.get("json:loads") is json.loads
    monkeypatch.setattr("importlib.import_module", BUG)
    with pytest.raises(AttributeError):
        known.get("a")


def test_a_shown_value_is_short_whatever_it_is() -> None:
    bomb: list[object] = ["x" * 100] * 10
    for _ in range(30):
        bomb = [bomb] * 10
    wide = [bomb, {"a" * 1000: bomb}, "line\n" * 100, 10**1000, -(10**5000), [10**5000], {i: i for i in range(1000)}]
    for value in (*wide, OrderedDict(a=bomb), b"x" * 10**6, defaultdict(list, a=bomb)):
        text = shown(value)
        assert len(text) <= SHOWN_CHARS and "\n" not in text
    assert "16610 bits" in shown(10**5000) and shown(True) == "True" and shown("a" * 100) == repr("a" * 100)
    assert shown("points") == "'points'" and shown([1, 2.5, None]) == "[1, 2.5, None]"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RecursionError(), "deep"),
        (MemoryError(), "memory"),
        (OverflowError(), "large"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "UTF-8"),
        (KeyError("weights"), "'weights'"),
    ],
)
def test_what_a_file_makes_python_raise_is_one_line_with_its_name(error: Exception, said: str) -> None:
    with pytest.raises(TableError, match=f"a.json.*{said}"), importing(TableError, "a.json"):
        raise error
