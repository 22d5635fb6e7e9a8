"""Parallel equals serial: any layout and schedule on any number of ranks gives the weights of the serial run.

Every case trains 20 steps on all ranks and compares the whole arrays with those of an engine on one rank: equal to
1e-10 relative in float64, 1e-4 in float32; the loss of every step and the evaluation too. Row counts divide by
nothing: a mini-batch of 37 rows in 3 micro-batches, and a last one of 12.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine import bucket_maker
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.evaluation import Evaluator
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.layouts import layers_layout
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.scores import mean_scores
from nettorrent_mpi.plan.search import fast_layouts
from nettorrent_mpi.plan.topology import Stage, Topology

STEPS = 20
SHAPE = (7, 6, 2)
CLASSES = 5

MLP = (
    specs.Flatten(),
    specs.Linear(11, activation="tanh"),
    specs.LayerNorm(),
    specs.Linear(13, activation="gelu"),
    specs.Dropout(0.3),
    specs.Linear(9, activation="sigmoid"),
    specs.BatchNorm(),
    specs.Linear(CLASSES),
)
CNN = (
    specs.Conv2d(5, kernel=3, padding="same", activation="relu"),
    specs.BatchNorm(),
    specs.Dropout(0.2),
    specs.Conv2d(6, kernel=(3, 2), activation="leaky_relu"),
    specs.MaxPool2d(2),
    specs.Dropout(0.2),
    specs.Flatten(),
    specs.LayerNorm(),
    specs.Linear(8, activation="relu"),
    specs.Dropout(0.5),
    specs.Linear(CLASSES),
)
RESNET = (
    specs.Conv2d(5, padding="same", bias=False),
    specs.BatchNorm(),
    specs.Relu(),
    specs.Residual((
        specs.Conv2d(5, padding="same", bias=False), specs.BatchNorm(), specs.Relu(), specs.Conv2d(5, padding="same")
    )),
    specs.Relu(),
    specs.Residual(
        (
            specs.Conv2d(7, stride=2, padding="same", bias=False), specs.BatchNorm(), specs.Relu(),
            specs.Conv2d(7, padding="same", bias=False), specs.BatchNorm()
        ),
        (specs.Conv2d(7, kernel=1, stride=2, bias=False), specs.BatchNorm()),
    ),
    specs.Relu(),
    specs.GlobalAvgPool2d(),
    specs.Linear(CLASSES),
)  # fmt: skip
NETWORKS = {"mlp": MLP, "cnn": CNN, "resnet": RESNET}
# What stands before a batch norm has gradients that cancel but for rounding, which Adam would scale up to a step.
OPTIMIZERS = {
    "mlp": specs.Adam(lr=0.002),
    "cnn": specs.Sgd(lr=0.02, momentum=0.9, nesterov=True),
    "resnet": specs.Sgd(lr=0.02, momentum=0.9, weight_decay=0.01),
}


def layouts(ranks: int, network: Network) -> Iterator[Topology]:
    """All kinds of layouts of this many ranks: rows, cols, stages, replicas, their mixtures, uneven ones."""
    count = network.weight_layers
    units = min(facts.units for facts in network.facts)
    yield Topology(1, (Stage(0, count, ranks, 1),))
    if 1 < ranks <= units:
        yield Topology(1, (Stage(0, count, 1, ranks),))
    if ranks > 1:
        yield Topology(ranks, (Stage(0, count, 1, 1),))
        yield layers_layout(network.facts, ranks, 13)
        yield fast_layouts(network.facts, ranks, 37, lambda stages: 3, "1f1b")[0]
    given: dict[int, list[tuple[int, list[tuple[int, int]]]]] = {  # replicas, (rows, cols) of each stage
        3: [(1, [(2, 1), (1, 1)]), (1, [(1, 1), (1, 2)])],
        4: [(1, [(2, 2)]), (2, [(1, 1), (1, 1)]), (1, [(1, 2), (2, 1)]), (1, [(1, 1), (1, 1), (2, 1)])],
        5: [(1, [(2, 1), (1, 2), (1, 1)]), (1, [(1, 3), (2, 1)]), (1, [(3, 1), (1, 2)])],
        8: [
            (2, [(1, 2), (2, 1)]),
            (1, [(2, 2), (2, 2)]),
            (2, [(2, 1), (1, 1), (1, 1)]),
            (1, [(1, 3), (2, 2), (1, 1)]),
            (4, [(1, 1), (1, 1)]),
        ],
    }
    for replicas, grids in given.get(ranks, []):
        if len(grids) <= count:
            cuts = [i * count // len(grids) for i in range(len(grids) + 1)]
            yield Topology(replicas, tuple(Stage(cuts[i], cuts[i + 1], *grid) for i, grid in enumerate(grids)))


def name(topology: Topology) -> str:
    stages = "|".join(f"{s.layers}:{s.rows}x{s.cols}" for s in topology.stages)
    return f"{topology.replicas}*[{stages}]"


def marks(network: int, layout: int, pipeline: str | None) -> list[pytest.MarkDecorator]:
    """Every layout with one network and one pipeline always, with a second network in CI, with all in test-all."""
    turn = (layout + network) % len(NETWORKS)
    if turn == 0 and pipeline in (None, ("gpipe", "1f1b")[layout % 2]):
        return []
    return [pytest.mark.slow if turn < 2 else pytest.mark.long]


CASES = [
    pytest.param(
        network,
        topology,
        pipeline,
        id=f"{network}-{pipeline}-{name(topology)}",
        marks=marks(i, j, pipeline if topology.stages[1:] else None),
    )
    for i, (network, specs_) in enumerate(NETWORKS.items())
    for j, topology in enumerate(dict.fromkeys(layouts(MPI.COMM_WORLD.size, Network(specs_, SHAPE))))
    for pipeline in (("gpipe", "1f1b") if len(topology.stages) > 1 else ("1f1b",))
]


class Trained:
    """The arrays, the loss of each step and the scores of a training of 20 steps."""

    def __init__(
        self,
        world: World,
        name: str,
        topology: Topology,
        rate: float | None = None,
        rows: int = 87 + 9,
        machine: Machine | None = None,
        **options: Any,
    ):
        dataset = open_dataset(
            "synthetic", None, options=DataOptions(rows=rows, test_rows=29, shape=SHAPE, classes=CLASSES)
        )
        sampler = Sampler(dataset.train.rows, seed=3, validation=0.1, batch_size=37)
        network = Network(NETWORKS[name], SHAPE)
        arguments = {
            "loss": specs.CrossEntropy(0.1),
            "optimizer": OPTIMIZERS[name],
            "dtype": "float64",
            "clip_norm": 1.5,
            "augment": ("flip",),
        }
        engine = Engine(
            world,
            Plan(
                network,
                topology,
                Options(batch_size=37, seed=5, **({"micro_batches": 3} | arguments | options)),
                machine or Machine(),
            ),
        )
        engine.open_data(dataset, sampler)
        self.losses = []
        for n in range(STEPS):
            engine.step(n, rate or (0.002 if name == "mlp" else 0.02))
            self.losses.append(loss_of(engine))
        test, validation = Evaluator(engine).test(), Evaluator(engine).validation()
        assert test is not None
        assert validation is not None
        self.scores = [*test, *validation]
        self.arrays = engine.parameters()
        self.in_parts = engine.state.in_parts
        engine.close()


def loss_of(engine: Engine) -> float:
    """The mean loss of the rows trained on since the last call."""
    sums = np.array(engine.metrics.take())
    engine.world.all_reduce(sums)
    return mean_scores(*sums).loss


SERIAL: dict[Any, Trained] = {}


def serial(network: str, **options: Any) -> Trained:
    """The same training on this rank alone."""
    key = (network, *sorted(options.items()))
    if key not in SERIAL:
        topology = Topology(1, (Stage(0, Network(NETWORKS[network], SHAPE).weight_layers, 1, 1),))
        SERIAL[key] = Trained(World(MPI.COMM_SELF), network, topology, **options)
    return SERIAL[key]


def compare(mine: Trained, reference: Trained, tolerance: float) -> None:
    np.testing.assert_allclose(mine.losses, reference.losses, rtol=tolerance)
    np.testing.assert_allclose(mine.scores, reference.scores, rtol=tolerance)
    assert mine.arrays.keys() == reference.arrays.keys()
    for key, array in reference.arrays.items():
        scale = np.abs(array).max() or 1.0
        np.testing.assert_allclose(mine.arrays[key] / scale, array / scale, rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.parametrize(("network", "topology", "pipeline"), CASES)
def test_any_layout_gives_the_serial_weights(network: str, topology: Topology, pipeline: str) -> None:
    mine = Trained(World(), network, topology, pipeline=choices.PIPELINES[pipeline]())
    if MPI.COMM_WORLD.rank == 0:
        compare(mine, serial(network), 1e-10)


WEIGHTS: dict[str, Any] = {"balanced": "balanced", "given": (0.2, 3.0, 1.0, 0.0, 7.5)}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_class_weights_give_the_serial_weights(weights: str) -> None:
    """The loss is divided by the weights of the whole mini-batch, wherever its rows are."""
    options = {"loss": specs.CrossEntropy(0.1, WEIGHTS[weights]), "optimizer": OPTIMIZERS["cnn"], "rate": 0.02}
    for number, topology in enumerate(dict.fromkeys(layouts(MPI.COMM_WORLD.size, Network(MLP, SHAPE)))):
        mine = Trained(World(), "mlp", topology, pipeline=choices.PIPELINES[("gpipe", "1f1b")[number % 2]](), **options)
        if MPI.COMM_WORLD.rank == 0:
            compare(mine, serial("mlp", **options), 1e-12)
    if MPI.COMM_WORLD.rank == 0:
        plain = serial("mlp", **options | {"loss": specs.CrossEntropy(0.1)})
        assert not np.allclose(plain.losses, serial("mlp", **options).losses, rtol=1e-3)


@pytest.mark.parametrize(("rows", "network"), [(83, "mlp"), pytest.param(84, "cnn", marks=pytest.mark.slow)])
def test_a_last_mini_batch_of_one_row_or_two_gives_the_serial_weights(rows: int, network: str) -> None:
    """75 or 76 training rows: 37, 37 and 1 or 2."""
    facts, size = Network(NETWORKS[network], SHAPE).facts, MPI.COMM_WORLD.size
    for topology in (layers_layout(facts, size, 13), Topology(size, (Stage(0, len(facts), 1, 1),))):
        mine = Trained(World(), network, topology, rows=rows)
        if MPI.COMM_WORLD.rank == 0:
            compare(mine, serial(network, rows=rows), 1e-10)


@pytest.mark.parametrize("network", ["mlp", "cnn", pytest.param("resnet", marks=pytest.mark.slow)])
def test_float32(network: str) -> None:
    options = {"dtype": "float32", "optimizer": specs.Sgd(momentum=0.9), "clip_norm": None, "rate": 0.005}
    topology = layers_layout(Network(NETWORKS[network], SHAPE).facts, MPI.COMM_WORLD.size, 13)
    mine = Trained(World(), network, topology, **options)
    if MPI.COMM_WORLD.rank == 0:
        compare(mine, serial(network, **options), 1e-4)


@pytest.mark.ranks(2, 3, 4, 5, 8)
@pytest.mark.parametrize(
    ("network", "micro_batches"),
    [
        ("mlp", 3),
        pytest.param("mlp", 1, marks=pytest.mark.slow),
        pytest.param("cnn", 3, marks=pytest.mark.slow),
        pytest.param("cnn", 1, marks=pytest.mark.long),
    ],
)
def test_gradients_in_parts(network: str, micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every linear layer, however much larger its rows are than its weights."""
    monkeypatch.setattr(bucket_maker, "in_parts", lambda rows, sharers, *_: sharers > 1)
    some = False
    options = {"micro_batches": micro_batches}
    for topology in dict.fromkeys(layouts(MPI.COMM_WORLD.size, Network(NETWORKS[network], SHAPE))):
        mine = Trained(World(), network, topology, **options)
        some |= mine.in_parts
        if MPI.COMM_WORLD.rank == 0:
            compare(mine, serial(network, **options), 1e-10)
    assert some, "nobody computed in parts"


