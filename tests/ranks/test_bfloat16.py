"""Layers compute in bfloat16 on CPU cores, and any layout gives the serial run's weights up to rounding.

Sums in another order differ in float32's last bits, which turns roundings to bfloat16; cols round their parts of the
inputs' gradients before these are added up. What that is worth is measured: by how far the serial run in bfloat16 is
from the one in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.ranks.test_parallel import NETWORKS, SHAPE, Trained, layouts, name, serial

pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy comes from ml_dtypes")

RANKS = MPI.COMM_WORLD.size
OPTIONS: dict[str, Any] = {"optimizer": specs.Sgd(momentum=0.9), "rate": 0.005}


def distance(some: Trained, others: Trained) -> tuple[float, float]:
    """Return the distance of two trainings: the norm of all weights' differences, relative to that of the weights, and
    the root mean square of their losses' differences."""
    change = np.concatenate([(some.arrays[key] - x).ravel() for key, x in others.arrays.items()])
    whole = np.concatenate([x.ravel() for x in others.arrays.values()])
    losses = np.array(some.losses) - np.array(others.losses)
    return float(np.linalg.norm(change) / np.linalg.norm(whole)), float(np.sqrt((losses**2).mean()))


def check(mine: Trained, network: str, **options: Any) -> None:
    """The training is not further from the serial one in bfloat16 than rounding explains."""
    if MPI.COMM_WORLD.rank:
        return
    assert all(array.dtype == np.float32 for array in mine.arrays.values())
    short, wide = (serial(network, dtype=dtype, **options) for dtype in ("bfloat16", "float32"))
    rounding = distance(short, wide)
    assert 1e-5 < rounding[0] < 1e-2
    found = distance(mine, short)
    assert found[0] < 3 * rounding[0]
    assert found[1] < 3 * rounding[1]


CASES = [
    pytest.param(
        network, topology, id=f"{network}-{name(topology)}", marks=() if (i + j) % 3 == 0 else pytest.mark.slow
    )
    for i, network in enumerate(NETWORKS)
    for j, topology in enumerate(dict.fromkeys(layouts(RANKS, Network(NETWORKS[network], SHAPE))))
]


@pytest.mark.parametrize(("network", "topology"), CASES)
def test_any_layout_gives_the_serial_weights_up_to_rounding(network: str, topology: Topology) -> None:
    pipeline = choices.ZeroBubble() if len(topology.stages) > 1 and network == "cnn" else choices.OneFOneB()
    mine = Trained(World(), network, topology, dtype="bfloat16", pipeline=pipeline, **OPTIONS)
    check(mine, network, **OPTIONS)


@pytest.mark.ranks(2, 3, 5)
@pytest.mark.parametrize("around", [True, False])
def test_gradients_and_weights_travel_between_nodes(around: bool, between_nodes: Callable[[bool], None]) -> None:
    """Gradients are float32, and the weights that are gathered are bytes to MPI: around rings, or by its own
    operations."""
    between_nodes(around)
    topology = Topology(1, (Stage(0, 4, RANKS, 1),))
    check(Trained(World(), "mlp", topology, dtype="bfloat16", **OPTIONS), "mlp", **OPTIONS)


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize(
    "exchange", [choices.Gossip(pairing="ring", part=1.0, deadline="none"), choices.Elite(every_samples=100)]
)
def test_replicas_exchange_weights_in_float32(exchange: Any) -> None:
    """Replicas that differ train as well as in float32, and what they exchange is not rounded."""
    topology = Topology(RANKS, (Stage(0, 4, 1, 1),))
    found = [
        Trained(World(), "mlp", topology, dtype=dtype, exchange=exchange, clip_norm=None, **OPTIONS)
        for dtype in ("bfloat16", "float32")
    ]
    if MPI.COMM_WORLD.rank == 0:
        assert all(array.dtype == np.float32 for array in found[0].arrays.values())
        assert any((array.view(np.uint32) & 0xFFFF).any() for array in found[0].arrays.values())
        assert distance(*found)[0] < 0.02
        np.testing.assert_allclose(found[0].losses, found[1].losses, rtol=0.03)
