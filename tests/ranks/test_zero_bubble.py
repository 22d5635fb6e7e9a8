"""A zero-bubble pipeline gives the bits of 1f1b, and so the serial weights, whatever the paces by which its lists are
written."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.engine import bucket_maker
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.performance import LayerCost, LayerTimes, Machine
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology
from tests.ranks.test_parallel import NETWORKS, SHAPE, Trained, compare, layouts, name, serial

SIZE = MPI.COMM_WORLD.size
RANKS = (2, 3, 4, 5, 8)


def in_stages(network: Network) -> Iterator[Topology]:
    """The layouts of test_parallel that have several stages, and one with a stage for each rank."""
    count = network.weight_layers
    yield from (topology for topology in layouts(SIZE, network) if len(topology.stages) > 1)
    stages = min(SIZE, count)
    cuts = [i * count // stages for i in range(stages + 1)]
    yield Topology(1, tuple(Stage(*cut, 1 + (s == 0) * (SIZE - stages), 1) for s, cut in enumerate(pairwise(cuts))))


def machine(facts: list[LayerFacts], seed: int) -> Machine:
    """A machine on which layers take any times, so that lists differ from those of equal stages."""
    dice = random.Random(seed)

    def times() -> LayerTimes:
        forward, inputs, weights = (LayerCost(0.0, dice.uniform(1, 4), 0.0, 0.0) for _ in range(3))
        return LayerTimes(forward, LayerCost(0.0, inputs.row + weights.row, 0.0, 0.0), weights=weights)

    return Machine(layers={layer.name: times() for layer in facts}, latency=dice.choice([0.0, 1.0]))


def same(mine: Trained, other: Trained) -> None:
    assert mine.losses == other.losses
    assert mine.scores == other.scores
    for key, array in other.arrays.items():
        assert np.array_equal(mine.arrays[key], array), key


CASES = [
    pytest.param(
        network,
        topology,
        id=f"{network}-{name(topology)}",
        marks=() if (i + j) % 3 == 0 else pytest.mark.slow if (i + j) % 3 == 1 else pytest.mark.long,
    )
    for i, (network, layers) in enumerate(NETWORKS.items())
    for j, topology in enumerate(dict.fromkeys(in_stages(Network(layers, SHAPE))))
]


@pytest.mark.ranks(*RANKS)
@pytest.mark.parametrize(("network", "topology"), CASES)
def test_it_gives_the_bits_of_1f1b_and_the_serial_weights(network: str, topology: Topology) -> None:
    """It does with 5 micro-batches of 8 and 7 rows, and an epoch's last mini-batch of 12 rows; with batch norm,
    dropout and cols."""
    options: dict[str, Any] = {"micro_batches": 5}
    plain = Trained(World(), network, topology, **options)
    for seed, stored in ((1, None), (2, 2)):
        at = machine(Network(NETWORKS[network], SHAPE).facts, seed)
        mine = Trained(World(), network, topology, pipeline=choices.ZeroBubble(stored), machine=at, **options)
        if MPI.COMM_WORLD.rank == 0:
            same(mine, plain)
            compare(mine, serial(network, **options), 1e-12 if network != "resnet" else 1e-10)


@pytest.mark.ranks(*RANKS)
@pytest.mark.parametrize("network", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_between_nodes_and_in_parts(
    network: str, between_nodes: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients leave around rings in the last W, or are computed in parts from what the Ws have put."""
    count = Network(NETWORKS[network], SHAPE).weight_layers
    half = SIZE // 2
    topology = Topology(1, (Stage(0, count // 2, max(half, 1), 1), Stage(count // 2, count, SIZE - half, 1)))
    options: dict[str, Any] = {"clip_norm": None}
    with monkeypatch.context() as patched:
        patched.setattr(bucket_maker, "in_parts", lambda rows, sharers, *_: sharers > 1)
        parts = Trained(World(), network, topology, pipeline=choices.ZeroBubble(), **options)
        assert MPI.COMM_WORLD.allreduce(parts.in_parts, MPI.LOR) == (SIZE > 2)
    between_nodes(True)
    rings = Trained(World(), network, topology, pipeline=choices.ZeroBubble(), **options)
    if MPI.COMM_WORLD.rank == 0:
        for mine in (parts, rings):
            compare(mine, serial(network, **options), 1e-10)


@pytest.mark.ranks(2, 4)
def test_replicas_that_differ() -> None:
    """Gossip meets the same gradients at the same steps."""
    topology = Topology(SIZE // 2, (Stage(0, 2, 1, 1), Stage(2, 4, 1, 1)))
    options: dict[str, Any] = {
        "exchange": choices.Gossip(part=1.0, deadline="none"),
        "optimizer": specs.Sgd(momentum=0.9),
        "clip_norm": None,
        "rate": 0.01,
    }
    plain = Trained(World(), "mlp", topology, **options)
    mine = Trained(World(), "mlp", topology, pipeline=choices.ZeroBubble(), **options)
    if MPI.COMM_WORLD.rank == 0:
        same(mine, plain)
