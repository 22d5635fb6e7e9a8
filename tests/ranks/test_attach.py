"""Engines leave a world with what they learned and go on in another one, on other layouts and fewer ranks; several of
them live side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine import failover
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.evaluation import Evaluator
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as exchanges
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.layouts import layers_layout
from nettorrent_mpi.plan.recovery import LiveReplicas, Survivor
from nettorrent_mpi.plan.topology import Stage, Topology

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
SHAPE, CLASSES, BATCH = (6, 5, 2), 5, 29
LAYERS = (
    specs.Conv2d(5, padding="same", activation="relu"),
    specs.MaxPool2d(2),
    specs.Flatten(),
    specs.Linear(13, activation="tanh"),
    specs.BatchNorm(),
    specs.Dropout(0.2),
    specs.LayerNorm(),
    specs.Linear(11, activation="gelu"),
    specs.Linear(CLASSES),
)
NETWORK = Network(LAYERS, SHAPE)


def plan(topology: Topology, **options: Any) -> Plan:
    chosen = {"optimizer": specs.Adam(0.003), "clip_norm": 1.5, "dtype": "float64", "batch_size": BATCH, "seed": 7}
    chosen |= {"micro_batches": 3, "augment": ("flip",)}
    return Plan(NETWORK, topology, Options(loss=specs.CrossEntropy(0.1), **(chosen | options)))


def start(world: World, made: Plan, blocks: Any = None) -> Engine:
    engine = Engine(world, made, blocks)
    rows = open_dataset("synthetic", None, options=DataOptions(rows=80, test_rows=13, shape=SHAPE, classes=CLASSES))
    engine.open_data(rows, Sampler(rows.train.rows, 7, 0.1, BATCH))
    return engine


def train(engine: Engine, first: int, stop: int) -> None:
    for n in range(first, stop):
        engine.step(n, 0.003, stop - n)


def topologies(ranks: int) -> Iterator[Topology]:
    """Rows, cols, replicas, pipelines and mixtures of so many ranks."""
    count = NETWORK.weight_layers
    yield Topology(1, (Stage(0, count, ranks, 1),))
    if ranks > 1:
        yield Topology(1, (Stage(0, count, 1, ranks),))
        yield Topology(ranks, (Stage(0, count, 1, 1),))
        yield layers_layout(NETWORK.facts, ranks, 10)
    if ranks == 3:
        yield Topology(1, (Stage(0, 1, 1, 2), Stage(1, count, 1, 1)))
    if ranks == 4:
        yield Topology(2, (Stage(0, 2, 1, 1), Stage(2, count, 1, 1)))
        yield Topology(1, (Stage(0, count, 2, 2),))
    if ranks == 5:
        yield Topology(1, (Stage(0, 2, 2, 1), Stage(2, count, 1, 3)))
        yield Topology(1, (Stage(0, 1, 1, 1), Stage(1, 3, 1, 3), Stage(3, count, 1, 1)))
    if ranks == 8:
        yield Topology(2, (Stage(0, 1, 1, 2), Stage(1, count, 2, 1)))


def pairs() -> list[tuple[Topology, Topology]]:
    """(before, after): after has all ranks, or fewer."""
    every = {ranks: list(dict.fromkeys(topologies(ranks))) for ranks in range(1, SIZE + 1)}
    same = list(permutations(every[SIZE], 2))
    fewer = [(a, b) for ranks in range(1, SIZE) for i, b in enumerate(every[ranks]) for a in every[SIZE][i % 2 :: 3]]
    return same + fewer


def name(topology: Topology) -> str:
    return f"{topology.replicas}*[{'|'.join(f'{s.layers}:{s.rows}x{s.cols}' for s in topology.stages)}]"


SERIAL: dict[str, Mapping[str, Array]] = {}


def serial(key: str, **options: Any) -> Mapping[str, Array]:
    """The arrays after ten steps on this rank alone."""
    if key not in SERIAL:
        world = World(MPI.COMM_SELF)
        engine = start(world, plan(Topology(1, (Stage(0, NETWORK.weight_layers, 1, 1),)), **options))
        train(engine, 0, 10)
        SERIAL[key] = engine.parameters()
        engine.close()
        world.free()
    return SERIAL[key]


def equal(found: Mapping[str, Array], expected: Mapping[str, Array], tolerance: float = 1e-10, where: str = "") -> None:
    assert list(found) == list(expected), where
    for key, array in expected.items():
        scale = np.abs(array).max() or 1.0
        np.testing.assert_allclose(found[key] / scale, array / scale, rtol=0, atol=tolerance, err_msg=f"{where} {key}")


MANY = 20 if SIZE == 4 else 6  # pairs of layouts in CI
FEW = 3
SPREAD = sorted(range(len(pairs())), key=lambda i: i * 7 % 23 / 23)  # so that few are of many kinds


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(slice(0, FEW), id="few"),
        pytest.param(slice(FEW, MANY), id="many", marks=pytest.mark.slow),
        pytest.param(slice(MANY, None), id="rest", marks=pytest.mark.long),
    ],
)
def test_a_training_goes_on_with_any_layout_on_any_ranks(chosen: slice) -> None:
    """Parameters, running statistics and the optimizer's state come along: the serial result."""
    every = pairs()
    assert SIZE < 4 or len(every) >= 20
    found = [every[i] for i in SPREAD][chosen]
    results: list[tuple[str, Mapping[str, Array]]] = []
    for before, after in found:
        world = World()
        engine = start(world, plan(before))
        train(engine, 0, 5)
        blocks = engine.detach()
        part = MPI.COMM_WORLD.Split(0 if after.size > RANK else MPI.UNDEFINED)
        if part == MPI.COMM_NULL:
            blocks.give()
        else:
            fewer = World(part)
            engine.attach(fewer, plan(after), blocks)
            train(engine, 5, 10)
            arrays = engine.parameters()
            engine.close()
            fewer.free()
            part.Free()
            if RANK == 0:
                results.append((f"{name(before)} -> {name(after)}", arrays))
        world.free()
    for where, arrays in results:
        equal(arrays, serial("adam"), where=where)


