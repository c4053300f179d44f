"""A reward head that asks a vision-language model behind an OpenAI-compatible server for a mark.

It imports torch where it scores, so that a run's server is tried before the imports that take seconds.
"""

import base64
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import JsonValue

from epd_ray.errors import ConfigError, RewardError, shown
from epd_ray.rewards.answer_cache import AnswerCache, key_of
from epd_ray.rewards.client import Client, Service, TransientError, png, quoted
from epd_ray.rewards.judge_answer import Form, Marks, UnreadableAnswerError
from epd_ray.rewards.judge_template import TEMPLATES, columns_of, filled

if TYPE_CHECKING:
    from torch import Tensor

    from epd_ray.types import Metadata

WHO = "judge reward head"
REQUEST: Mapping[str, JsonValue] = {"temperature": 0, "max_tokens": 512}
"""What a request says beside the model and the messages, where `request` does not say otherwise."""


@dataclass
class Usage:
    """What a judge was asked so far.

    Attributes:
        calls: the number of requests that were answered.
        cached: the number of pictures whose answer was in the cache.
        prompt_tokens: the tokens that the server counted in the requests; pictures count too.
        completion_tokens: the tokens that the server counted in the answers.
    """

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class JudgeHead:
    """Marks in [0, 1] that a vision-language model gives, such as one served by vLLM.

    For each picture the head POSTs a chat with the picture (a PNG as data URI) and the filled template, as in OpenAI's
    /v1/chat/completions. The answer must be the mark and nothing else; any other text is an error that shows its
    beginning. See Client for what is tried again.

    Args:
        url: http or https address, up to /v1/chat/completions. It is saved with the run, so it must not contain a
            password.
        model: the name under which the server knows the model.
        template: what the model is told, with the fields {prompt}, {low}, {high} and {key}, and with columns of the
            prompt's row such as {category}; {{ and }} are braces. None asks how well the picture shows the prompt.
        answer: "number" for an answer that is a number alone, "json" for an object with the number under `key`. A fence
            of Markdown around the whole answer does not matter.
        key: the key of the number in a JSON answer.
        low: the lowest mark, which counts as 0.
        high: the highest mark, which counts as 1.
        token_env: name of the environment variable that holds a token for bearer authentication, on the machine where
            the head runs; None sends no token.
        timeout: seconds for one attempt, from connecting to the answer's last byte.
        retries: number of attempts after the first one.
        concurrency: largest number of requests at the same time.
        request: further fields of the request, such as seed or response_format; null leaves out one of REQUEST.
        cache: SQLite file with the answers so far, on a local disk; a picture with the same question is not asked about
            again. None keeps no answers.

    Raises:
        ConfigError: an argument is out of its range, the environment variable holds no token, or the cache cannot be
            used.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        template: str | None = None,
        answer: Form = "number",
        key: str = "score",
        low: float = 0.0,
        high: float = 10.0,
        token_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 3,
        concurrency: int = 8,
        request: Mapping[str, JsonValue] | None = None,
        cache: str | None = None,
    ) -> None:
        service = Service(WHO, url, token_env, timeout, retries, concurrency)
        problems = service.problems({}, {})
        if answer not in TEMPLATES:
            problems.append(f"{WHO}: answer is {answer!r}, expected number or json")
        if not -1e6 <= low < high <= 1e6:
            problems.append(f"{WHO}: low is {low} and high is {high}, expected low < high within a million")
        if taken := sorted({"model", "messages"} & set(request or {})):
            problems.append(f"{WHO}: request holds {shown(taken[0])}, which has an option of its own or is made here")
        if problems:
            raise ConfigError(problems)
        self._template = TEMPLATES[answer] if template is None else template
        self.needs = columns_of(self._template)
        self._marks, self._model = Marks(answer, key, low, high), model
        self._timeout, self._concurrency = timeout, concurrency
        self._request = {n: v for n, v in {**REQUEST, **(request or {})}.items() if v is not None}
        self._cache = None if cache is None else AnswerCache(Path(cache).expanduser())
        self._client = Client(service)
        self.model_id = f"{model} at {self._client.url}"
        self._usage, self._counting = Usage(), threading.Lock()

    @staticmethod
    def needs_with(options: Mapping[str, JsonValue]) -> tuple[str, ...]:
        """See NeedsByOptions."""
        template = options.get("template")
        return columns_of(template) if isinstance(template, str) else ()

    @property
    def costs(self) -> Mapping[str, int]:
        """The fields of Usage, as counted so far."""
        with self._counting:
            return asdict(self._usage)

    def close(self) -> None:
        """Close the connections and the cache; `score` cannot be called afterwards."""
        self._client.close()
        if self._cache is not None:
            self._cache.close()

    def score(self, images: "Tensor", prompts: Sequence[str], *, rows: "Sequence[Metadata] | None" = None) -> "Tensor":
        import torch

        from epd_ray.rewards.preprocess import to_bytes

        files = [png(np.ascontiguousarray(to_bytes(image).permute(1, 2, 0).numpy())) for image in images]
        told = [self._told(prompt, row) for prompt, row in zip(prompts, rows or [{}] * len(files), strict=True)]
        with ThreadPoolExecutor(self._concurrency) as pool:
            found = list(pool.map(self._score, files, told))
        return torch.tensor(found, dtype=torch.float32)

    def probe(self, row: "Metadata | None" = None) -> None:
        """Let the model mark one grey picture, at one attempt, so that a wrong setting is found before a run begins.

        Args:
            row: the columns that the template names; None where it names none.

        Raises:
            RewardError: the server does not answer, or not with a mark.
        """
        told = self._told("a grey square", row or {})
        body = self._body(png(np.full((64, 64, 3), 128, np.uint8)), told)
        try:
            self._mark(self._client.ask_once(body, self._read, self._timeout))
        except TransientError as error:
            raise RewardError(self.model_id, f"{error}: start the server, or change the url") from error

    def _told(self, prompt: str, row: "Metadata") -> str:
        values: dict[str, JsonValue] = {
            "prompt": prompt,
            "low": f"{self._marks.low:g}",
            "high": f"{self._marks.high:g}",
            "key": self._marks.key,
        }
        return filled(self._template, values, row)

    def _body(self, file: bytes, told: str) -> bytes:
        picture: JsonValue = {"url": f"data:image/png;base64,{base64.b64encode(file).decode()}"}
        content: list[JsonValue] = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": told}]
        message: JsonValue = {"role": "user", "content": content}
        asked: dict[str, JsonValue] = {"model": self._model, "messages": [message], **self._request}
        return json.dumps(asked).encode()

    def _score(self, file: bytes, told: str) -> float:
        settings = json.dumps([self._model, self._request], sort_keys=True)
        key = key_of(file, told, settings)  # `told` holds the prompt, the template and the columns
        if self._cache is not None and (known := self._cache.get(key)) is not None:
            with self._counting:
                self._usage.cached += 1
            return self._mark(known)
        answer = self._client.ask(self._body(file, told), self._read)
        score = self._mark(answer)
        if self._cache is not None:
            self._cache.put(key, answer)
        return score

    def _mark(self, answer: str) -> float:
        try:
            return self._marks.score(answer)
        except UnreadableAnswerError as error:
            raise RewardError(self.model_id, str(error)) from None

    def _read(self, body: bytes) -> str:
        """The text of an answer, whose cost is counted.

        Raises:
            RewardError: the body is no chat completion with a text.
        """
        try:
            found: Any = json.loads(body)
            text = found["choices"][0]["message"]["content"]
        except (ValueError, RecursionError, LookupError, TypeError):
            raise RewardError(self.model_id, f"answered with what is no chat completion ({quoted(body)})") from None
        if not isinstance(text, str):
            raise RewardError(self.model_id, f"answered without a text ({quoted(body)})")
        spent = found.get("usage")
        spent = spent if isinstance(spent, dict) else {}
        with self._counting:
            self._usage.calls += 1
            self._usage.prompt_tokens += _count(spent.get("prompt_tokens"))
            self._usage.completion_tokens += _count(spent.get("completion_tokens"))
        return text


def _count(tokens: object) -> int:
    return tokens if isinstance(tokens, int) and tokens > 0 else 0
