"""What the holders of a replica's blocks own is disjoint and complete, in every layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.nn.initial import initial_value
from nettorrent_mpi.plan import exchange_specs as exchanges
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.moves import whole, within
from nettorrent_mpi.plan.topology import Topology
from tests.ranks.test_attach import NETWORK, SIZE, name, plan, topologies

PARAMETERS = dict(NETWORK.stage(0, NETWORK.weight_layers, 1, 0).parameters)
KINDS: dict[str, dict[str, Any]] = {
    "exact": {"dtype": "float64"},
    "apart": {"dtype": "float32", "exchange": exchanges.Nothing(), "clip_norm": None},
    "slow_momentum": {
        "exchange": exchanges.Gossip(pairing="ring", part=1.0, deadline="none", exact_every=3, slow_momentum=0.6),
        "clip_norm": None,
    },
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16_apart": {"dtype": "bfloat16", "exchange": exchanges.Nothing(), "clip_norm": None},
}


def owners(made: Any, engine: Engine) -> dict[tuple[int, str], tuple[Array, Array]]:
    """By replica (0 where all are equal) and name: how many ranks own each element, and the sum of what they hold."""
    replica = 0 if made.exact else engine.place.replica
    mine = engine.state.owned_blocks(engine.exchange.memories())
    found: dict[tuple[int, str], tuple[Array, Array]] = {}
    for of, blocks in MPI.COMM_WORLD.allgather((replica, {h: np.array(block) for h, block in mine.items()})):
        for (key, box), block in blocks.items():
            shape = PARAMETERS["/".join(key.split("/")[-2:])].shape
            counts, values = found.setdefault((of, key), (np.zeros(shape, int), np.zeros(shape)))
            place = within(box, whole(shape))
            counts[place] += 1
            values[place] += block.astype(np.float64)
    return found


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("exact", "apart") else pytest.mark.slow) for kind in KINDS]
)
def test_every_element_has_one_owner(kind: str, between_nodes: Callable[[bool], None]) -> None:
    pytest.importorskip("ml_dtypes")
    if kind.startswith("bfloat16"):
        between_nodes(False)  # CPU cores do not compute with it, and no GPU's memory is shared
    world = World()
    every: list[Topology] = list(dict.fromkeys(topologies(SIZE)))
    for topology in every if kind == "exact" else every[-2:]:
        made = plan(topology, **KINDS[kind])
        if topology.replicas == 1 and "exchange" in KINDS[kind]:
            continue
        engine = Engine(world, made)
        names = defaultdict(set)
        weights = np.dtype(made.weights_dtype)
        assert {block.dtype for block in engine.state.owned_blocks({}).values()} <= {weights}
        for (replica, key), (counts, values) in owners(made, engine).items():
            where = f"{name(topology)} {replica} {key}"
            names[replica].add(key)
            assert (counts == 1).all(), where
            if key.startswith("parameters/"):
                parameter = PARAMETERS[key.partition("/")[2]]
                expected = initial_value(parameter, made.options.seed, key.split("/")[1]).astype(weights)
                np.testing.assert_array_equal(values, expected.astype(np.float64), where)
        trainable = {key for key, parameter in PARAMETERS.items() if parameter.trainable}
        remembered = {f"optimizer/{state}/{key}" for state in engine.optimizer.states for key in trainable}
        remembered |= {f"exchange/{each}/{key}" for each in engine.exchange.memories() for key in trainable}
        assert list(names) == list(range(1 if made.exact else topology.replicas))
        for found in names.values():
            assert found == {f"parameters/{key}" for key in PARAMETERS} | remembered
        engine.close()
    world.free()


@pytest.mark.ranks(2, 3)
def test_owned_blocks_are_views_of_the_live_arrays(between_nodes: Callable[[bool], None]) -> None:
    """Adam's two states, of weights in float32 where layers compute in bfloat16."""
    pytest.importorskip("ml_dtypes")
    between_nodes(False)
    world = World()
    for topology in topologies(SIZE):
        engine = Engine(world, plan(topology, dtype="bfloat16", optimizer=specs.Adam()))
        owned = engine.state.owned_blocks({})
        live = [flat.weights for flat in engine.state.flats]
        live += [array for bucket in engine.state.buckets for array in bucket.optimizer.values()]
        assert all(any(np.may_share_memory(block, array) for array in live) for block in owned.values())
        assert all(block.dtype == np.float32 for block in owned.values())
        engine.close()
    world.free()
