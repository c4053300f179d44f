"""The head `judge` against a small server that speaks as OpenAI's chat completions do."""

import base64
import io
import json
import sqlite3
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from epd_ray.actors.beforehand import require_models
from epd_ray.actors.reward_pool import RewardActor
from epd_ray.config.loading import load_config
from epd_ray.errors import ConfigError, RewardError
from epd_ray.rewards.judge import JudgeHead
from epd_ray.rewards.judge_answer import Marks, UnreadableAnswerError
from epd_ray.rewards.judge_template import columns_of, filled
from epd_ray.rewards.needs import needs_of
from epd_ray.rewards.scoring import Scorer
from tests.test_http import Answer, Server, failing, hang, saying, send, serve

__all__ = ["serve"]  # a fixture
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 4, 6), np.uint8)).float() / 255
PROMPTS = ["prompt 0", "prompt 1", "prompt 2"]
Serve = Callable[[Answer], Server]


def chat(text: object, **more: object) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], **more}).encode()


def question(asked: dict[str, Any]) -> tuple[np.ndarray, str]:
    """The picture, [H, W, 3], and the text of a request."""
    (message,) = asked["messages"]
    picture, text = message["content"]
    start, _, data = picture["image_url"]["url"].partition(",")
    assert (message["role"], picture["type"], text["type"], start) == (
        *("user", "image_url", "text"),
        "data:image/png;base64",
    )
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"])), text["text"]


