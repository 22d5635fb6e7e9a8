"""What metrics.jsonl tells of the seconds of many ranks."""

from __future__ import annotations

import json

import numpy as np

from nettorrent_mpi.engine.rank_seconds import MOST_RANKS, PARTS, Spent, line
from nettorrent_mpi.plan.topology import Stage, Topology


def test_what_is_taken_begins_anew() -> None:
    spent = Spent()
    spent.add(6_000_000, 1_000_000, 3_000_000)
    spent.add(1_000_000, 1_000_000, 0)
    assert spent.take() == [0.002, 0.002, 0.003]
    assert spent.take() == [0.0, 0.0, 0.0]


def test_many_ranks_are_told_by_swarm() -> None:
    topology = Topology(2, (Stage(0, 1, 300, 1), Stage(1, 2, 100, 2)))
    seconds = np.random.default_rng(1).uniform(0.1, 1, (topology.size, 3))
    seconds[701, 0] = 5
    told = line(seconds, topology)
    assert told is not None
    assert set(told) == {"slowest", "swarms"}
    assert told["slowest"] == 701
    assert len(json.dumps(told)) < 500
    for stage, swarm in enumerate(told["swarms"]):
        own = seconds[[rank for rank in range(1000) if topology.place(rank).stage == stage]]
        for part, name in enumerate(PARTS):
            np.testing.assert_allclose(swarm[name], [f(own[:, part]) for f in (np.min, np.mean, np.max)], rtol=5e-3)


def test_few_ranks_are_told_one_by_one() -> None:
    seconds = np.full((MOST_RANKS, 3), 0.123456)
    told = line(seconds, Topology(1, (Stage(0, 1, MOST_RANKS, 1),)))
    assert told == {"slowest": 0} | {name: [0.123] * MOST_RANKS for name in PARTS}
    assert line(np.zeros((2, 3)), Topology(2, (Stage(0, 1, 1, 1),))) is None, "a GPU's host knows nothing"
