"""Which pictures a suite draws, and in which shards."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import JsonValue

from epd_ray.evaluation.comparison import scenes_of


@dataclass(frozen=True)
class Pictures:
    """The same for every sampler. Picture i shows prompt i // images_per_prompt.

    Attributes:
        prompts: [P]; a prompt that comes twice is two prompts.
        images_per_prompt: J, from different noise.
        seeds: [P * J], of the noise.
        batch: pictures of a shard, drawn in one call: what is kept and done again is a whole shard.
    """

    prompts: tuple[str, ...]
    images_per_prompt: int
    seeds: tuple[int, ...]
    batch: int

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def shards(self) -> range:
        """Their numbers."""
        return range(-(-len(self) // self.batch))

    @cached_property
    def judged(self) -> bool:
        """Whether all prompts are scenes of the embedded model's world."""
        return scenes_of(self.prompts) is not None

    def shard(self, number: int) -> range:
        """A shard's pictures."""
        return range(number * self.batch, min((number + 1) * self.batch, len(self)))

    def prompt_of(self, picture: int) -> int:
        """Its prompt's number."""
        return picture // self.images_per_prompt

    @property
    def facts(self) -> dict[str, JsonValue]:
        """What decides the pictures beside model and sampler."""
        return {
            "count": len(self.prompts),
            "images_per_prompt": self.images_per_prompt,
            "images_per_batch": self.batch,
            "prompts_sha256": _digest(self.prompts),
            "seeds_sha256": _digest(self.seeds),
        }


def _digest(values: Sequence[str] | Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