GOSSIP = {
    "ring": exchanges.Gossip(pairing="ring", part=1.0, deadline="none"),
    "push_sum": exchanges.Gossip(pairing="exponential", part=1.0, deadline="none", mix=exchanges.PushSumMix()),
    "momentum": exchanges.Gossip(
        part=1.0, deadline="none", exact_every=3, slow_momentum=0.6, average=("parameters", "optimizer")
    ),
    "clock": exchanges.Gossip(pairing="ring", part=1.0, deadline="none", mix=exchanges.ClockMix(), withhold=0.3),
    "none": exchanges.Nothing(),
}
MEANS = {
    "push_sum": exchanges.Gossip(pairing="random", part=0.5, deadline="none", mix=exchanges.PushSumMix(), withhold=0.4),
    "int8": exchanges.Gossip(pairing="ring", part=0.5, deadline="none", compress=exchanges.Int8(), withhold=0.4),
    "seldom": exchanges.Gossip(part=0.5, deadline="none", every=2, withhold=0.4),
    "late": exchanges.Gossip(pairing="random", part=0.5, mix=exchanges.PushSumMix()),
    "none": exchanges.Nothing(),
}
INNER = {4: [[(1, 1), (1, 1)], [(2, 1)], [(1, 2)]], 8: [[(2, 1), (1, 2)], [(4, 1)], [(1, 1), (2, 1), (1, 1)]]}


def inner(replicas: int, grids: list[tuple[int, int]]) -> Topology:
    cuts = [i * NETWORK.weight_layers // len(grids) for i in range(len(grids) + 1)]
    return Topology(replicas, tuple(Stage(cuts[i], cuts[i + 1], *grid) for i, grid in enumerate(grids)))


@pytest.mark.ranks(4, 8)
@pytest.mark.slow
@pytest.mark.parametrize("kind", GOSSIP)
def test_replicas_that_differ_go_on_with_other_teams(kind: str) -> None:
    """Each replica's weights, optimizer and what its exchange remembers come along. Beside it a training that rests
    after the same steps, but stays as it is."""
    options: dict[str, Any] = {"exchange": GOSSIP[kind], "clip_norm": None}
    first, *others = [inner(2, grids) for grids in INNER[SIZE]]
    world = World()
    resting = start(world, plan(first, **options))
    train(resting, 0, 5)
    with resting.exchange.paused():
        pass
    train(resting, 5, 10)
    expected = [arrays_of(resting, replica) for replica in (0, 1)]
    resting.close()
    found = []
    for other in others:
        engine = start(world, plan(first, **options))
        train(engine, 0, 5)
        engine.attach(world, plan(other, **options), engine.detach())
        train(engine, 5, 10)
        found.append([arrays_of(engine, replica) for replica in (0, 1)])
        engine.close()
    world.free()
    for each in found:
        for mine, arrays in zip(each, expected, strict=True):
            equal(mine, arrays)


def arrays_of(engine: Engine, replica: int) -> Mapping[str, Array]:
    """On rank 0 the weights of a replica at rest."""
    with engine.exchange.shown(replica):
        return engine.parameters()


@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in MEANS if kind != "push_sum"] + ["push_sum"]
)
def test_another_number_of_replicas_begins_with_the_average(kind: str) -> None:
    """The average is that of all that replicas have: what one withholds, and what is under way, counts once."""
    world, exchange = World(), MEANS[kind]
    engine = start(world, plan(inner(4, [(1, 1)]), exchange=exchange))
    train(engine, 0, 5)
    assert kind in ("none", "late") or engine.exchange.rounds.is_open  # type: ignore[attr-defined]
    with engine.exchange.paused():
        own = {holding.name: np.array(array) for holding, array in engine.blocks.owned().items()}
    expected: dict[str, Array] = {}
    for key in engine.shapes():
        mass = own.get(f"exchange/mass/{key}", 1.0)
        value = own[f"parameters/{key}"] + own.get(f"exchange/withheld/{key}", 0.0)
        expected[key] = MPI.COMM_WORLD.allreduce(mass * value) / MPI.COMM_WORLD.allreduce(mass)
    engine.attach(world, plan(inner(2, [(1, 2)]), exchange=exchange), engine.detach())
    found = [arrays_of(engine, replica) for replica in (0, 1)]
    engine.close()
    world.free()
    for each in found if RANK == 0 else ():
        equal(each, expected)


