import base64
import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner, Result

from epd_ray import cli
from epd_ray.errors import ConfigError, EpdRayError, RunDirectoryError, SideBySideError
from epd_ray.evaluation.ab.make import make_page
from epd_ray.evaluation.ab.records import Key, Pair, Vote, largest_votes, parse_votes, read_key, read_votes
from epd_ray.evaluation.ab.server import served_page
from epd_ray.evaluation.ab.tally import Standing, results, tally
from epd_ray.score.inputs import read_index

PROMPTS = ["a red circle", 'two cats & a "dog" </script><b>', "Übergröße 🦊", "a star", "a cross"]


def picture(value: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """As an evaluation leaves them: samples/<key>/NNN.png and prompts.json."""
    folder = tmp_path / "samples"
    for offset, key in ((0, "rdpo"), (100, "euler-6")):
        (folder / key).mkdir(parents=True)
        for index in range(len(PROMPTS)):
            note = PngImagePlugin.PngInfo()
            note.add_text("solver", key)
            picture(offset + index).save(folder / key / f"{index:03d}.png", pnginfo=note)
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    return folder


def make(samples: Path, out: Path, prompts: Path | None = None, count: int | None = None, seed: int = 0) -> Key:
    make_page(samples / "rdpo", samples / "euler-6", out, prompts, count, seed)
    return read_key(out)


def shown(out: Path) -> dict[str, object]:
    """What the page has of its pairs."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', (out / "index.html").read_text())
    found: dict[str, object] = json.loads(data)
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_pair_is_on_the_page_and_the_key_says_which_side_is_whose(samples: Path, tmp_path: Path) -> None:
    key = make(samples, tmp_path / "page")
    page = shown(tmp_path / "page")
    assert page["page"] == key.page and (key.left, key.right) == ("rdpo", "euler-6")
    assert sorted(pair.picture for pair in key.pairs) == [f"{i:03d}.png" for i in range(5)]
    for pair, on_page in zip(key.pairs, page["pairs"], strict=True):  # type: ignore[call-overload]
        index = int(pair.picture[:3])
        assert on_page["id"] == pair.id and on_page["prompt"] == pair.prompt == PROMPTS[index]
        for side, offset in (("left", 100 * pair.swapped), ("right", 100 * (not pair.swapped))):
            data = base64.b64decode(on_page[side].removeprefix("data:image/webp;base64,"))
            image = Image.open(io.BytesIO(data), formats=["WEBP"]).convert("RGB")
            assert np.array_equal(image, picture(offset + index))


def test_the_page_is_blind(samples: Path, tmp_path: Path) -> None:
    """No name, no metadata, and neither side nor order tells; each solver is as often on either side."""
    key = make(samples, tmp_path / "page")
    html = (tmp_path / "page" / "index.html").read_text()
    assert not re.search(r"rdpo|euler|swapped|\.png|samples", html)
    blobs = re.findall(r"data:image/webp;base64,([^\"]+)", html)
    assert len(blobs) == 10 and not any(
        b"rdpo" in base64.b64decode(b) or b"euler" in base64.b64decode(b) for b in blobs
    )
    assert sum(pair.swapped for pair in key.pairs) == 2
    others = [make(samples, tmp_path / str(seed), seed=seed) for seed in range(1, 9)]
    assert len({tuple(p.swapped for p in k.pairs) for k in others}) > 3
    assert len({tuple(p.picture for p in k.pairs) for k in others}) > 3
    assert len({k.page for k in others} | {key.page}) == 9
    assert make(samples, tmp_path / "again") == key


def test_a_picture_has_the_prompt_that_it_is_scored_with(tmp_path: Path) -> None:
    for side in ("rdpo", "euler-6"):
        (tmp_path / side).mkdir()
        for number in (100, 10, 2):
            picture(number).save(tmp_path / side / f"{number}.png")
    lines = tmp_path / "lines.txt"
    lines.write_text("two\nten\nhundred\n")
    made = {pair.picture: pair.prompt for pair in make(tmp_path, tmp_path / "page", lines).pairs}
    index = read_index(str(tmp_path / "rdpo"), lines)
    scored = dict(zip(index["id"].to_pylist(), index["prompt"].to_pylist(), strict=True))
    assert made == scored == {"2.png": "two", "10.png": "ten", "100.png": "hundred"}


def test_first_pairs_alone_and_prompts_from_elsewhere(samples: Path, tmp_path: Path) -> None:
    key = make(samples, tmp_path / "a", count=2)
    assert sorted(pair.prompt for pair in key.pairs) == sorted(PROMPTS[:2])
    rows = "".join(f"00{i}.png,prompt {i}\n" for i in range(4))
    (tmp_path / "prompts.csv").write_text(f"file_name,prompt\n{rows}")
    key = make(samples, tmp_path / "b", tmp_path / "prompts.csv")
    assert {p.picture: p.prompt for p in key.pairs} == {f"00{i}.png": f"prompt {i}" if i < 4 else "" for i in range(5)}
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    assert {p.prompt for p in make(samples, tmp_path / "c", tmp_path / "lines.txt", count=2).pairs} == {"one", "two"}
    (samples / "prompts.json").unlink()
    (samples / "rdpo" / "003.txt").write_text("beside\n")
    assert {p.prompt.strip() for p in make(samples, tmp_path / "d").pairs} == {"", "beside"}


def test_folders_of_one_name_are_told_apart(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (samples / "euler-6").rename(tmp_path / "other" / "rdpo")
    make_page(samples / "rdpo", tmp_path / "other" / "rdpo", tmp_path / "page", None, None, 0)
    key = read_key(tmp_path / "page")
    assert (key.left, key.right) == ("samples/rdpo", "other/rdpo")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: (s / "euler-6/003.png").unlink(), r"rdpo has 1 pictures that .*euler-6 lacks, such as '003.png'"),
        (lambda s: picture(1).save(s / "euler-6/z.png"), r"euler-6 has 1 pictures that .*rdpo lacks, such as 'z.png'"),
        (lambda s: (s / "rdpo/002.png").write_bytes(b"damaged"), r"rdpo/002.png cannot be read as a picture"),
        (lambda s: picture(1, (8, 12)).save(s / "rdpo/001.png"), r"rdpo/001.png has 8 x 12 pixels and .* 12 x 8: "),
        (lambda s: (s / "prompts.json").write_text('["one"]'), r"prompts.json has 1 prompts for 5 pictures"),
        (lambda s: (s / "prompts.json").write_text("[1, 2, 3, 4, 5]"), r"prompts.json holds no list of prompts"),
        (lambda s: (s / "prompts.json").write_text("["), r"prompts.json cannot be read as JSON"),
        (lambda s: (s / "prompts.json").write_bytes(b'["\xff"]'), r"prompts.json: not UTF-8 at byte 2 "),
        (lambda s: (s / "prompts.json").write_text("[" * 200_000), r"prompts.json cannot be read: it is nested"),
        (lambda s: [p.unlink() for p in s.rglob("*.png")], r"rdpo holds no pictures"),
        (lambda s: [p.unlink() for p in s.rglob("*.png")] and (s / "rdpo").rmdir(), r"rdpo is no folder"),
        (lambda s: (s.parent / "page").mkdir() or (s.parent / "page/key.json").touch(), r"page holds a page already: "),
    ],
)  # fmt: skip
def test_what_does_not_pair_is_named(
    samples: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(samples)
    with pytest.raises(EpdRayError, match=message) as caught:
        make(samples, tmp_path / "page")
    assert "\n" not in str(caught.value) and not (tmp_path / "page" / "index.html").exists()


def test_one_folder_and_other_prompts_are_refused(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(SideBySideError, match="is given for both sides: name two folders"):
        make_page(samples / "rdpo", samples / "euler-6" / ".." / "rdpo", tmp_path / "page", None, None, 0)
    (tmp_path / "other").mkdir()
    (samples / "euler-6").rename(tmp_path / "other" / "euler")
    (tmp_path / "other" / "prompts.json").write_text(json.dumps([*PROMPTS[:3], "another", PROMPTS[4]]))
    with pytest.raises(SideBySideError, match=r"003\.png"):
        make_page(samples / "rdpo", tmp_path / "other" / "euler", tmp_path / "page", None, None, 0)


# --- what came of it --------------------------------------------------------------------------------------------------


def key_of(swapped: list[bool]) -> Key:
    pairs = tuple(Pair(id=str(i), picture=f"{i}.png", prompt="", swapped=s) for i, s in enumerate(swapped))
    return Key(page="p", left="ours", right="theirs", seed=0, pairs=pairs)


def votes(*choices: str) -> list[Vote]:
    return [Vote.model_validate({"pair": str(i), "choice": c, "seconds": 1}) for i, c in enumerate(choices) if c]


def test_votes_are_unblinded() -> None:
    key = key_of([False, True, False, True, False, False])
    ours, theirs = tally(key, [votes("left", "left", "tie", "right", "left", "")])
    assert ours == Standing("ours", wins=3, ties=1, losses=1)
    assert theirs == Standing("theirs", wins=1, ties=1, losses=3)


def test_several_raters_go_by_majority() -> None:
    key = key_of([False, True, False, False])
    raters = [votes("left", "left", "left", ""), votes("left", "right", "tie", "left"), votes("right", "left", "", "")]
    ours, _ = tally(key, raters)
    assert ours == Standing("ours", wins=3, ties=0, losses=1)
    assert tally(key, [votes("left", "left"), votes("right", "right")])[0] == Standing("ours", 0, 2, 0)


def test_intervals_are_exact() -> None:
    """Clopper-Pearson of 8 in 10, as tables have it; all of n has a lower bound of (0.025)^(1/n)."""
    assert Standing("a", 8, 3, 2).share() == pytest.approx((0.8, 0.4439, 0.9748), abs=1e-4)
    assert Standing("a", 5, 0, 0).share() == pytest.approx((1, 0.025**0.2, 1))
    assert Standing("a", 8, 3, 2).p_value() == pytest.approx(2 * (45 + 10 + 1) / 2**10)


def saved(path: Path, key: Key, choices: list[str], **changes: object) -> Path:
    record = {"page": key.page, "saved": "2026-01-01T00:00:00.000Z"}
    given = [{"pair": p.id, "choice": c, "seconds": 1.5} for p, c in zip(key.pairs, choices, strict=False)]
    path.write_text(json.dumps({**record, "votes": given, **changes}))
    return path


def test_results_in_words(samples: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    key = make(samples, page)
    for_ours = ["right" if pair.swapped else "left" for pair in key.pairs]
    saved(page / "results.json", key, [*for_ours[:3], "tie"])
    assert results(page, []) == [
        "4 of 5 pairs judged",
        "rdpo        3 wins    1 ties    0 losses   preferred in 100.0% [29.2%, 100.0%] of 3 decided pairs",
        "euler-6     0 wins    1 ties    3 losses   preferred in 0.0% [0.0%, 70.8%] of 3 decided pairs",
        "brackets hold exact 95 % intervals; a two-sided sign test of no preference gives p = 0.25",
    ]
    saved(tmp_path / "other.json", key, ["tie"])
    lines = results(page, [page / "results.json", tmp_path / "other.json"])
    assert lines[0] == "4 of 5 pairs judged by the majority of 2 raters"
    assert results(page, [tmp_path / "other.json"])[1:] == [
        "rdpo        0 wins    1 ties    0 losses",
        "euler-6     0 wins    1 ties    0 losses",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"page": "0123456789abcdef"},
            r"results.json belongs to page '0123456789abcdef', the folder to page '[0-9a-f]{16}'",
        ),
        ({"votes": [{"pair": "9", "choice": "left", "seconds": 1}]}, r"damaged: pair '9' is not on the page"),
        ({"votes": [{"pair": "1", "choice": "tie", "seconds": 1}] * 2}, r"damaged: pair '1' has two votes"),
        ({"votes": [{"pair": "1", "choice": "both", "seconds": 1}]}, r"is damaged \('votes.0.choice': Input should be"),
        ({"votes": None}, r"is damaged \('votes': "),
    ],
)
def test_results_that_are_not_this_pages_are_refused(
    samples: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    key = make(samples, tmp_path / "page")
    path = saved(tmp_path / "results.json", key, [], **changes)
    with pytest.raises(SideBySideError, match=message) as caught:
        read_votes(path, key)
    assert "\n" not in str(caught.value)


def vote(seconds: str) -> bytes:
    return b'{"page": "p", "saved": "", "votes": [{"pair": "0", "choice": "tie", "seconds": %s}]}' % seconds.encode()


TIMES = ("NaN", "Infinity", "-Infinity", "1e999", "-1", "true", '"1"', "null", "[]")
WRONG_VOTES = [*map(vote, TIMES), b"", b"{", b"null", b"\xff", b"[" * 900, b"1" * 900, b'{"page": "\\ud83e"}']


@pytest.mark.parametrize("text", WRONG_VOTES)
def test_votes_that_no_page_sends_are_refused(text: bytes) -> None:
    with pytest.raises(SideBySideError) as caught:
        parse_votes(text, key_of([False]), "it")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert parse_votes(vote("0.25"), key_of([False]), "it").votes[0].seconds == 0.25


def test_more_bytes_than_votes_can_have_are_not_read(tmp_path: Path) -> None:
    key = key_of([False] * 3)
    (tmp_path / "r.json").write_bytes(b"[" + b"[]," * (20 << 20) + b"[]]")
    with pytest.raises(SideBySideError, match=r"r\.json has .* at most 4864"):
        read_votes(tmp_path / "r.json", key)
    indented = {
        "page": "p",
        "saved": "2026-01-01T00:00:00.000Z",
        "votes": [v.model_dump() for v in votes(*["right"] * 3)],
    }
    assert len(parse_votes(json.dumps(indented, indent=8).encode(), key, "it").votes) == 3


@given(st.binary(max_size=200) | st.binary(max_size=40).map(lambda data: vote("1").replace(b"tie", data)))
def test_any_bytes_are_votes_or_refused(text: bytes) -> None:
    with contextlib.suppress(SideBySideError):
        assert parse_votes(text, key_of([False]), "it").page == "p"


def test_missing_and_damaged_files_are_named(samples: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    with pytest.raises(SideBySideError, match=r"key\.json.*No such file"):
        results(page, [])
    make(samples, page)
    with pytest.raises(SideBySideError, match=r"results\.json"):
        results(page, [])
    (page / "results.json").write_text("{")
    with pytest.raises(SideBySideError, match=r"results\.json.*\bit\b") as caught:
        results(page, [])
    assert "\n" not in str(caught.value)


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(samples: Path, tmp_path: Path) -> Iterator[httpx2.Client]:
    make(samples, tmp_path / "page")
    with served_page(tmp_path / "page", 0) as url, httpx2.Client(base_url=url, timeout=10) as client:
        yield client


def test_votes_are_saved_beside_the_page(page: httpx2.Client, tmp_path: Path) -> None:
    folder, key = tmp_path / "page", read_key(tmp_path / "page")
    assert page.get("/").text == (folder / "index.html").read_text()
    assert page.get("/results").json() is None
    text = saved(tmp_path / "sent.json", key, ["left", "tie"]).read_text()
    assert page.put("/results", content=text).status_code == 204
    assert page.get("/results").json() == json.loads(text) == json.loads((folder / "results.json").read_text())
    assert len(read_votes(folder / "results.json", key).votes) == 2
    assert results(folder, [])[0] == "2 of 5 pairs judged"


def test_the_server_gives_and_takes_nothing_else(page: httpx2.Client, tmp_path: Path) -> None:
    folder, key = tmp_path / "page", read_key(tmp_path / "page")
    text = saved(tmp_path / "sent.json", key, ["left"]).read_text()
    assert page.get("/key.json").status_code == 404  # a rater might look
    assert page.get("/..%2fpage/key.json").status_code == 404
    assert page.put("/key.json", content=text).status_code == 404
    assert page.put("/results", content=text, headers={"Origin": "http://elsewhere.example"}).status_code == 403
    assert page.get("/results", headers={"Host": "elsewhere.example"}).status_code == 403
    assert page.put("/results", content=b" " * (largest_votes(key) + 1)).status_code == 413
    other = page.put("/results", content=text.replace(key.page, "0" * 16))
    assert other.status_code == 409 and other.text.startswith("what the page sent belongs to page '0000")
    for wrong in WRONG_VOTES:
        assert page.put("/results", content=wrong).status_code == 409
    assert not (folder / "results.json").exists()
    with (
        pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{page.base_url.port}\b.*--port"),
        served_page(folder, page.base_url.port or 0),
    ):
        pass


def test_a_full_disk_is_said(page: httpx2.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise RunDirectoryError("the disk is full")

    monkeypatch.setattr("epd_ray.evaluation.ab.server.write_text", full)
    text = saved(tmp_path / "sent.json", read_key(tmp_path / "page"), ["left"]).read_text()
    answer = page.put("/results", content=text)
    assert answer.status_code == 507 and answer.text == "the disk is full"


# --- the commands -----------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, [str(a) for a in arguments])


def test_from_the_command_line(samples: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    made = invoke("ab", "make", samples / "rdpo", samples / "euler-6", "--out", page, "--pairs", 3, "--seed", 5)
    assert made.exit_code == 0, made.output
    assert made.stdout.startswith("3 pairs, ") and f"epd-ray ab results {page}" in made.stdout
    key = read_key(page)
    saved(tmp_path / "r.json", key, ["tie"] * 3)
    assert invoke("ab", "results", page, tmp_path / "r.json").stdout.startswith("3 of 3 pairs judged\n")
    again = invoke("ab", "make", samples / "rdpo", samples / "euler-6", "--out", page)
    assert again.exit_code == 2 and again.stderr == (
        f"error: {page} holds a page already: name a new folder, or its votes would lose their key\n"
    )
    assert invoke("ab", "serve", tmp_path / "none").exit_code == 2