def by_picture(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    """The mark is the mean brightness, from 0 to 10; each answer costs 100 and 3 tokens."""
    pixels, _ = question(asked)
    usage = {"prompt_tokens": 100, "completion_tokens": 3, "total_tokens": 103}
    send(handler, chat(f" {10 * pixels.mean() / 255:.6f}\n", usage=usage))


BRIGHTNESS = (IMAGES * 255).mean((1, 2, 3)).numpy() / 255


def test_each_picture_gets_its_own_mark(serve: Serve) -> None:
    server = serve(by_picture)
    head = JudgeHead(url=server.url, model="vlm", concurrency=2)
    found = head.score(IMAGES, PROMPTS)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(BRIGHTNESS.tolist(), abs=1e-6)
    assert head.model_id == f"vlm at {server.url}"
    assert {asked["model"] for asked in server.asked} == {"vlm"} and {a["temperature"] for a in server.asked} == {0}
    pixels = {text.split('"')[1]: picture for picture, text in map(question, server.asked)}
    for image, prompt in zip(IMAGES, PROMPTS, strict=True):
        np.testing.assert_array_equal(pixels[prompt], (image * 255).round().byte().permute(1, 2, 0).numpy())
    assert head.costs == {"calls": 3, "cached": 0, "prompt_tokens": 300, "completion_tokens": 9}
    head.close()


def test_a_template_asks_with_columns(serve: Serve) -> None:
    server = serve(saying(chat('{"score": 3, "why": "good"}')))
    options = {
        "url": server.url,
        "model": "vlm",
        "template": 'Does "{prompt}" show {n} {things}? {{"{key}": {low} to {high}}}',
        "answer": "json",
        "low": 1,
        "high": 5,
        "request": {"max_tokens": None, "seed": 7},
    }
    assert needs_of("judge", options) == ("n", "things") and needs_of("judge", {"url": "http://x", "model": "y"}) == ()
    scorer = Scorer("j", JudgeHead(**options))
    rows = [{"n": 2, "things": ["cats", "dogs"], "other": 1}]
    assert scorer.score(np.zeros((1, 3, 2, 2), np.uint8), ["a {b}"], ["r"], rows).tolist() == [0.5]
    (asked,) = server.asked
    assert question(asked)[1] == 'Does "a {b}" show 2 ["cats", "dogs"]? {"score": 1 to 5}'
    assert asked["seed"] == 7 and "max_tokens" not in asked
    with pytest.raises(RewardError, match="needs the column 'things'"):
        scorer.score(np.zeros((1, 3, 2, 2), np.uint8), ["a"], ["r"], [{"n": 2}])


@pytest.mark.parametrize(
    ("form", "answer", "score"),
    [
        ("number", "10", 1.0),
        ("number", " 0.0 ", 0.0),
        ("number", "+7.", 0.7),
        ("number", "```\n2.5\n```", 0.25),
        ("json", '{"score": 4}', 0.4),
        ("json", '```json\n{"why": "a ``` in it",\n "score": 1e0}\n```', 0.1),
    ],
)
def test_marks_are_read(form: Any, answer: str, score: float) -> None:
    assert Marks(form, "score", 0, 10).score(answer) == pytest.approx(score)


PROSE = "I would say that this picture is worth an 8 out of 10, since the circle is red."


@pytest.mark.parametrize(
    ("form", "answer", "said"),
    [
        ("number", PROSE, r"answered \(I would say .*\), which is not a number: let the template ask"),
        ("number", "8/10", r"\(8/10\), which is not a number"),
        ("number", "", "answered nothing, which is not a number"),
        ("number", "nan", r"\(nan\), which is not a number"),
        ("number", "\u0663", "which is not a number"),
        ("number", "1" * 400, "which is not a number"),
        ("number", "11", "gave the mark 11, expected 0 to 10"),
        ("number", "-1", "gave the mark -1, expected 0 to 10"),
        ("json", PROSE, "which is not JSON: let the template ask for JSON alone, with a number under 'score'"),
        ("json", 'Sure! ```json\n{"score": 4}\n```', "which is not JSON"),
        ("json", '{"score": 4, "score": 5}', "which is not JSON"),
        ("json", '{"mark": 4}', "without the number"),
        ("json", '{"score": "4"}', "without the number"),
        ("json", '{"score": true}', "without the number"),
        ("json", "4", "without the number"),
        ("json", '{"score": NaN}', "gave the mark nan, expected 0 to 10"),
        ("json", '{"score": 1' + "0" * 400 + "}", "gave the mark nan"),
    ],
)
def test_what_is_no_mark_is_an_error_with_its_beginning(form: Any, answer: str, said: str) -> None:
    with pytest.raises(UnreadableAnswerError, match=said) as caught:
        Marks(form, "score", 0, 10).score(answer)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 350


@pytest.mark.parametrize(
    ("answer", "problem", "requests"),
    [
        (failing(9, 503), r"answered 503 \(.*\), at 2 attempts", 2),
        (hang, "took longer than 0.3 s, at 2 attempts", 2),
        (saying(b'{"error": "wrong key"}', 401), r"answered 401 \(\{.error.: .wrong key.\}\)", 1),
        (saying(b"<html>"), r"no chat completion \(<html>\)", 1),
        (saying(b'{"choices": []}'), "no chat completion", 1),
        (saying(chat(None)), "answered without a text", 1),
        (saying(chat([{"type": "text", "text": "8"}])), "answered without a text", 1),
        (saying(chat(PROSE)), r"answered \(I would say .*\), which is not a number", 1),
    ],
)
def test_what_gives_no_mark_stops(serve: Serve, answer: Answer, problem: str, requests: int) -> None:
    server = serve(answer)
    head = JudgeHead(url=server.url, model="vlm", retries=1, timeout=0.3 if "took longer" in problem else 10.0)
    with pytest.raises(RewardError, match=f"reward head 'j': .*{problem}") as caught:
        Scorer("j", head).score(np.zeros((1, 3, 2, 2), np.uint8), ["a"], ["r1"])
    assert len(server.asked) == requests and caught.value.rollout_ids == ("r1",) and "\n" not in str(caught.value)


def failing_once(status: int, headers: dict[str, str] | None = None) -> Answer:
    left = [1]

    def answer(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        left[0] -= 1
        send(handler, *((b"busy", status, headers) if left[0] >= 0 else (chat("5"),)))

    return answer


@pytest.mark.parametrize(("status", "headers"), [(500, None), (429, {"Retry-After": "3600"})])
def test_a_busy_server_is_asked_again(serve: Serve, status: int, headers: dict[str, str] | None) -> None:
    server = serve(failing_once(status, headers))
    assert JudgeHead(url=server.url, model="vlm", retries=1).score(IMAGES[:1], ["a"]).tolist() == [0.5]
    assert len(server.asked) == 2


def test_the_token_is_sent_and_never_shown(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        right = handler.headers["Authorization"] == "Bearer right"
        send(handler, *((chat("5"),) if right else (b'{"error": "wrong key"}', 401)))

    url = serve(locked).url
    monkeypatch.setenv("JUDGE_TOKEN", "right")
    assert JudgeHead(url=url, model="vlm", token_env="JUDGE_TOKEN").score(IMAGES[:1], ["a"]).tolist() == [0.5]
    monkeypatch.setenv("JUDGE_TOKEN", "stolen")
    with pytest.raises(RewardError, match="answered 401") as caught:
        JudgeHead(url=url, model="vlm", token_env="JUDGE_TOKEN").score(IMAGES[:1], ["a"])
    assert "stolen" not in str(caught.value)
    monkeypatch.delenv("JUDGE_TOKEN")
    with pytest.raises(ConfigError, match="judge reward head: environment variable 'JUDGE_TOKEN' is not set"):
        JudgeHead(url=url, model="vlm", token_env="JUDGE_TOKEN")


def test_as_many_requests_at_a_time_as_asked(serve: Serve) -> None:
    lock, here, most = threading.Lock(), 0, 0

    def slow(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        nonlocal here, most
        with lock:
            here += 1
            most = max(most, here)
        time.sleep(0.05)
        with lock:
            here -= 1
        send(handler, chat("5"))

    server = serve(slow)
    JudgeHead(url=server.url, model="vlm", concurrency=3).score(torch.zeros(9, 3, 2, 2), ["x"] * 9)
    assert most == 3 and len(server.asked) == 9


# -- cache ------------------------------------------------------------------------------------------------------------


def test_what_was_paid_for_is_not_asked_again(serve: Serve, tmp_path: Path) -> None:
    server, cache = serve(by_picture), str(tmp_path / "answers.sqlite")
    options: dict[str, Any] = {"url": server.url, "model": "vlm", "cache": cache}
    first = JudgeHead(**options)
    found = first.score(IMAGES, PROMPTS)
    assert torch.equal(first.score(IMAGES, PROMPTS), found) and len(server.asked) == 3
    again = JudgeHead(**options)  # while the first one has the file open, too
    assert torch.equal(again.score(IMAGES.flip(0), PROMPTS[::-1]), found.flip(0)) and len(server.asked) == 3
    assert again.costs == {"calls": 0, "cached": 3, "prompt_tokens": 0, "completion_tokens": 0}
    for changed in (
        {"model": "other"},
        {"template": "Rate {prompt} from {low} to {high}"},
        {"low": 0.0, "high": 20.0},  # which the template says
        {"request": {"seed": 1}},
    ):
        before = len(server.asked)
        JudgeHead(**{**options, **changed}).score(IMAGES[:1], PROMPTS[:1])
        assert len(server.asked) == before + 1, changed
    for images, prompts in ((IMAGES[:1], ["another"]), (1 - IMAGES[:1], PROMPTS[:1])):
        before = len(server.asked)
        again.score(images, prompts)
        assert len(server.asked) == before + 1


def test_an_answer_without_a_mark_is_not_kept(serve: Serve, tmp_path: Path) -> None:
    answers = iter([PROSE, "5"])
    server = serve(lambda handler, asked: send(handler, chat(next(answers))))
    head = JudgeHead(url=server.url, model="vlm", cache=str(tmp_path / "a.sqlite"))
    with pytest.raises(RewardError, match="I would say"):
        head.score(IMAGES[:1], ["a"])
    assert head.score(IMAGES[:1], ["a"]).tolist() == [0.5] and head.costs["calls"] == 2


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but longer than the header of one: " * 9)
    with sqlite3.connect(tmp_path / "other") as file:
        file.execute("CREATE TABLE answers (something)")
    for name, said in [("text", "not a database"), ("other", "no such column"), ("no/folder", "folder is missing")]:
        with pytest.raises(ConfigError, match=f"cache {tmp_path / name}.*{said}"):
            JudgeHead(url="http://x/", model="vlm", cache=str(tmp_path / name))


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "http://user:hush@x/"}, "judge reward head: url holds an @"),
        ({"url": "ftp://x/"}, "judge reward head: url is 'ftp://x/'"),
        ({"answer": "prose"}, "answer is 'prose', expected number or json"),
        ({"low": 5, "high": 5}, "low is 5 and high is 5, expected low < high"),
        ({"timeout": 0}, "timeout is 0, expected above 0"),
        ({"retries": -1}, "retries is -1, expected 0 or more"),
        ({"concurrency": 0}, "concurrency is 0, expected 1 or more"),
        ({"request": {"messages": []}}, "request holds 'messages'"),
        ({"template": "{prompt"}, "template cannot be read .*write {name} with the name of a column"),
        ({"template": "{}"}, "template has the field '', which is no plain name"),
        ({"template": "{prompt:>9}"}, "template has the field 'prompt'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        JudgeHead(**{"url": "http://127.0.0.1:9/", "model": "vlm", **options})
    assert "hush" not in str(caught.value)


def test_fields_of_a_template() -> None:
    template = "{{{Category}}} {a b} {prompt} {Category} {low}"
    assert columns_of(template) == ("Category", "a b")
    assert filled(template, {"prompt": "p", "low": "0"}, {"Category": "x", "a b": None}) == "{x} null p x 0"


# -- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_tries_the_judge_before_it_begins(serve: Serve) -> None:
    server = serve(saying(chat(PROSE)))
    judge = f"head: judge, options: {{url: '{server.url}', model: org/vlm"
    config = load_config(None, [f"rewards={{j: {{{judge}}}}}}}"])
    with pytest.raises(RewardError, match=r"reward head 'j': .*I would say"):
        require_models(config)
    config = load_config(None, [f"rewards={{j: {{{judge}, template: '{{prompt}} {{text}}'}}}}}}"])
    require_models(config)  # whose rows are not read yet
    with pytest.raises(RewardError, match="I would say"):
        require_models(config, {"p": {}, "q": {"text": "GO"}})
    assert question(server.asked[-1])[1] == "a grey square GO" and len(server.asked) == 2


def test_costs_of_a_batch_come_with_its_scores(serve: Serve) -> None:
    actor = RewardActor("j", "judge", {"url": serve(by_picture).url, "model": "vlm"})
    pictures = (IMAGES * 255).byte().numpy()
    for count in (2, 1):
        found = actor.score(pictures[:count], PROMPTS[:count], ["a", "b"][:count])
        assert found.costs == {
            "calls": count,
            "cached": 0,
            "prompt_tokens": 100 * count,
            "completion_tokens": 3 * count,
        }
