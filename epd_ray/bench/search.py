"""RDPO against CMA-ES and random search: the same start, actors, budget of images and choice by held-out reward."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from epd_ray.bench.kept import FOLDER, kept
from epd_ray.config.loading import RunConfig, load_config
from epd_ray.drawing.sampler import Sampler
from epd_ray.evaluation.statistics import student_mean
from epd_ray.policy.search import CmaSearch, RandomSearch, Search
from epd_ray.prompts.splits import PromptSplits, load_prompts
from epd_ray.randomness import Purpose, noise_seeds, request_seeds, stream
from epd_ray.rdpo.algorithm import RDPO
from epd_ray.rdpo.session import algorithm
from epd_ray.runs.trainer import distil, validate
from epd_ray.solvers import SolverTable
from epd_ray.stage_one.shard import as_table

PROBLEMS: dict[str, tuple[str, ...]] = {
    "n2": (),
    "n3": ("solver.intervals=3",),
}
METHODS = ("rdpo", "cma", "random")
BUDGET = 1440
BETWEEN_CHECKS = 160
CANDIDATES, SHARED = 8, 4  # tables of CMA-ES a round, and the prompts that each draws
RANDOM_CANDIDATES = 20  # drawn between two checks; each draws the same 8 prompts
RULES = {"between_checks": BETWEEN_CHECKS, "cma": [CANDIDATES, SHARED], "random": RANDOM_CANDIDATES}
Record = dict[str, float | int | str | bool | None]


@dataclass(frozen=True)
class Found:
    """What a method found on one seed.

    Attributes:
        positions: [N][K] of the table that was best on the validation prompts.
        weights: [N][K].
        scale_dir: [N][K], None where the table has none.
        images: drawn until then.
        validation: held-out rewards at the checks, from the distilled table's.
        test: raw score of the first head on each test prompt.
    """

    positions: list[list[float]]
    weights: list[list[float]]
    scale_dir: list[list[float]] | None
    images: int
    validation: list[float]
    test: list[float]


@dataclass(frozen=True)
class Method:
    """A way to a better table.

    Attributes:
        advance: draws some images and learns from them.
        images: of an advance.
        table: what it would take home now.
    """

    advance: Callable[[], object]
    images: int
    table: Callable[[], SolverTable]


class Rounds:
    """Rounds of a search on RDPO's actors: all tables of a round draw the same prompts and noise.

    Args:
        config: of the run.
        prompts: to train on.
        algo: whose actors draw and score.
        search: proposes and is told.
        prompts_per_round: that each table draws.
    """

    def __init__(
        self, config: RunConfig, prompts: Sequence[str], algo: RDPO, search: Search, prompts_per_round: int
    ) -> None:
        self._config, self._prompts, self._algo, self.search = config, prompts, algo, search
        self._count = prompts_per_round
        self._rng = stream(Purpose.SEARCH_ROUNDS, config.seed)

    def advance(self) -> None:
        """One round."""
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
    """Test scores of the tables that each method finds with the same images, and RDPO's paired difference to them.

    The methods of a seed start from one distilled table. Every 160 images each has one table judged on the validation
    prompts, which are not counted, and keeps the best; that one draws the test prompts.

    Args:
        seeds: of prompts, noise and draws.
        folder: where what a method found is kept when it is done; what lies there is not searched again.
        overrides: of all settings.
        problems: names in PROBLEMS.
        budget: training images of a method.

    Returns:
        Per method and seed the mean over test prompts; over the seeds its mean and RDPO's difference, each with
        Student's interval, null with one seed; and `last_check`: the held-out reward at the last check, what a method
        has where nothing chose among its tables.

    Raises:
        RunDirectoryError: the folder holds results of other settings.
    """
    record: Record = {"budget": budget}
    for problem in problems:
        tests: dict[str, list[float]] = {}  # a mean over the test prompts for each seed
        last: dict[str, list[float]] = {}
        for seed in seeds:
            config = load_config(None, (f"seed={seed}", *PROBLEMS[problem], *overrides))
            first: Found | None = None
            for name in ("distilled", *METHODS):
                rules = {"budget": budget, "rules": RULES, "start": None if first is None else _digest(first)}
                measure = partial(_found, name, config, budget, first)
                path = folder / f"search-{problem}-{name}-seed{seed}.json"
                found = kept(path, config, rules, Found, measure)
                first = first or found
                tests.setdefault(name, []).append(float(np.mean(found.test)))
                last.setdefault(name, []).append(found.validation[-1])
                record[f"{problem}/seed_{seed}/{name}"] = tests[name][-1]
        record |= _compared(problem, tests)
        record |= {f"{problem}/{name}/last_check": float(np.mean(rewards)) for name, rewards in last.items()}
    return record


def _digest(found: Found) -> str:
    """Of the table."""
    table = json.dumps([found.positions, found.weights, found.scale_dir])
    return hashlib.sha256(table.encode()).hexdigest()[:16]


def _compared(problem: str, tests: dict[str, list[float]]) -> Record:
    """Means over seeds, whose tables are the independent units, and what RDPO has above each other method."""
    record: Record = {}
    for name, values in tests.items():
        pairs = {"": student_mean(values)}
        if name != "rdpo":
            pairs["/rdpo_minus_this"] = student_mean(np.subtract(tests["rdpo"], values))
        for suffix, interval in pairs.items():
            found = asdict(interval).items()
            record |= {f"{problem}/{name}{suffix}/{key}": v if math.isfinite(v) else None for key, v in found}
    return record


def _found(name: str, config: RunConfig, budget: int, first: Found | None) -> Found:
    """Search, and draw the test prompts with the table that was best on the validation prompts.

    Args:
        name: "distilled" or one of METHODS.
        config: of the run.
        budget: training images.
        first: what distilling found: the start; None where this is that.
    """
    prompts = load_prompts(config.prompts, config.seed)
    with algorithm(config, prompts.train) as algo:
        if first is None:
            table = as_table(distil(config, prompts, algo))
        else:
            columns = (first.positions, first.weights, first.scale_dir)
            table = SolverTable(*(torch.tensor(c, dtype=torch.float64) for c in columns if c is not None))
            algo.rebase(table)

        def judge(table: SolverTable) -> float:
            return float(validate(config, prompts, algo, table, algo.policy_version).reward.mean())

        checks = [(0, table, judge(table))]
        if first is not None:
            method = _method(name, config, prompts, algo, table)
            images = 0
            while images + method.images <= budget:
                method.advance()
                images += method.images
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
    values: list[float] = next(iter(sampled.scores.values())).tolist()
    return values
