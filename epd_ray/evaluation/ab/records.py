"""The files of a side-by-side test: the key, which says which solver is on which side, and the votes, which do not."""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from epd_ray.errors import SideBySideError, shown

PAGE, KEY, RESULTS = "index.html", "key.json", "results.json"
VOTES_FIX = "save the results from the page again"


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Pair(Record):
    """A pair of pictures on the page.

    Attributes:
        id: the pair's name on the page.
        picture: the pictures' file name, which is the same in both folders.
        prompt: the pictures' prompt; "" if they have none.
        swapped: whether the picture of the folder RIGHT is on the left side of the page.
    """

    id: str
    picture: str
    prompt: str
    swapped: bool


class Key(Record):
    """Which solver is on which side of each pair.

    Attributes:
        page: a checksum of everything that the page shows.
        left: the name of the solver in the folder LEFT.
        right: the name of the solver in the folder RIGHT.
        seed: the seed of the sides and the order.
        pairs: the pairs in the order of the page.
    """

    page: str
    left: str
    right: str
    seed: int
    pairs: tuple[Pair, ...]


class Vote(Record):
    """A rater's choice between the pictures of a pair.

    Attributes:
        pair: the pair's id.
        choice: the side of the page with the better picture, or "tie".
        seconds: the time since the pair was shown, in seconds, finite and >= 0.
    """

    pair: str
    choice: Literal["left", "right", "tie"]
    seconds: float = Field(ge=0, allow_inf_nan=False)


class Votes(Record):
    """The votes that a page saves.

    Attributes:
        page: the checksum of the page.
        saved: the time when they were saved, in ISO 8601.
        votes: the votes in the order in which they were given, at most one for each pair.
    """

    page: str
    saved: str
    votes: tuple[Vote, ...]


R = TypeVar("R", bound=Record)


def read_key(folder: Path) -> Key:
    """Read the key in a page's folder.

    Raises:
        SideBySideError: the folder has no key, or a damaged one.
    """
    path, fix = folder / KEY, f"give the folder that `epd-ray ab make` wrote, with its {KEY}"
    return _parsed(Key, _bytes(path, fix), str(path), fix)


def read_votes(path: Path, key: Key) -> Votes:
    """Read the votes of a results file.

    Raises:
        SideBySideError: there is no such file, it is damaged, or it belongs to another page.
    """
    return parse_votes(_bytes(path, VOTES_FIX, largest_votes(key)), key, str(path))


def largest_votes(key: Key) -> int:
    """The bytes that the votes of a page can take at most, however they are written."""
    return 4096 + 256 * len(key.pairs)


def parse_votes(text: bytes, key: Key, where: str) -> Votes:
    """Read votes that come from the key's page.

    Args:
        text: the votes in JSON.
        key: the key of the page.
        where: what the votes were read from, for the message.

    Raises:
        SideBySideError: the text is no such record, or larger than `largest_votes`; the votes belong to another page;
            or one is for a pair that the page lacks or that has a vote already.
    """
    if len(text) > largest_votes(key):  # before it is parsed, which takes far more memory than the text
        raise SideBySideError(
            f"{where} has {len(text)} bytes, but votes on {len(key.pairs)} pairs have at most {largest_votes(key)}: "
            f"{VOTES_FIX}"
        )
    votes = _parsed(Votes, text, where, VOTES_FIX)
    if votes.page != key.page:
        raise SideBySideError(
            f"{where} belongs to page {shown(votes.page)}, the folder to page {key.page!r}: give results of that page"
        )
    known, seen = {pair.id for pair in key.pairs}, set[str]()
    for vote in votes.votes:
        if vote.pair not in known or vote.pair in seen:
            what = "has two votes" if vote.pair in seen else "is not on the page"
            raise SideBySideError(f"{where} is damaged: pair {shown(vote.pair)} {what} ({VOTES_FIX})")
        seen.add(vote.pair)
    return votes


def _bytes(path: Path, fix: str, most: int = -1) -> bytes:
    """The bytes of a file, of one that is too large `most` + 1."""
    try:
        with path.open("rb") as file:
            return file.read(most + 1 if most >= 0 else -1)
    except OSError as error:
        raise SideBySideError(f"{path} cannot be read ({error.strerror}): {fix}") from error


def _parsed(kind: type[R], text: bytes, where: str, fix: str) -> R:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise SideBySideError(f"{where} is damaged ({shown(place)}: {first['msg']}): {fix}") from error
