"""A training moves between CPUs and GPUs, and to other layouts on the way: the serial result."""

from __future__ import annotations

import shutil
from typing import Literal

import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.plan.layouts import layers_layout
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.gpu.host.main import install
from tests.ranks.test_attach import NETWORK, SIZE, equal, plan, serial, start, train

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the host device needs g++"),
    pytest.mark.ranks(1, 2, 3, 4),
    pytest.mark.slow if MPI.COMM_WORLD.size == 2 else pytest.mark.long,
]


@pytest.mark.parametrize(("before", "after"), [("cpu", "gpu"), ("gpu", "cpu"), ("gpu", "gpu")])
def test_a_training_goes_on_on_another_device(before: Literal["cpu", "gpu"], after: Literal["cpu", "gpu"]) -> None:
    """Filters lie in another order there, and weights, statistics and the optimizer's state come along."""
    install(2)
    count = NETWORK.weight_layers
    engine = start(World(), plan(layers_layout(NETWORK.facts, SIZE, 10), device=before))
    train(engine, 0, 5)
    blocks = engine.detach()
    engine = start(
        World(),
        plan(
            Topology(
                1, (Stage(0, count, 1, min(SIZE, 3)),) if SIZE < 4 else (Stage(0, 2, 1, 2), Stage(2, count, 2, 1))
            ),
            device=after,
        ),
        blocks,
    )
    train(engine, 5, 10)
    found = engine.parameters()
    engine.close()
    if MPI.COMM_WORLD.rank == 0:
        equal(found, serial("adam"))
