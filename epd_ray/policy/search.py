"""Search for a solver table without gradients, by CMA-ES or random draws, in rounds of tables and their rewards."""

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
STEP = 0.5  # CMA-ES's first standard deviation of a coordinate; it changes the ratio of two segments by about 1.6
SCALE_UNIT = math.exp(INITIAL_LOG_STD) / STEP  # unit of a scale's logarithm, so that it starts with RDPO's spread


class Search(Protocol):
    """A search that proposes tables, is told their rewards, and names the best table so far."""

    def ask(self) -> SolverTable:
        """The next round's tables, [C, N, K]."""
        ...

    def tell(self, rewards: Floats) -> None:
        """Take the rewards [C] of the tables of the last `ask`, in order."""
        ...

    def favourite(self) -> SolverTable:
        """The table [N, K] that the search would return now, to be judged on held-out prompts."""
        ...


def space_of(table: SolverTable) -> TableSpace:
    """Which numbers are searched around a table; direction scales are among them if the table has any."""
    return TableSpace(table.points, table.scale_dir is not None, start_point=table.start_point)


def coordinates(table: SolverTable) -> Floats:
    """A table [N, K] as N * D unbounded numbers, where D = S + K - 2, and K more with direction scales.

    They are, for each interval, the logarithms of the segments' ratios to the last segment and of the weights' ratios
    to the last weight, then the logarithms of the scales in units of SCALE_UNIT.
    """
    space = space_of(table)
    widths = [space.segments, space.points, space.points * space.scales]
    segments, weights, scales = base_parameters(table, space, 1.0).double()[:, : sum(widths)].split(widths, dim=1)
    ratios = [part[:, :-1] - part[:, -1:] for part in (segments, weights)]
    return np.asarray(torch.cat([*ratios, scales / SCALE_UNIT], dim=1).flatten().numpy())


def tables_at(rows: Sequence[Floats] | Floats, space: TableSpace) -> SolverTable:
    """The tables [C, N, K] of C rows of coordinates, each of N * D numbers; the inverse of `coordinates`."""
    widths = [space.segments - 1, space.points - 1, space.points * space.scales]
    values = torch.as_tensor(np.array(rows)).reshape(len(rows), -1, sum(widths))  # [C, N, D]
    *ratios, scales = values.split(widths, dim=-1)
    simplices = [torch.cat([part, torch.zeros_like(values[..., :1])], dim=-1).softmax(-1) for part in ratios]
    return space.table(torch.cat([*simplices, (scales * SCALE_UNIT).exp()], dim=-1))


class CmaSearch:
    """CMA-ES that starts from a table, by the `cma` package.

    Args:
        start: [N, K], without time scales.
        candidates: tables per round, at least 2.
        seed: seed of the random draws.

    Raises:
        ConfigError: the package is not installed.

    Source: Hansen, arXiv 1604.00772.
    """

    def __init__(self, start: SolverTable, candidates: int, seed: int) -> None:
        if importlib.util.find_spec("cma") is None:
            raise ConfigError(["CMA-ES: the package cma is not installed: pip install 'epd-ray[search]'"])
        import cma  # here, since the package is optional

        rng = stream(Purpose.CMA_TABLES, seed)
        options: dict[str, Any] = {
            "popsize": candidates,
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": np.nan,  # cma then leaves numpy's global generator alone
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
    """Tables drawn from the distribution that RDPO starts with; the best table of the last round is the favourite.

    Args:
        start: [N, K], without time scales.
        candidates: tables per round.
        seed: seed of the random draws.
        concentration: total concentration of each Dirichlet.
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
        """The best table of the last round; before the first round, the start."""
        return self._favourite
