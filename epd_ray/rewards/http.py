"""A reward head that sends pictures and prompts to a server over HTTP.

It imports torch where it scores, so that a run's server is probed before the imports that take seconds.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import JsonValue

from epd_ray.errors import ConfigError, RewardError
from epd_ray.rewards.client import Client, Service, TransientError, one_line, png, quoted

if TYPE_CHECKING:
    from torch import Tensor

    from epd_ray.types import FloatArray, Metadata

PROBE_SHARE = 0.4  # of the timeout, in which a probe's small picture is scored; by default 12 of 30 s for a whole batch
GREY = 0.5


class HttpHead:
    """Scores that a server computes, such as one started by `epd-ray rewards serve`.

    The head POSTs JSON {"images": [text, ...], "format": "png" or "npy", "prompts": [text, ...]} with one prompt per
    image. Each image is a file in base64: png holds 8-bit RGB, npy a NumPy array [3, H, W], float32 in [0, 1]. The
    server answers with status 200 and JSON {"scores": [number, ...]}, one finite number per image in the same order.
    With `columns`, the request also has "rows", one object of columns per image. See Client for what is tried again;
    any other answer raises an error.

    Args:
        url: http or https address. It is saved with the run, so it must not contain a password.
        token_env: name of the environment variable that holds a token for bearer authentication, on the machine where
            the head runs; None sends no token.
        timeout: seconds for one attempt, from connecting to the answer's last byte.
        retries: number of attempts after the first one.
        concurrency: largest number of requests at the same time.
        batch_size: number of images per request.
        format: "png", or "npy" for exact pixel values in larger requests.
        max_request_bytes: largest request body; a larger one raises an error.
        columns: columns of each prompt's row that are sent too, for a server whose head reads them.

    Raises:
        ConfigError: an argument is out of its range, or the environment variable holds no token.
    """

    def __init__(
        self,
        *,
        url: str,
        token_env: str | None = None,
        timeout: float = 30.0,
        retries: int = 3,
        concurrency: int = 4,
        batch_size: int = 8,
        format: Literal["png", "npy"] = "png",
        max_request_bytes: int = 64 << 20,
        columns: Sequence[str] = (),
    ) -> None:
        service = Service("http reward head", url, token_env, timeout, retries, concurrency)
        problems = service.problems({"max_request_bytes": max_request_bytes}, {"batch_size": (batch_size, 1)})
        if format not in ("png", "npy"):
            problems.append(f"http reward head: format is {format!r}, expected png or npy")
        if problems:
            raise ConfigError(problems)
        self.timeout, self.concurrency, self.batch_size = timeout, concurrency, batch_size
        self.format, self.max_request_bytes = format, max_request_bytes
        self.needs = tuple(columns)
        self._client = Client(service)
        self.model_id = self._client.url

    @staticmethod
    def needs_with(options: Mapping[str, JsonValue]) -> tuple[str, ...]:
        """See NeedsByOptions."""
        columns = options.get("columns", [])
        return tuple(map(str, columns)) if isinstance(columns, list | tuple) else ()

    def close(self) -> None:
        """Close the connections; `score` cannot be called afterwards."""
        self._client.close()

    def score(self, images: "Tensor", prompts: Sequence[str], *, rows: "Sequence[Metadata] | None" = None) -> "Tensor":
        import torch

        parts_of = [slice(i, i + self.batch_size) for i in range(0, len(images), self.batch_size)]
        batches = [(images[part], prompts[part], None if rows is None else rows[part]) for part in parts_of]
        with ThreadPoolExecutor(self.concurrency) as pool:
            parts = list(pool.map(lambda batch: self._score_batch(*batch), batches))
        return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts]))

    def probe(self, row: "Metadata | None" = None) -> None:
        """Let the server score one grey picture, at one attempt, so that a wrong address is found before a run begins.

        It is given PROBE_SHARE of the timeout.

        Args:
            row: the columns that are sent with it; None for none.

        Raises:
            RewardError: the server does not answer, or not with one score.
        """
        body = self._body([self._grey()], ["a grey square"], None if row is None else [row])
        try:
            self._client.ask_once(body, lambda answer: self._scores(answer, 1), PROBE_SHARE * self.timeout)
        except TransientError as error:
            raise RewardError(self.model_id, f"{error}: start the server, or change the url") from error

    def _grey(self) -> bytes:
        if self.format == "png":
            return png(np.full((64, 64, 3), round(255 * GREY), np.uint8))
        return _npy(np.full((3, 64, 64), GREY, np.float32))

    def _file(self, image: "Tensor") -> bytes:
        from epd_ray.rewards.preprocess import to_bytes

        if self.format == "png":
            return png(np.ascontiguousarray(to_bytes(image).permute(1, 2, 0).numpy()))
        return _npy(image.float().cpu().numpy())

    def _body(self, files: Sequence[bytes], prompts: Sequence[str], rows: "Sequence[Metadata] | None") -> bytes:
        images = [base64.b64encode(file).decode() for file in files]
        asked: dict[str, object] = {"images": images, "format": self.format, "prompts": list(prompts)}
        if self.needs:
            asked["rows"] = [{name: row[name] for name in self.needs if name in row} for row in rows or ()]
        return json.dumps(asked).encode()

    def _score_batch(self, images: "Tensor", prompts: Sequence[str], rows: "Sequence[Metadata] | None") -> "FloatArray":
        body = self._body([self._file(image) for image in images], prompts, rows)
        if len(body) > self.max_request_bytes:
            sizes = f"{len(body)} bytes for {len(images)} images, more than max_request_bytes={self.max_request_bytes}"
            raise RewardError(self.model_id, f"a request would take {sizes}: lower batch_size or raise the bound")
        return self._client.ask(body, lambda answer: self._scores(answer, len(images)))

    def _scores(self, answer: bytes, count: int) -> "FloatArray":
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            raise RewardError(self.model_id, f"answered with what is not JSON ({quoted(answer)})") from None
        scores = found.get("scores") if isinstance(found, dict) else None
        if not isinstance(scores, list):
            raise RewardError(self.model_id, f'answered without a list "scores" ({quoted(answer)})')
        if len(scores) != count:
            raise RewardError(self.model_id, f"gave {len(scores)} scores for {count} images")
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < 3.4e38:
                raise RewardError(self.model_id, f"gave {one_line(repr(score))}, which is not a finite float32")
        return np.array(scores, np.float32)


def _npy(image: "FloatArray") -> bytes:  # [3, H, W]
    file = io.BytesIO()
    np.save(file, image, allow_pickle=False)
    return file.getvalue()
