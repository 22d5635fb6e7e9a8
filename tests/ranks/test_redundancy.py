"""Copies that ranks and their buddies keep are the state after their step, bit for bit, on whatever ranks and layout
they are put together."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.failover import Held, _brought
from nettorrent_mpi.engine.redundancy import Redundancy
from nettorrent_mpi.engine.resharding import Blocks
from nettorrent_mpi.plan import exchange_specs as exchanges
from nettorrent_mpi.plan.moves import Holding, whole, within
from nettorrent_mpi.plan.recovery import Kept, LiveReplicas, Snapshot, Survivor, buddies, layout_of_survivors, source
from nettorrent_mpi.plan.stream import staleness_bound
from nettorrent_mpi.plan.topology import Topology
from tests.ranks.test_attach import BATCH, NETWORK, RANK, SIZE, inner, name, plan, start, topologies

PARAMETERS = dict(NETWORK.stage(0, NETWORK.weight_layers, 1, 0).parameters)
KINDS: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "gpipe": {"pipeline": exchanges.Gpipe()},
    "zero_bubble": {"pipeline": exchanges.ZeroBubble()},
    "async": {"pipeline": exchanges.Async(), "clip_norm": None},
}
STEPS = 8


def owned(engine: Engine) -> dict[Holding, Array]:
    return {holding: np.array(block) for holding, block in engine.state.owned_blocks({}).items()}


def whole_arrays(group: Any, blocks: Mapping[Holding, Array]) -> dict[str, Array]:
    """The whole arrays of disjoint blocks, on all ranks of a communicator."""
    found: dict[str, Array] = {}
    for part in group.allgather(dict(blocks)):
        for (key, box), block in part.items():
            shape = PARAMETERS["/".join(key.split("/")[-2:])].shape
            found.setdefault(key, np.full(shape, np.nan))[within(box, whole(shape))] = block
    return found


def same(found: Mapping[str, Array], expected: Mapping[str, Array], where: str) -> None:
    assert found.keys() == expected.keys(), where
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array, f"{where} {key}")


def trained(engine: Engine, redundancy: Redundancy, steps: int) -> list[dict[Holding, Array]]:
    """Train so many steps; what this rank owned after each, from 0 on."""
    known = [owned(engine)]
    for n in range(steps):
        engine.step(n, 0.003, steps - n)
        redundancy.after(n + 1)
        known.append(owned(engine))
    return known


def losses(topology: Topology) -> list[set[int]]:
    """Ranks to lose at once, none of them another's buddy: the first rank, and the largest of such sets."""
    keepers = buddies([0] * topology.size)
    fits = [set(lost) for n in range(1, SIZE) for lost in combinations(range(SIZE), n)]
    fits = [lost for lost in fits if not any(keepers[rank] in lost for rank in lost)]
    return [fits[0], fits[-1]] if fits else []


@pytest.mark.ranks(2, 3, 4, 5)
@pytest.mark.parametrize(
    ("kind", "every"),
    [
        ("1f1b", 1),
        pytest.param("1f1b", 5, marks=pytest.mark.slow),
        pytest.param("gpipe", 1, marks=pytest.mark.long),
        pytest.param("gpipe", 5, marks=pytest.mark.long),
        pytest.param("zero_bubble", 1, marks=pytest.mark.slow),
        pytest.param("zero_bubble", 5, marks=pytest.mark.long),
        pytest.param("async", 1, marks=pytest.mark.slow),
        pytest.param("async", 5, marks=pytest.mark.long),
    ],
)
def test_copies_are_the_state_after_their_step(kind: str, every: int) -> None:
    """Survivors put the state together, in their own layout, from their own copies and those of the lost ranks."""
    every_layout = list(dict.fromkeys(topologies(SIZE)))
    for topology in every_layout[-1:] if (kind, every) == ("1f1b", 1) else every_layout[-2:]:  # few in CI's first part
        world = World()
        engine = start(world, plan(topology, dtype="float32", **KINDS[kind]))
        redundancy = Redundancy(engine, every)
        states = trained(engine, redundancy, STEPS)
        redundancy.close()
        kept = redundancy.kept()
        latest = max(k.step for k in kept if k.rank == RANK)
        assert latest == STEPS // every * every
        told = MPI.COMM_WORLD.allgather((kept, {k: redundancy.arrays(k) for k in kept}, states))
        for copies, arrays, _ in told:
            for each in copies:
                expected = told[each.rank][2][each.step]
                assert arrays[each].keys() == {h for h, block in expected.items() if block.size}
                assert all((block == expected[holding]).all() for holding, block in arrays[each].items())
        for lost in losses(topology):
            goes_on(topology, redundancy, lost, [state for _, _, state in told], kind, every)
        engine.close()
        world.free()


