"""A zero-bubble pipeline gives the bits of 1f1b with whatever else a training may have: replicas that differ, tiny
mini-batches, other kernels; and its checkpoints and copies are gone on from in other layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.evaluation import Evaluator
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.checkpoints import restore, saved
from tests.ranks.test_attach import BATCH, CLASSES, LAYERS, NETWORK, SHAPE, equal, name, serial, start, train
from tests.ranks.test_checkpoints import part
from tests.ranks.test_parallel import NETWORKS, Trained, compare
from tests.ranks.test_parallel import SHAPE as SHAPE_OF_PARALLEL
from tests.ranks.test_parallel import serial as serial_of
from tests.ranks.test_zero_bubble import machine, same

RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
COUNT = NETWORK.weight_layers


def stages(replicas: int, *grids: tuple[int, int], layers: int = COUNT) -> Topology:
    cuts = [i * layers // len(grids) for i in range(len(grids) + 1)]
    return Topology(replicas, tuple(Stage(cuts[i], cuts[i + 1], *grid) for i, grid in enumerate(grids)))


def plan(topology: Topology, pipeline: Any, seed: int, **options: Any) -> Plan:
    """A plan on a machine of any times."""
    chosen = {"loss": specs.CrossEntropy(0.1), "optimizer": specs.Adam(0.003), "batch_size": BATCH, "seed": 7}
    chosen |= {"micro_batches": 3, "augment": ("flip",), "dtype": "float64", "clip_norm": 1.5}
    made = Options(pipeline=pipeline, **(chosen | options))
    return Plan(Network(LAYERS, SHAPE), topology, made, machine(NETWORK.facts, seed))


ONE = (1, 1)
LAYOUTS = {4: stages(2, ONE, ONE), 5: stages(2, ONE, ONE), 8: stages(2, (1, 2), ONE, ONE)}
EXCHANGES: dict[str, Any] = {
    "elite": choices.Elite(every_samples=2 * BATCH),
    "tournament": choices.Elite(every_samples=3 * BATCH, mode="tournament"),
    "none": choices.Nothing(),
    "ring": choices.Gossip(pairing="ring", part=0.4, deadline="none", every=2),
    "push_sum": choices.Gossip(pairing="random", part=1.0, deadline="none", mix=choices.PushSumMix()),
    "topk": choices.Gossip(part=0.4, deadline="none", compress=choices.TopK(0.1)),
    "momentum": choices.Gossip(
        part=0.4, deadline="none", exact_every=3, slow_momentum=0.5, average=("parameters", "optimizer")
    ),
}


def apart(world: World, made: Plan) -> tuple[dict[Any, Array], list[Any]]:
    """Return what this rank holds after 12 steps, with a rest wherever the exchange wants one, and what it
    judged there."""
    engine = Engine(world, made)
    rows = open_dataset("synthetic", None, options=DataOptions(rows=80, test_rows=13, shape=SHAPE, classes=CLASSES))
    engine.open_data(rows, Sampler(rows.train.rows, 7, 0.1, BATCH, replicas=2, partition="disjoint"))
    told: list[Any] = []
    rest = 0
    for n in range(12):
        if n == rest:
            rest = min(engine.exchange.next_rest(n) or 12, 12)
        engine.step(n, 0.003, rest - n)
        if n + 1 == rest and isinstance(made.options.exchange, choices.Elite):
            told.append(engine.exchange.at_rest(n + 1, Evaluator(engine).compare))
    held = {holding: np.array(array) for holding, array in engine.blocks.held().items()}
    with engine.exchange.shown():
        told.append(Evaluator(engine).test())
    engine.close()
    return held, told


@pytest.mark.ranks(4, 5, 8)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("elite", "ring") else pytest.mark.slow if i % 2 else pytest.mark.long)
        for i, kind in enumerate(EXCHANGES)
    ],
)
def test_replicas_that_differ(kind: str) -> None:
    """Replicas meet, judge and merge what they would with 1f1b."""
    topology = LAYOUTS[SIZE]
    with part(topology.size) as world:
        if world is None:
            return
        options = {"exchange": EXCHANGES[kind], "clip_norm": None, "dtype": "float32"}
        expected, judged = apart(world, plan(topology, choices.OneFOneB(), 1, **options))
        assert kind not in ("elite", "tournament") or len(judged) > 4
        for seed, stored in ((1, None), (2, 2)):
            found, told = apart(world, plan(topology, choices.ZeroBubble(stored), seed, **options))
            assert told == judged
            assert found.keys() == expected.keys()
            for holding, array in expected.items():
                assert np.array_equal(found[holding], array, equal_nan=True), holding.name


def line(size: int, layers: int = COUNT) -> Topology:
    """A stage for each rank; the first has the ranks that are left over."""
    count = min(size, layers)
    return stages(1, (size - count + 1, 1), *[ONE] * (count - 1), layers=layers)


SPLIT, PLAIN = choices.ZeroBubble(), choices.OneFOneB()


def changes() -> Iterator[tuple[Topology, Any, Topology, Any]]:
    """Layouts and pipelines before and after: stages become fewer, more, others, replicas."""
    yield line(SIZE), SPLIT, stages(1, (SIZE - 1, 1), ONE), choices.ZeroBubble(2)
    yield stages(1, ONE, (1, SIZE - 1)), choices.ZeroBubble(3), line(SIZE), SPLIT
    if SIZE > 2:
        yield line(SIZE), SPLIT, line(SIZE - 1), PLAIN
        yield line(2), choices.Gpipe(), line(SIZE), SPLIT
    if SIZE > 3:
        yield stages(2, ONE, ONE), SPLIT, line(4), SPLIT
        yield line(4), PLAIN, stages(2, ONE, ONE), SPLIT


@pytest.mark.ranks(2, 3, 4, 5)
def test_checkpoints_go_on_in_any_layout(shared_path: Path) -> None:
    """The pipeline may change, too, and the lists are those of other paces: the serial result."""
    results: list[tuple[str, Mapping[str, Array]]] = []
    for number, (before, first, after, second) in enumerate(changes()):
        folder = shared_path / str(number)
        with part(before.size) as world:
            if world is not None:
                engine = start(world, plan(before, first, 3 + number))
                train(engine, 0, 5)
                saved(engine, folder, 5)
                engine.close()
        MPI.COMM_WORLD.Barrier()
        with part(after.size) as world:
            if world is not None:
                engine = start(world, plan(after, second, 4 + number))
                restore(engine, folder)
                assert engine.steps == 5
                train(engine, 5, 10)
                results.append((f"{name(before)} -> {name(after)}", engine.parameters()))
                engine.close()
    for where, arrays in results if RANK == 0 else []:
        equal(arrays, serial("adam"), where=where)


@pytest.mark.ranks(2, 3, 4, 5)
@pytest.mark.parametrize("network", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernels", ["numpy", "fastest"])
def test_micro_batches_without_rows(network: str, kernels: str) -> None:
    """75 training rows: mini-batches of 37, 37 and 1 row, in 5 micro-batches; with float32 and float64."""
    layers = Network(NETWORKS[network], SHAPE_OF_PARALLEL)
    topology = line(SIZE, layers.weight_layers)
    for dtype, tolerance in (("float64", 1e-10), ("float32", None)):
        options: dict[str, Any] = {"micro_batches": 5, "rows": 83, "kernels": kernels, "dtype": dtype}
        plain = Trained(World(), network, topology, **options)
        at = machine(layers.facts, 3)
        mine = Trained(World(), network, topology, pipeline=choices.ZeroBubble(), machine=at, **options)
        if RANK == 0:
            same(mine, plain)
            if tolerance:
                compare(mine, serial_of(network, **options), tolerance)
