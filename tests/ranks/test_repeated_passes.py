"""Passes that are repeated by their noted calls give the bits of those that layers execute."""

from __future__ import annotations

from typing import Any

import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.engine import bucket_maker
from nettorrent_mpi.engine.recorder import Recorder
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.topology import Topology
from tests.ranks.test_parallel import NETWORKS, SHAPE, Trained, layouts, name
from tests.ranks.test_zero_bubble import same

SIZE = MPI.COMM_WORLD.size
CASES = [
    pytest.param(
        network, topology, id=f"{network}-{name(topology)}", marks=() if (i + j) % 3 == 0 else pytest.mark.slow
    )
    for i, (network, layers) in enumerate(NETWORKS.items())
    for j, topology in enumerate(layouts(SIZE, Network(layers, SHAPE)))
]


@pytest.mark.ranks(1, 2, 3, 5)
@pytest.mark.parametrize(("network", "topology"), CASES)
@pytest.mark.parametrize("split", [False, True])
def test_they_give_the_bits_of_executed_ones(
    network: str, topology: Topology, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The networks have dropout, batch norm's sums over rows, cols, gradients in parts, a smaller last mini-batch."""
    if split and len(topology.stages) == 1:
        pytest.skip("there is no pipeline")
    monkeypatch.setattr(bucket_maker, "in_parts", lambda rows, sharers, *_: sharers > 1)
    repeated, found = Recorder.repeated, []

    def counted(self: Recorder, *asked: Any) -> Any:
        found.append(repeated(self, *asked))
        return found[-1]

    pipeline = choices.ZeroBubble() if split else choices.OneFOneB()
    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "repeated", counted)
        mine = Trained(World(), network, topology, pipeline=pipeline)
    assert sum(each is not None for each in found) > len(found) / 4
    monkeypatch.setattr(Recorder, "on", property(lambda self: False, lambda self, on: None))
    other = Trained(World(), network, topology, pipeline=pipeline)
    if MPI.COMM_WORLD.rank == 0:
        same(mine, other)