WAYS = {"rings": (True, None), "rings-clipped": (True, 1.5), "collectives": (False, 1.5)}
SLOW, LONG = pytest.mark.slow, pytest.mark.long
BETWEEN_NODES: dict[str, tuple[Any, ...]] = {
    "mlp": (SLOW, LONG, SLOW),
    "cnn": (LONG, (), LONG),
    "resnet": (LONG, LONG, SLOW),
}


@pytest.mark.ranks(2, 3, 4, 5)
@pytest.mark.parametrize(
    ("network", "around", "clip_norm"),
    [
        pytest.param(network, *WAYS[way], id=f"{network}-{way}", marks=mark)
        for network, marked in BETWEEN_NODES.items()
        for way, mark in zip(WAYS, marked, strict=True)
    ],
)
def test_without_shared_memory(
    network: str, around: bool, clip_norm: float | None, between_nodes: Callable[[bool], None]
) -> None:
    """Between nodes gradients and weights travel in messages."""
    between_nodes(around)
    ranks = MPI.COMM_WORLD.size
    grids = [Topology(1, (Stage(0, 4, ranks, 1),)), Topology(ranks, (Stage(0, 4, 1, 1),))]
    if ranks == 4:
        grids += [Topology(2, (Stage(0, 4, 1, 2),)), Topology(1, (Stage(0, 2, 2, 1), Stage(2, 4, 1, 2)))]
    if ranks == 5:
        grids.append(Topology(1, (Stage(0, 2, 3, 1), Stage(2, 4, 2, 1))))
    for topology in grids:
        mine = Trained(World(), network, topology, clip_norm=clip_norm)
        if MPI.COMM_WORLD.rank == 0:
            compare(mine, serial(network, clip_norm=clip_norm), 1e-10)
