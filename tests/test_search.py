"""Searches on a reward that is known: a table to be found."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

from epd_ray.errors import ConfigError, TableError
from epd_ray.policy.search import CmaSearch, RandomSearch, coordinates, space_of, tables_at
from epd_ray.solvers import SolverTable

START = SolverTable(torch.tensor([[0.3, 0.6], [0.2, 0.7]]).double(), torch.tensor([[0.5, 0.5], [0.8, 0.2]]).double())
HIDDEN = SolverTable(torch.tensor([[0.1, 0.9], [0.5, 0.6]]), torch.tensor([[0.9, 0.1], [0.3, 0.7]]))


def distance(tables):
    parts = zip((tables.positions, tables.weights), (HIDDEN.positions, HIDDEN.weights), strict=True)
    return sum(((a.float() - b) ** 2).sum((-1, -2)) for a, b in parts)


def searched(search, rounds):
    for _ in range(rounds):
        search.tell(-distance(search.ask()).numpy())
    return float(distance(search.favourite()))


def test_coordinates_are_undone():
    rows = coordinates(START)
    assert rows.shape == (2 * 3,)
    assert rows[0] == pytest.approx(np.log(0.3 / 0.4)) and rows[5] == pytest.approx(np.log(0.8 / 0.2))
    back = tables_at([rows, rows + 1], space_of(START))
    assert torch.allclose(back.positions[0], START.positions) and torch.allclose(back.weights[0], START.weights)
    assert back.batch == 2 and not torch.allclose(back.weights[1], START.weights)


def test_one_point_has_a_position_alone():
    table = SolverTable(torch.tensor([[0.5]]), torch.tensor([[1.0]]))
    assert coordinates(table) == pytest.approx([0.0])
    assert tables_at([[1.0]], space_of(table)).positions.item() == pytest.approx(1 / (1 + np.exp(-1)))


def test_cma_finds_the_table():
    assert searched(CmaSearch(START, 8, 0), 60) < 1e-3 < float(distance(START))


def test_random_search_gets_nearer():
    far = float(distance(START))
    assert searched(RandomSearch(START, 64, 0, 10.0), 1) < far
    assert RandomSearch(START, 4, 0, 10.0).favourite() is START


@pytest.mark.parametrize("make", [lambda s: CmaSearch(START, 4, s), lambda s: RandomSearch(START, 4, s, 10.0)])
def test_the_draws_follow_from_the_seed_alone(make):
    state = np.random.get_state()[1].copy()
    first, again, other = (make(seed).ask().positions for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (np.random.get_state()[1] == state).all()


def test_direction_scales_are_searched_too():
    start = replace(START, scale_dir=torch.tensor([[0.7, 0.7], [1.0, 1.1]]).double())
    back = tables_at([coordinates(start)], space_of(start)).row(0)
    assert torch.allclose(back.scale_dir, start.scale_dir) and torch.allclose(back.weights, start.weights)
    for search in (CmaSearch(start, 64, 0), RandomSearch(start, 64, 0, 30.0)):
        tables = search.ask()
        spread = tables.scale_dir.log().std(0)
        assert ((spread > 0.03) & (spread < 0.08)).all()  # both begin as RDPO does, with exp(-3)
        search.tell(np.arange(64.0))
        assert search.favourite().scale_dir.shape == (2, 2)


def test_a_table_with_time_scales_is_refused():
    with pytest.raises(TableError, match="scales that would be lost"):
        coordinates(replace(START, scale_time=torch.full((2, 2), 1.1).double()))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'epd-ray\[search\]'"):
        CmaSearch(START, 4, 0)
