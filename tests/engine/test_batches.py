"""A rank's batches: its rows of each micro-batch, gathered once, ahead or when needed; evaluations of given rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.data.from_arrays import from_arrays, unlabelled
from nettorrent_mpi.data.rows import Split, private
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine.batches import Batches
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.topology import Stage, Topology

Array = np.ndarray[Any, Any]
ROWS, BATCH, PIECES = 23, 8, 3
DATA = from_arrays(np.arange(ROWS, dtype=np.float64)[:, np.newaxis], np.arange(ROWS))


class Buffers(SimpleNamespace):
    """Buffers holds as much of a wiring as batches ask for; x is a buffer per number, the last one is `ahead`."""

    def __init__(self, topology: Topology, rank: int, exact: bool = True):
        place = topology.place(rank)
        super().__init__(topology=topology, place=place, exact=exact)
        self.is_first, self.is_last = place.stage == 0, place.stage == len(topology.stages) - 1
        self.memory = [np.full((BATCH, 1), np.nan) for _ in range(PIECES + 1)]

    def has_room(self, size: int) -> bool:
        return True

    def x(self, g: int, rows: int) -> Array:
        return self.memory[g % PIECES][:rows]

    def ahead(self, rows: int) -> Array:
        return self.memory[-1][:rows]

    def take_ahead(self, g: int) -> None:
        self.memory[g % PIECES], self.memory[-1] = self.memory[-1], self.memory[g % PIECES]


def made(wiring: Any, split: Split = DATA.train, sampler: Sampler | None = None) -> Batches:
    batches = Batches(split, wiring, private, sampler=sampler)
    batches.read_targets(lambda targets: None)
    return batches


def seen(batches: Batches, m: int, g: int) -> list[int]:
    rows: list[int] = batches.inputs(m, g)[:, 0].astype(int).tolist()
    return rows


@pytest.mark.parametrize("exact", [True, False])
def test_all_ranks_read_the_whole_mini_batch_once(exact: bool) -> None:
    topology, sampler = Topology(2, (Stage(0, 1, 2, 1),)), Sampler(ROWS, 1, 0.0, BATCH)
    ranks = [made(Buffers(topology, rank, exact), sampler=sampler) for rank in range(4)]
    for step in range(sampler.steps_per_epoch + 1):  # the third mini-batch has 7 rows
        read = []
        for m in range(PIECES):
            for batches in ranks:
                batches.begin_step(step, PIECES)
                read += seen(batches, m, m)
                assert batches.targets(m).tolist() == seen(batches, m, m)
        size = sampler.size(step)
        assert read == sampler.rows(step).tolist()
        assert [batches.batch_size(0) for batches in ranks] == [size] * 4
        assert sum(batches.weight(0) for batches in ranks[::2]) == (2 * size if exact else size)
        for batches in ranks:
            batches.weigh(2.0 ** np.arange(ROWS))
        weight = (2.0 ** sampler.rows(step)).sum()
        assert [batches.weight(2) for batches in ranks[:2]] == [ranks[0].weight(0)] * 2
        assert sum(batches.weight(1) for batches in ranks[::2]) == (2 * weight if exact else weight)
        for batches in ranks:
            batches.weigh(np.zeros(ROWS))
            assert batches.weight(0) == np.inf, "nothing is divided by 0"
            batches.weigh(None)
    assert size == BATCH
    assert ranks[0].rows(0).mine == Span(0, 1)


def test_what_is_loaded_is_not_gathered_again_and_outlives_an_evaluation() -> None:
    sampler = Sampler(ROWS, 1, 0.2, BATCH)
    batches = made(Buffers(Topology(1, (Stage(0, 1, 1, 1),)), 0), sampler=sampler)
    gathered: list[int] = []
    gather = batches._gather
    batches._gather = lambda m, x: (gathered.append(m), gather(m, x))[1]  # type: ignore[method-assign]
    batches.begin_step(0, PIECES)
    for m in range(PIECES):
        seen(batches, m, m)
        batches.load(m + 1)
    assert gathered == [0, 1, 2, 3]
    batches.begin_rows(sampler.validation_rows, 2)
    assert seen(batches, 0, 0) + seen(batches, 1, 1) == sampler.validation_rows.tolist()
    batches.begin_step(1, PIECES)
    gathered.clear()
    assert seen(batches, 0, 0) == sampler.rows(1)[:3].tolist()
    assert gathered == []


def test_an_evaluation_by_each_replica_alone_has_all_rows() -> None:
    topology = Topology(2, (Stage(0, 1, 1, 1),))
    rows = np.array([5, 2, 9, 11, 0])
    for alone, want in ((True, [[5, 2, 9], [5, 2, 9]]), (False, [[5, 2], [9]])):
        for rank in range(2):
            batches = made(Buffers(topology, rank))
            batches.begin_rows(rows, 2, alone=alone)
            assert seen(batches, 0, 0) == want[rank]
            assert batches.targets(0).tolist() == want[rank]


def test_only_the_first_stage_holds_inputs_and_only_the_last_targets() -> None:
    def refuse(*_: Any) -> Array:
        raise AssertionError

    topology = Topology(1, (Stage(0, 1, 1, 1), Stage(1, 2, 1, 1)))
    first, last = Buffers(topology, 0), Buffers(topology, 1)
    assert made(first)._targets is None
    assert Batches(DATA.train, last, refuse)._inputs is None  # type: ignore[arg-type]


def test_rows_without_targets() -> None:
    batches = made(
        Buffers(Topology(1, (Stage(0, 1, 1, 1),)), 0), unlabelled(np.array([[3.0], [8.0]]), DATA.train, np.float64)
    )
    batches.begin_rows(np.arange(2), 1)
    assert seen(batches, 0, 0) == [3, 8]
    with pytest.raises(AssertionError):
        batches.targets(0)
