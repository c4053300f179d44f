"""RDPO against CMA-ES and random search, from the same start, with the same actors and the same number of images."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from epd_ray.actors.beforehand import panel_of
from epd_ray.bench.kept import FOLDER, kept
from epd_ray.bench.record import Record, Value, under
from epd_ray.bench.settings import DEFAULTS
from epd_ray.config.loading import load_config
from epd_ray.config.run_config import RunConfig
from epd_ray.drawing.sampler import Sampler
from epd_ray.evaluation.statistics import interval_over, judged, mean_over_seeds
from epd_ray.policy.search import CmaSearch, RandomSearch, Search
from epd_ray.prompts.splits import PromptSplits, load_prompts
from epd_ray.randomness import Purpose, noise_seeds, request_seeds, stream
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.session import algorithm
from epd_ray.runs.stage_one import fit_start_table
from epd_ray.runs.trainer import validate
from epd_ray.solvers import SolverTable
from epd_ray.stage_one.shard import as_table

PROBLEMS: dict[str, tuple[str, ...]] = {
    "n2": (),
    "n3": ("solver.intervals=3",),
}
METHODS = ("rdpo", "cma", "random")
BUDGET = DEFAULTS.rdpo.iterations * DEFAULTS.rdpo.images_per_iteration
BETWEEN_CHECKS = DEFAULTS.evaluation.every * DEFAULTS.rdpo.images_per_iteration
CANDIDATES, SHARED = 8, 4  # tables of CMA-ES in a round, and the prompts that each draws
RANDOM_CANDIDATES = 20  # drawn between two checks; each draws the same 8 prompts
RULES = {"between_checks": BETWEEN_CHECKS, "cma": [CANDIDATES, SHARED], "random": RANDOM_CANDIDATES}


@dataclass(frozen=True)
class Found:
    """What a method found on one seed.

    Attributes:
        positions: [N][K] positions of the table that was best on the validation prompts.
        weights: [N][K] weights of this table.
        scale_dir: [N][K] direction scales of this table, None where it has none.
        images: number of images drawn before this table was found.
        validation: held-out rewards at the checks, of which the first is that of the distilled table.
        test: raw score of the first head on each test prompt that it judges.
    """

    positions: list[list[float]]
    weights: list[list[float]]
    scale_dir: list[list[float]] | None
    images: int
    validation: list[float]
    test: list[float]

    @property
    def table(self) -> SolverTable:
        """The best table."""
        columns = (self.positions, self.weights, self.scale_dir)
        return SolverTable(*(torch.tensor(column, dtype=torch.float64) for column in columns if column is not None))

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that tell the best table from others."""
        table = json.dumps([self.positions, self.weights, self.scale_dir])
        return hashlib.sha256(table.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Method:
    """A way to improve a table.

    Attributes:
        advance: draws images and learns from them.
        images: number of images that `advance` draws.
        table: the table that the method would give now.
    """

    advance: Callable[[], object]
    images: int
    table: Callable[[], SolverTable]


class Rounds:
    """Rounds of a search on RDPO's actors, in which all tables draw the same prompts and noise.

    Args:
        config: configuration of the run.
        prompts: the training prompts.
        algo: the algorithm whose actors draw and score.
        search: proposes tables and learns their rewards.
        prompts_per_round: number of prompts that each table draws.
    """

    def __init__(
        self, config: RunConfig, prompts: Sequence[str], algo: RDPO, search: Search, prompts_per_round: int
    ) -> None:
        self._config, self._prompts, self._algo, self.search = config, prompts, algo, search
        self._count = prompts_per_round
        self._rng = stream(Purpose.SEARCH_ROUNDS, config.seed)

    def advance(self) -> None:
        """Run one round."""
        tables = self.search.ask()
        chosen = self._rng.choice(len(self._prompts), self._count, replace=False)
        prompts = [self._prompts[i] for i in chosen]
        noise = request_seeds(self._rng, self._count).tolist()
        count = tables.positions.shape[0]
        each = tables.repeat_rows(self._count)
        s = self._config.solver
        sampler = Sampler("epd", s.intervals, "search", "search", each, s.afs, s.order)
        rewards = self._algo.sample_scored(sampler, prompts * count, noise * count).reward  # [C * P], table-major
        self.search.tell(rewards.reshape(count, self._count).mean(1))


def _method(name: str, config: RunConfig, prompts: PromptSplits, algo: RDPO, start: SolverTable) -> Method:
    if name == "rdpo":
        return Method(algo.train, algo.config.batch_plan.images, algo.mean_table)
    if name == "cma":
        candidates, shared = CANDIDATES, SHARED
        search: Search = CmaSearch(start, candidates, config.seed)
    else:
        candidates, shared = RANDOM_CANDIDATES, BETWEEN_CHECKS // RANDOM_CANDIDATES
        search = RandomSearch(start, candidates, config.seed, config.rdpo.concentration)
    rounds = Rounds(config, prompts.train, algo, search, shared)
    return Method(rounds.advance, candidates * shared, search.favourite)


def search(
    seeds: Sequence[int] = range(3),
    folder: Path = FOLDER,
    overrides: Sequence[str] = (),
    problems: Sequence[str] = tuple(PROBLEMS),
    budget: int = BUDGET,
) -> Record:
    """Test scores of the tables that each method finds with the same number of images.

    The methods of a seed start from the same distilled table. A method's table is judged on the validation prompts
    at every BETWEEN_CHECKS training images; images of these checks do not count. The best of these tables draws the
    test prompts.

    Args:
        seeds: seeds of prompts, noise and draws.
        folder: folder in which the finding of each method is kept, and from which finished ones are read.
        overrides: changes of all settings.
        problems: names in PROBLEMS.
        budget: number of training images of a method.

    Returns:
        The mean over the test prompts that the first head judges, per method and seed. Over the seeds: the mean of each
        method and RDPO's paired difference to it, each with an interval, and `last_check`, the held-out reward at the
        last check, which a method has where nothing chooses among its tables. `interval_over` says whether the
        intervals are over seeds and prompts or, with a single seed, over prompts alone.

    Raises:
        RunDirectoryError: the folder holds results of other settings.
    """
    values: dict[str, Value] = {}
    for problem in problems:
        tests: dict[str, list[list[float]]] = {}  # method -> [S, P], the score of each test prompt of each seed
        last: dict[str, list[float]] = {}
        for seed in seeds:
            config = load_config(None, (f"seed={seed}", *PROBLEMS[problem], *overrides))
            first: Found | None = None
            for name in ("distilled", *METHODS):
                rules = {"budget": budget, "rules": RULES, "start": None if first is None else first.digest}
                measure = partial(_found, name, config, budget, first)
                found = kept(folder / f"search-{problem}-{name}-seed{seed}.json", config, rules, Found, measure)
                first = first or found
                tests.setdefault(name, []).append(found.test)
                last.setdefault(name, []).append(found.validation[-1])
                values[f"{problem}/seed_{seed}/{name}"] = float(np.mean(found.test))
        values |= under(problem, _compared(tests))
        values |= {f"{problem}/{name}/last_check": float(np.mean(rewards)) for name, rewards in last.items()}
    return Record("search", {"budget": budget, "interval_over": interval_over(len(seeds))}, values)


def _compared(tests: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Value]:
    """Means over seeds and prompts, and RDPO's differences to the other methods; a seed has prompts of its own."""
    values: dict[str, Value] = {}
    for name, scores in tests.items():
        values |= under(name, asdict(mean_over_seeds(np.array(scores), same_prompts=False)))
        if name != "rdpo":
            gain = mean_over_seeds(np.subtract(tests["rdpo"], scores), same_prompts=False)
            values |= under(f"{name}/rdpo_minus_this", asdict(gain))
    return values


def _found(name: str, config: RunConfig, budget: int, first: Found | None) -> Found:
    """Search, and draw the test prompts with the table that was best on the validation prompts.

    Args:
        name: "distilled" or one of METHODS.
        config: configuration of the run.
        budget: number of training images.
        first: what distilling found, which is the start of a method; None where distilling itself is asked for.
    """
    prompts = load_prompts(config.prompts, config.seed, panel_of(config))
    with algorithm(config, prompts.train, rows=prompts.rows) as algo:
        if first is None:
            table = as_table(fit_start_table(config, prompts, algo))
        else:
            table = first.table
            algo.rebase(table)

        def judge(table: SolverTable) -> float:
            return float(validate(config, prompts, algo, table, algo.policy_version).reward.mean())

        checks = [(0, table, judge(table))]
        if first is not None:
            method = _method(name, config, prompts, algo, table)
            for images in range(method.images, budget + 1, method.images):
                method.advance()
                if images % BETWEEN_CHECKS == 0:
                    checks.append((images, method.table(), judge(method.table())))
        images, best, _ = max(checks, key=lambda check: check[2])
        rewards = [reward for _, _, reward in checks]
        scale_dir = None if best.scale_dir is None else best.scale_dir.tolist()
        scores = _test(config, prompts, algo, best)
        return Found(best.positions.tolist(), best.weights.tolist(), scale_dir, images, rewards, scores)


def _test(config: RunConfig, prompts: PromptSplits, algo: RDPO, table: SolverTable) -> list[float]:
    s = config.solver
    sampler = Sampler("epd", s.intervals, "test", "test", table, s.afs, s.order)
    sampled = algo.sample_scored(sampler, prompts.test, noise_seeds(Purpose.TEST, config.seed, len(prompts.test)))
    values: list[float] = judged(next(iter(sampled.scores.values()))).tolist()
    return values
