"""The files of a side-by-side page: its key, which says what was on which side, and its votes, which do not know."""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from epd_ray.errors import SideBySideError

PAGE, KEY, RESULTS = "index.html", "key.json", "results.json"


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pair(Record):
    """A pair as the page shows it.

    Attributes:
        id: the page's name for it.
        picture: the file's name in both folders.
        prompt: "" where there is none.
        swapped: RIGHT's picture stands on the page's left side.
    """

    id: str
    picture: str
    prompt: str
    swapped: bool


class Key(Record):
    """What un-blinds a page.

    Attributes:
        page: checksum of all that the page shows.
        left: name of the LEFT folder's solver.
        right: name of the RIGHT folder's.
        seed: of sides and order.
        pairs: in the page's order.
    """

    page: str
    left: str
    right: str
    seed: int
    pairs: tuple[Pair, ...]


class Vote(Record):
    """What someone prefers of a pair: a side of the page.

    Attributes:
        pair: its id.
        choice: the side.
        seconds: since the pair was shown.
    """

    pair: str
    choice: Literal["left", "right", "tie"]
    seconds: float


class Votes(Record):
    """What the page saves.

    Attributes:
        page: whose votes these are.
        saved: when, in ISO 8601.
        votes: in the order given; one per pair at most.
    """

    page: str
    saved: str
    votes: tuple[Vote, ...]


R = TypeVar("R", bound=Record)


def read_key(folder: Path) -> Key:
    """The key of a page's folder.

    Raises:
        SideBySideError: none there, or a damaged one.
    """
    return _read(Key, folder / KEY, f"give the folder that `epd-ray ab make` wrote, with its {KEY}")


def read_votes(path: Path, key: Key) -> Votes:
    """The votes of a results file.

    Raises:
        SideBySideError: no such file, a damaged one, or one of another page.
    """
    votes = _read(Votes, path, "save the results from the page again")
    check_votes(votes, key, str(path))
    return votes


def check_votes(votes: Votes, key: Key, where: str) -> None:
    """Refuse votes that cannot have come from the key's page.

    Raises:
        SideBySideError: they are of another page, of a pair that it does not have, or of one pair twice.
    """
    if votes.page != key.page:
        raise SideBySideError(
            f"{where} is of page {votes.page}, the folder's is {key.page}: give the results and the folder of one page"
        )
    known, seen = {pair.id for pair in key.pairs}, set[str]()
    for vote in votes.votes:
        if vote.pair not in known or vote.pair in seen:
            what = "is voted on twice" if vote.pair in seen else "is not on the page"
            raise SideBySideError(f"{where} is damaged: pair {vote.pair!r} {what} (save it from the page again)")
        seen.add(vote.pair)


def _read(kind: type[R], path: Path, fix: str) -> R:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise SideBySideError(f"{path} cannot be read ({error.strerror}): {fix}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise SideBySideError(f"{path} is damaged ({where}: {first['msg']}): {fix}") from error
