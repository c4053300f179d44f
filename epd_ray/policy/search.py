"""Searching a solver table without gradients: CMA-ES and random draws, in rounds of tables and what they scored."""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from epd_ray.errors import ConfigError
from epd_ray.policy.dirichlet import INITIAL_LOG_STD, TableDistribution, TableSpace, base_parameters
from epd_ray.randomness import Purpose, request_seeds, stream
from epd_ray.solvers import SolverTable

Floats = npt.NDArray[np.floating]
STEP = 0.5  # CMA-ES's first standard deviation, in the coordinates: factors of about 1.6 between neighbouring segments
SCALE_UNIT = math.exp(INITIAL_LOG_STD) / STEP  # of a scale's logarithm: it begins with RDPO's standard deviation


class Search(Protocol):
    """Proposes tables, is told what they scored, and says which it would take home."""

    def ask(self) -> SolverTable:
        """The next round's tables, [C, N, K]."""
        ...

    def tell(self, rewards: Floats) -> None:
        """Rewards [C] of the tables asked for last, in order."""
        ...

    def favourite(self) -> SolverTable:
        """The table [N, K] to judge on held-out prompts."""
        ...


def space_of(table: SolverTable) -> TableSpace:
    """What is searched around a table: its direction scales too, if it has any."""
    return TableSpace(table.points, table.scale_dir is not None, start_point=table.start_point)


def coordinates(table: SolverTable) -> Floats:
    """A table [N, K] as unbounded numbers [N D]: log-ratios to the last segment and weight, then logarithms of scales.

    D = S + K - 2, and K more with direction scales.
    """
    space = space_of(table)
    widths = [space.segments, space.points, space.points * space.scales]
    segments, weights, scales = base_parameters(table, space, 1.0).double()[:, : sum(widths)].split(widths, dim=1)
    ratios = [part[:, :-1] - part[:, -1:] for part in (segments, weights)]
    return np.asarray(torch.cat([*ratios, scales / SCALE_UNIT], dim=1).flatten().numpy())


def tables_at(rows: Sequence[Floats] | Floats, space: TableSpace) -> SolverTable:
    """The tables [C, N, K] of coordinates [C, N D]."""
    widths = [space.segments - 1, space.points - 1, space.points * space.scales]
    values = torch.as_tensor(np.array(rows)).reshape(len(rows), -1, sum(widths))  # [C, N, D]
    *ratios, scales = values.split(widths, dim=-1)
    simplices = [torch.cat([part, torch.zeros_like(values[..., :1])], dim=-1).softmax(-1) for part in ratios]
    return space.table(torch.cat([*simplices, (scales * SCALE_UNIT).exp()], dim=-1))


class CmaSearch:
    """CMA-ES around a table. Source: Hansen, arXiv 1604.00772; the `cma` package.

    Args:
        start: [N, K], without time scales.
        candidates: tables a round, at least 2.
        seed: of the draws.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, start: SolverTable, candidates: int, seed: int) -> None:
        if importlib.util.find_spec("cma") is None:
            raise ConfigError(["CMA-ES: the package cma is not installed: pip install 'epd-ray[search]'"])
        import cma

        rng = stream(Purpose.CMA_TABLES, seed)
        options: dict[str, Any] = {
            "popsize": candidates,
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": np.nan,  # leave numpy's global generator alone
            "verbose": -9,
            "verb_log": 0,
        }
        self._space = space_of(start)
        self._strategy = cma.CMAEvolutionStrategy(coordinates(start), STEP, options)
        self._asked: list[Floats] = []

    def ask(self) -> SolverTable:
        self._asked = self._strategy.ask()
        return tables_at(self._asked, self._space)

    def tell(self, rewards: Floats) -> None:
        self._strategy.tell(self._asked, [-float(reward) for reward in rewards])

    def favourite(self) -> SolverTable:
        """The mean of the search distribution."""
        return tables_at([self._strategy.mean], self._space).row(0)


class RandomSearch:
    """Tables from the distribution that RDPO starts with; the best of the last round is the favourite.

    Args:
        start: [N, K], without time scales.
        candidates: tables a round.
        seed: of the draws.
        concentration: total of each Dirichlet.
    """

    def __init__(self, start: SolverTable, candidates: int, seed: int, concentration: float) -> None:
        self._space = space_of(start)
        self._policy = TableDistribution(self._space, base_parameters(start, self._space, concentration))
        self._candidates, self._rng = candidates, stream(Purpose.RANDOM_TABLES, seed)
        self._favourite, self._asked = start, start

    def ask(self) -> SolverTable:
        seeds = request_seeds(self._rng, self._candidates).tolist()
        self._asked = self._space.table(torch.from_numpy(np.stack([self._policy.draw(seed) for seed in seeds])))
        return self._asked

    def tell(self, rewards: Floats) -> None:
        self._favourite = self._asked.row(int(np.argmax(rewards)))

    def favourite(self) -> SolverTable:
        """The best of the last round; the start before the first."""
        return self._favourite