@pytest.mark.ranks(3, 4)
def test_survivors_keep_what_the_replicas_have_in_common() -> None:
    """A replica is lost: the others keep their own weights, with what they have withheld, and slow momentum's memory,
    also where one of them was not yet through with an exact average."""
    options: dict[str, Any] = {"exchange": GOSSIP["momentum"], "clip_norm": None}
    world = World()
    engine = start(world, plan(inner(SIZE, [(1, 1)]), **options))
    train(engine, 0, 7)
    live = {holding: np.array(array) for holding, array in engine.blocks.live().items()}
    guard: Any = SimpleNamespace(topology=engine.topology, rank=RANK, copies=None)
    engine.close()
    memories = [holding for holding in live if holding.name.startswith("exchange/slow_momentum/")]
    assert len(memories) == len(NETWORK.stage(0, NETWORK.weight_layers, 1, 0).parameters) - 2  # running statistics
    assert any(live[holding].any() for holding in memories)
    if RANK == 0:
        for holding in memories:
            live[holding] *= 1 + 1e-3
    part = MPI.COMM_WORLD.Split(0 if RANK < SIZE - 1 else MPI.UNDEFINED)
    if part != MPI.COMM_NULL:
        fewer, replicas = World(part), tuple(range(SIZE - 1))
        survivors = [Survivor(rank, (), 7) for rank in replicas]
        blocks = failover._brought(fewer, failover.Held(guard, 7, live), survivors, LiveReplicas(replicas, 7))
        engine.attach(fewer, plan(inner(SIZE - 1, [(1, 1)]), **options), blocks)
        with engine.exchange.paused():
            found = engine.blocks.live()
        assert found.keys() == live.keys()
        for holding, array in live.items():
            common = holding.name.startswith("exchange/")
            expected = part.allreduce(array) / part.size if common else array
            np.testing.assert_allclose(found[holding], expected, rtol=0, atol=1e-12, err_msg=holding.name)
        train(engine, 7, 10)
        engine.close()
        fewer.free()
        part.Free()
    world.free()


def test_engines_live_side_by_side_and_are_closed_in_any_order() -> None:
    """On one world and on parts of it, with NumPy alone and with the fastest kernels, in turns."""
    world = World()
    half = MPI.COMM_WORLD.Split(RANK % 2)
    part = World(half)
    made: dict[str, tuple[Engine, World]] = {
        "rows": (start(world, plan(Topology(1, (Stage(0, NETWORK.weight_layers, SIZE, 1),)), kernels="numpy")), world),
        "layers": (start(world, plan(layers_layout(NETWORK.facts, SIZE, 10), pipeline=exchanges.Gpipe())), world),
        "part": (start(part, plan(layers_layout(NETWORK.facts, part.size, 10))), part),
    }
    for n in range(10):
        for engine, _ in made.values():
            engine.step(n, 0.003)
    found = [(where.rank, engine.parameters()) for engine, where in made.values()]
    for number, key in enumerate(["layers", "rows", "part"]):
        engine, _ = made.pop(key)
        engine.close()
        for other, _ in made.values():  # the others are not disturbed
            other.step(10 + number, 0.003)
            Evaluator(other).test()
    part.free()
    half.Free()
    world.free()
    for rank, arrays in found:
        if rank == 0:
            equal(arrays, serial("adam"))
