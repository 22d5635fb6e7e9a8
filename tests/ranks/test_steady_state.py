"""The steady state allocates no arrays, pickles nothing and does not grow; the batch data is held once a node."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.evaluation import Evaluator
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.layouts import layers_layout
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.growth import growth, usage

SIZE = MPI.COMM_WORLD.size
LAYERS = (
    specs.Conv2d(16, padding="same", activation="relu"),
    specs.BatchNorm(),
    specs.MaxPool2d(2),
    specs.Conv2d(16, activation="relu"),
    specs.Dropout(0.3),
    specs.Flatten(),
    specs.Linear(64, activation="relu"),
    specs.LayerNorm(),
    specs.Linear(10),
)
SHAPE = (16, 16, 3)


STREAM = {  # rows and cols of the stages of a pipeline without flush, by ranks
    2: ((1, 1), (1, 1)),
    3: ((1, 1), (1, 1), (1, 1)),
    4: ((1, 2), (2, 1)),
    5: ((2, 1), (1, 1), (1, 1), (1, 1)),
}


def engine(topology: Topology, network: Network, *, micro_batches: int = 4, **options: Any) -> Engine:
    """An engine that trains on synthetic rows, 640 in batches of 64."""
    dataset = open_dataset("synthetic", None, options=DataOptions(rows=640, test_rows=64, shape=SHAPE, classes=10))
    made = Engine(
        World(),
        Plan(
            network,
            topology,
            Options(
                loss=specs.CrossEntropy(), optimizer=specs.Adam(), batch_size=64, micro_batches=micro_batches, **options
            ),
        ),
    )
    made.open_data(dataset, Sampler(640, 1, 0.0, 64))
    return made


def layouts() -> list[Topology]:
    network = Network(LAYERS, SHAPE)
    found = [layers_layout(network.facts, SIZE, 16), Topology(1, (Stage(0, 4, SIZE, 1),))]
    if 1 < SIZE <= 10:
        found.append(Topology(1, (Stage(0, 4, 1, SIZE),)))
    return found


def stages_in_line() -> Topology:
    grids = STREAM[SIZE]
    cuts = [i * 4 // len(grids) for i in range(len(grids) + 1)]
    return Topology(1, tuple(Stage(*layers, *grid) for layers, grid in zip(pairwise(cuts), grids, strict=True)))


GOSSIP = (
    choices.Gossip(part=0.5, deadline="none"),
    choices.Gossip(pairing="ring", part=0.5, deadline="none", mix=choices.LossMix()),
    choices.Gossip(pairing="finite", part=0.5, deadline="none", compress=choices.Int8()),
)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("exchange", GOSSIP, ids=["plain", "loss", "int8"])
def test_a_step_of_gossip_neither_allocates_nor_pickles(exchange: choices.Gossip) -> None:
    steady(Topology(SIZE, (Stage(0, 4, 1, 1),)), exchange=exchange, clip_norm=1.0)


@pytest.mark.ranks(*STREAM)
@pytest.mark.parametrize(("micro_batches", "shared"), [(4, True), (1, False)])
def test_a_step_without_flush_neither_allocates_nor_pickles(
    micro_batches: int, shared: bool, between_nodes: Callable[[bool], None]
) -> None:
    """Whether it fills the pipeline, keeps it full or drains it."""
    if not shared:
        between_nodes(True)
    pipeline = choices.Async()
    steady(stages_in_line(), left=[6, 5, 4, 3, 2, 1, 3, 2, 1], micro_batches=micro_batches, pipeline=pipeline)


@pytest.mark.ranks(*STREAM)
@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_step_of_split_passes_neither_allocates_nor_pickles(
    shared: bool, between_nodes: Callable[[bool], None]
) -> None:
    if not shared:
        between_nodes(True)
    steady(stages_in_line(), micro_batches=4, pipeline=choices.ZeroBubble())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("number", range(3))
def test_a_step_neither_allocates_nor_pickles(number: int, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy comes from ml_dtypes")
    if number >= len(layouts()):
        pytest.skip("no such layout of so few ranks")
    steady(layouts()[number], clip_norm=1.0, dtype=dtype)


@pytest.mark.ranks(2, 3, 4, 5)
@pytest.mark.parametrize(
    ("around", "clip_norm"),
    [
        pytest.param(True, 1.0, id="rings-clipped"),
        pytest.param(True, None, id="rings", marks=pytest.mark.slow),
        pytest.param(False, 1.0, id="collectives-clipped", marks=pytest.mark.slow),
        pytest.param(False, None, id="collectives", marks=pytest.mark.long),
    ],
)
def test_a_step_between_nodes_neither_allocates_nor_pickles(
    around: bool, clip_norm: float | None, between_nodes: Callable[[bool], None]
) -> None:
    between_nodes(around)
    grids = {4: Topology(2, (Stage(0, 4, 1, 2),)), 5: Topology(1, (Stage(0, 2, 3, 1), Stage(2, 4, 2, 1)))}
    steady(grids.get(SIZE, Topology(SIZE, (Stage(0, 4, 1, 1),))), clip_norm=clip_norm)


def steady(topology: Topology, *, left: Sequence[int] = (1,) * 7, **options: Any) -> None:
    """Nothing of the size of a layer's outputs is allocated after the first steps, and nothing is pickled. `left` are
    the steps left until the pipeline is drained, in each step looked at."""
    made = engine(topology, Network(LAYERS, SHAPE), **options)
    for n, more in enumerate([*range(8, 0, -1), *range(4, 0, -1)]):  # one epoch and two steps
        made.step(n, 0.001, more)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the steady state pickles")

    MPI.pickle.__init__(refuse, refuse)  # what every lower-case call of mpi4py uses
    try:
        with pytest.raises(AssertionError, match="pickles"):
            MPI.COMM_SELF.allgather(1)
        gc.collect()
        tracemalloc.start()
        for n, more in enumerate(left, start=12):
            made.step(n, 0.001, more)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    finally:
        MPI.pickle.__init__()
    # A micro-batch of the first layer's outputs is 16 x 16 x 16 x 16 x 4 = 262,144 bytes, or more, half of that in
    # bfloat16. NumPy's iterators take some tens of KiB for a moment.
    assert held < 30_000, held
    assert peak < 65_536 * made.state.dtype.itemsize, peak
    made.close()


@pytest.mark.ranks(1, 2, 3, 5)
def test_the_rows_of_a_step_are_gathered_in_the_one_before() -> None:
    """Each micro-batch once, the first of a step ahead of it: also where the ranks rest and evaluate in between."""
    network = Network(LAYERS, SHAPE)
    made = engine(layers_layout(network.facts, SIZE, 16), network)
    gather, gathered = made.train._gather, [0]

    def counted(*arguments: Any) -> None:
        gathered[0] += 1
        gather(*arguments)

    made.train._gather = counted  # type: ignore[method-assign]
    for n in range(12):
        made.step(n, 0.001)
        assert gathered[0] == (4 * (n + 1) + 1 if made.wiring.is_first else 0)
        if n % 3 == 0:
            Evaluator(made).test()
    made.close()


@pytest.mark.ranks(1, 2)
def test_a_thousand_steps_do_not_grow() -> None:
    layers = (specs.Flatten(), specs.Linear(32, activation="relu"), specs.Dropout(0.1), specs.Linear(10))
    network = Network(layers, SHAPE)
    made = engine(layers_layout(network.facts, SIZE, 16), network)
    windows = []
    for n in range(1100):
        made.step(n, 0.001)
        if n % 100 == 0:
            made.metrics.take()
            Evaluator(made).test()
        if n % 250 == 249:
            windows.append(usage())
    grown = growth(windows)
    assert max(grown.private, grown.files) < 64, windows  # KiB
    assert max(grown[2:]) <= 0, windows
    made.close()
