import io

import pytest
from rich.console import Console

from epd_ray.telemetry.progress import LineObserver, LiveObserver, console_observer, counted, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(total: int, seconds: float) -> list[str]:
    clock, stream = Clock(), io.StringIO()
    observer = LineObserver(stream, clock)
    observer.stage("rdpo", total)
    for step in range(total):
        clock.now += seconds
        observer.advance(reward=0.5 + step / 1000, images_per_s=12.0)
    observer.done()
    return stream.getvalue().splitlines()


def test_fast_stage_has_a_line_per_tenth():
    lines = lines_of(total=1000, seconds=0.001)
    assert len(lines) == 11
    assert lines[0] == "rdpo 0/1000"
    assert lines[1] == "rdpo 100/1000, reward 0.599, images/s 12, 1 s left"
    assert lines[-1] == "rdpo 1000/1000, reward 1.499, images/s 12"


def test_slow_stage_has_a_line_every_ten_seconds():
    lines = lines_of(total=100, seconds=5)
    assert len(lines) == 51
    assert lines[1].endswith("8 min 10 s left")


def test_lines_are_flushed_and_notes_stand_alone():
    class Stream(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    stream = Stream()
    observer = LineObserver(stream)
    observer.note("an actor died [and] was replaced")
    assert stream.flushed == "an actor died [and] was replaced\n"


def test_the_item_is_named_with_its_own_numbers():
    clock, stream = Clock(), io.StringIO()
    observer = LineObserver(stream, clock)
    observer.stage("comparing", 2)
    for name, numbers in (("Euler", {"clip": 0.5, "accuracy": 0.25}), ("Heun", {"clip": 0.75})):
        observer.item(name)
        clock.now += 3
        observer.advance(1, **numbers)
    observer.stage("writing", 1)
    assert stream.getvalue().splitlines() == [
        "comparing 0/2",
        "comparing 1/2, Euler, clip 0.5, accuracy 0.25, 3 s left",
        "comparing 2/2, Heun, clip 0.75",
        "writing 0/1",
    ]


@pytest.mark.parametrize(("number", "said"), [(0, "0 minutes"), (1, "1 minute"), (1440, "1,440 minutes")])
def test_counted(number, said):
    assert counted(number, "minute") == said


def test_an_empty_stage_divides_by_nothing():
    stream = io.StringIO()
    observer = LineObserver(stream)
    observer.stage("rdpo", 0)
    observer.advance()
    assert stream.getvalue().splitlines() == ["rdpo 0/0", "rdpo 1/0"]


def test_live_display_shows_stages_and_numbers():
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    observer = LiveObserver(console)
    observer.stage("distil [least squares]", 2)
    observer.advance(2)
    observer.stage("rdpo", 45)
    observer.advance(reward=0.8125, images_per_s=9.5)
    observer.advance(reward=0.825)
    observer.note("saved [checkpoint]")
    observer.stage("comparing", 3)
    observer.item("[Heun]")
    observer.done()
    observer.done()
    shown = console.file.getvalue()
    said = (
        "distil [least squares]",
        "2/2",
        "2/45",
        "reward 0.825, images/s 9.5",
        "saved [checkpoint]",
        "0/3",
        "[Heun]",
    )
    for part in said:
        assert part in shown


def test_without_a_terminal_it_is_lines_on_stderr(capsys):
    observer = console_observer()
    assert isinstance(observer, LineObserver)
    observer.stage("rdpo", 3)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "rdpo 0/3\n")


@pytest.mark.parametrize(
    ("seconds", "said"), [(59.4, "59 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (7530, "2 h 5 min")]
)
def test_duration(seconds, said):
    assert duration(seconds) == said
