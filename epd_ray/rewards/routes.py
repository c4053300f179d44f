"""Which heads judge each prompt of a run, with what weight, and which columns of its row each of them is given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from epd_ray.prompts.panel import Panel
from epd_ray.types import Metadata


@dataclass(frozen=True)
class Routes:
    """The panel of a run, and the rows of its prompts, which stand in them by their text.

    Attributes:
        panel: the heads.
        rows: prompt -> the columns of its row. A prompt that is absent has a row without columns.
    """

    panel: Panel
    rows: Mapping[str, Metadata] = field(default_factory=dict)

    def weights(self, prompts: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
        """Head -> its weight [B] in the reward of each prompt; 0 where it does not judge it."""
        judges = {prompt: self.panel.judges(self.rows.get(prompt, {})) for prompt in set(prompts)}
        return {head: np.array([judges[prompt].get(head, 0.0) for prompt in prompts]) for head in self.panel.weights}

    def given(self, head: str, prompts: Sequence[str]) -> list[Metadata | None] | None:
        """What `Scorer.score` takes as the rows of some prompts; None where no head reads a column of any row."""
        if not self.panel.columns:
            return None
        found = {prompt: self.panel.given(head, self.rows.get(prompt, {})) for prompt in set(prompts)}
        return [found[prompt] for prompt in prompts]