def goes_on(
    topology: Topology,
    redundancy: Redundancy,
    lost: set[int],
    states: list[list[dict[Holding, Array]]],
    kind: str,
    every: int,
) -> None:
    """Let the others go on; their state is the one after the step that they agree on."""
    part = MPI.COMM_WORLD.Split(MPI.UNDEFINED if RANK in lost else 0)
    if part == MPI.COMM_NULL:
        return
    world = World(part)
    survivors: list[Survivor] = part.allgather(Survivor(RANK, redundancy.kept()))
    found = source(topology, False, survivors)
    assert isinstance(found, Snapshot)
    assert found.step >= STEPS - every
    options = KINDS[kind]
    pipeline = options["pipeline"].kind if "pipeline" in options else "1f1b"
    new = layout_of_survivors(
        NETWORK.facts, topology, world.size, 1, BATCH, lambda stages, replicas: 3, pipeline, exact=True
    )
    arrays: dict[Holding, Array] = {}
    for bring in found.bring:
        if bring.survivor == world.rank:
            arrays |= redundancy.arrays(Kept(bring.step, bring.rank))
    blocks = Blocks(world, arrays, 1, found.step)
    engine = Engine(world, plan(new, dtype="float32", **options), blocks)
    assert engine.steps == found.step
    expected = {h: block for rank in states for h, block in rank[found.step].items()}
    where = f"{name(topology)} -> {name(new)} without {lost}"
    late = kept_late(engine.topology, engine.options.micro_batches) if kind == "async" else set()
    wanted = {k: array for k, array in whole_arrays(MPI.COMM_SELF, expected).items() if not old(k) or layer(k) in late}
    same(whole_arrays(part, owned(engine)), wanted, where)
    engine.close()
    world.free()
    part.Free()


def old(key: str) -> bool:
    return key.startswith("versions/")


def layer(key: str) -> str:
    return key.split("/")[-2]


def kept_late(topology: Topology, micro_batches: int) -> set[str]:
    """The layers of whose weights a layout keeps earlier versions."""
    stages = topology.stages
    late = [stage for s, stage in enumerate(stages) if staleness_bound(len(stages), micro_batches, s)]
    return {layer(key) for stage in late for key, _ in NETWORK.stage(stage.first, stage.stop, 1, 0).parameters}


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "exchange",
    [
        exchanges.Nothing(),
        pytest.param(exchanges.Elite(every_samples=60), marks=pytest.mark.slow),
        pytest.param(exchanges.Gossip(pairing="ring", part=1.0, deadline="none"), marks=pytest.mark.slow),
    ],
    ids=lambda exchange: exchange.kind,
)
def test_replicas_that_differ_have_copies_within_each(exchange: Any) -> None:
    """A replica that is slower than the other is not waited for; the steps of both may differ."""
    topology = inner(2, [(1, 1), (1, 1)])
    world = World()
    engine = start(world, plan(topology, exchange=exchange, clip_norm=None))
    redundancy = Redundancy(engine, 2)
    mine = engine.place.replica
    states = trained(engine, redundancy, 4 if mine or exchange.kind != "none" else 6)
    redundancy.close()
    told = MPI.COMM_WORLD.allgather((Survivor(RANK, redundancy.kept()), states))
    found = source(topology, True, [told[rank][0] for rank in (1, 2)])
    steps = [6 if exchange.kind == "none" else 4, 4]
    assert isinstance(found, Snapshot)
    assert found.replicas == (0, 1)
    assert [bring.step for bring in found.bring] == [steps[topology.place(bring.rank).replica] for bring in found.bring]
    for bring in found.bring:
        if (1, 2)[bring.survivor] == RANK:
            copy = redundancy.arrays(Kept(bring.step, bring.rank))
            expected = told[bring.rank][1][bring.step]
            assert all((block == expected[holding]).all() for holding, block in copy.items())
    engine.close()
    world.free()


@pytest.mark.ranks(5)
def test_live_replicas_go_on_bit_for_bit_without_a_rank_that_has_no_place() -> None:
    """The first of three replicas of two ranks loses its first rank: its other rank, the first survivor, hands over
    what it holds with the others, and they go on alone."""
    before, after, step = inner(3, [(1, 1), (1, 1)]), inner(2, [(1, 1), (1, 1)]), 4
    options = plan(after, exchange=exchanges.Nothing(), clip_norm=None)
    part = MPI.COMM_WORLD.Split(0 if RANK else MPI.UNDEFINED)
    live: dict[Holding, Array] = {}
    if RANK:
        trained_on = World(part)
        engine = start(trained_on, options)
        for n in range(step):
            engine.step(n, 0.003, step - n)
        live = owned(engine)
        engine.close()
        trained_on.free()
        part.Free()
    world = World()
    found = source(before, True, [Survivor(old, (), step if old > 1 else None) for old in range(1, 6)])
    assert found == LiveReplicas((1, 2), step)
    everyone = world.keep([1, 2, 3, 4])
    assert (world.size, everyone.size) == (4 if RANK else 5, 5)
    guard: Any = SimpleNamespace(topology=before, rank=RANK + 1)
    blocks = _brought(everyone, Held(guard, step, live), [], found)
    if RANK:
        engine = Engine(world, options, blocks)
        assert engine.steps == step
        now = owned(engine)
        assert now.keys() == live.keys()
        assert all((block == live[holding]).all() for holding, block in now.items())
        engine.close()
    else:
        blocks.give(2)
    world.agree()
    if RANK:
        world.free()
    everyone.comm.Free()
