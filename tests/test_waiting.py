"""Waits that say who is waited for, and that end."""

import time
from typing import Any

import pytest

from epd_ray.actors import waiting
from epd_ray.actors.waiting import FIRST, Silence, Watch


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, bool]]:
    found: list[tuple[Any, bool]] = []
    monkeypatch.setattr(waiting.ray, "kill", lambda actor, no_restart: found.append((actor, no_restart)))
    return found


def test_words_come_at_twice_the_time(caplog: pytest.LogCaptureFixture) -> None:
    silence = Silence()
    for seconds in (1.0, 29.9, 30.0, 31.0, 59.0, 61.0, 130.0, 0.0, 31.0):
        silence.count(seconds, lambda: "actor 7")
    assert caplog.messages == [f"waiting {seconds} s for actor 7" for seconds in (30, 61, 130, 31)]


def test_a_long_wait_is_said(
    killed: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(waiting, "SILENT_SECONDS", 0.1)
    with Watch("actor 7 (loading)", None, 0.01) as watch:
        time.sleep(0.5)
    said = [message.partition(" s ")[2] for message in caplog.messages]
    assert said in (["for actor 7 (loading)"] * 2, ["for actor 7 (loading)"] * 3)  # at 0.1, 0.2 and 0.4 seconds
    assert not watch.late and not killed  # nobody to end


@pytest.mark.parametrize("restarts", [True, False])
def test_a_late_actor_is_ended(killed: list[Any], caplog: pytest.LogCaptureFixture, restarts: bool) -> None:
    actor: Any = object()
    begin = time.monotonic()
    with Watch("actor 7", actor, 0.2, restarts=restarts) as watch:
        while not killed:
            time.sleep(0.01)
        assert time.monotonic() - begin > 0.2 and watch.late
        while len(killed) < 2:
            time.sleep(0.01)
        assert time.monotonic() - begin > 0.2 * (1 + FIRST)  # the next process may take longer
    assert killed == [(actor, not restarts)] * 2
    assert caplog.messages[0] == "actor 7 has not answered for 0 s: its process is ended"


def test_one_that_answers_in_time_lives(killed: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    actor: Any = object()
    with Watch("actor 7", actor, 30.0) as watch:
        pass
    with Watch("actor 7", actor, None):
        time.sleep(0.05)
    assert not watch.late and not killed and not caplog.messages
