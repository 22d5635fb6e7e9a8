"""The set-up of a world and an engine makes a number of collective calls that grows neither with the ranks nor with the
layout."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.plan import exchange_specs as exchanges
from nettorrent_mpi.plan.topology import Topology
from tests.ranks.test_attach import SIZE, name, plan, start, topologies

MAKING = ("Dup", "Split", "Split_type", "Create_group")
OTHERS = ("Allgather", "Allreduce", "Barrier", "Bcast", "allgather", "bcast")
# Of a rank, in any layout on any number of ranks: communicators made, and all other collective calls.
MOST_MADE, MOST_CALLS = 10, 36
EXCHANGES = {"exact": exchanges.Allreduce(), "gossip": exchanges.Gossip(), "none": exchanges.Nothing()}
COUNTS: Counter[str] = Counter()


class Counting(MPI.Intracomm):
    """A Counting communicator counts the collective calls of a rank, and makes others that do."""


def _counted(what: str) -> Any:
    original = getattr(MPI.Intracomm, what)

    def call(self: Counting, *arguments: Any, **named: Any) -> Any:
        COUNTS[what] += 1
        found = original(self, *arguments, **named)
        return Counting(found) if what in MAKING and found != MPI.COMM_NULL else found

    return call


for each in (*MAKING, *OTHERS):
    setattr(Counting, each, _counted(each))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("topology", list(topologies(SIZE)), ids=name)
@pytest.mark.ranks(2, 3, 5)
def test_collective_calls_do_not_grow(topology: Topology, exchange: str) -> None:
    COUNTS.clear()
    world = World(Counting(MPI.COMM_WORLD))
    engine = start(world, plan(topology, exchange=EXCHANGES[exchange]))
    counted = Counter(COUNTS)
    engine.close()
    world.free()
    made = sum(counted[what] for what in MAKING)
    print(topology, exchange, made, sum(counted.values()) - made, counted)  # for `pytest -s`
    assert counted["Dup"] >= 2  # of the world and of the engine's everyone: they are counted
    assert made <= MOST_MADE, counted
    assert sum(counted.values()) - made <= MOST_CALLS, counted
