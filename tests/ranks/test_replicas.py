"""Replicas that train apart: each is the serial run on its own rows, and what is told of all of them is true.

The serial run is written out here with the layers, loss and optimizer alone: no pipeline, no state, no exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.rows import Dataset, Split
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.evaluation import Evaluator
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.initial import initial_value
from nettorrent_mpi.nn.layer import Context
from nettorrent_mpi.nn.losses import make_loss
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.nn.optimizers import make_optimizer
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.blocks import Span, micro_batch, span
from nettorrent_mpi.plan.topology import Stage, Topology

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
SHAPE, CLASSES = (5, 4, 2), 4
DEVICE = make_device()
BATCH, PIECES, STEPS = 37, 3, 7  # an epoch has mini-batches of 37, 37 and 12 rows, the last one whole
SEED, CLIP = 5, 1.5
NETWORKS = {
    "mlp": (
        specs.Flatten(),
        specs.Linear(11, activation="tanh"),
        specs.LayerNorm(),
        specs.Dropout(0.3),
        specs.Linear(9, activation="gelu"),
        specs.BatchNorm(),
        specs.Linear(CLASSES),
    ),
    "cnn": (
        specs.Conv2d(5, padding="same", bias=False),
        specs.BatchNorm(),
        specs.Relu(),
        specs.Conv2d(4, activation="tanh"),
        specs.Dropout(0.2),
        specs.Flatten(),
        specs.Linear(CLASSES),
    ),
}
OPTIMIZER = specs.Sgd(momentum=0.9, weight_decay=0.01)
RATE = 0.05
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.0, 3.5])
LOSS = specs.CrossEntropy(0.1, tuple(WEIGHTS))


def topology(replicas: int, *grids: tuple[int, int]) -> Topology:
    """(rows, cols) of each stage; three weight layers in all."""
    cuts = [i * 3 // len(grids) for i in range(len(grids) + 1)]
    return Topology(replicas, tuple(Stage(cuts[i], cuts[i + 1], *grid) for i, grid in enumerate(grids)))


LAYOUTS = {
    1: [],
    2: [topology(2, (1, 1))],
    3: [topology(3, (1, 1))],
    4: [
        topology(4, (1, 1)),
        topology(2, (2, 1)),
        topology(2, (1, 2)),
        topology(2, (1, 1), (1, 1)),
    ],
    5: [topology(5, (1, 1))],
    8: [
        topology(8, (1, 1)),
        topology(2, (2, 2)),
        topology(2, (1, 2), (1, 1), (1, 1)),
    ],
}[SIZE]


def name(layout: Topology) -> str:
    return f"{layout.replicas}*[{'|'.join(f'{s.layers}:{s.rows}x{s.cols}' for s in layout.stages)}]"


def data(replicas: int, partition: Any = "shared") -> tuple[Dataset, Sampler]:
    options = DataOptions(rows=96, test_rows=29, shape=SHAPE, classes=CLASSES)
    sampler = Sampler(96, 3, 0.1, BATCH, replicas=replicas, micro_batches=PIECES, partition=partition)
    return open_dataset("synthetic", None, options=options), sampler


def make(
    layout: Topology, network: str = "mlp", exchange: specs.Spec | None = None, partition: Any = "shared"
) -> Engine:
    engine = Engine(
        World(),
        Plan(
            Network(NETWORKS[network], SHAPE),
            layout,
            Options(
                loss=LOSS,
                optimizer=OPTIMIZER,
                batch_size=BATCH,
                micro_batches=PIECES,
                exchange=exchange or choices.Nothing(),
                clip_norm=CLIP,
                dtype="float64",
                seed=SEED,
                augment=("flip",),
            ),
        ),
    )
    engine.open_data(*data(layout.replicas, partition))
    return engine


class Serial:
    """One replica's training, all by itself."""

    def __init__(self, network: str, replicas: int, replica: int, partition: str):
        self.dataset, sampler = data(replicas, partition)
        self.validation_rows = sampler.validation_rows
        self.layers = Network(NETWORKS[network], SHAPE).stage(0, 3, 1, 0)
        keys = self.layers.parameters
        self.params = {key: initial_value(p, SEED, key.rpartition("/")[0]) for key, p in keys}
        grads = {key: np.zeros(p.shape) for key, p in keys if p.trainable}
        optimizer = make_optimizer(OPTIMIZER)
        states = {key: optimizer.init(DEVICE, grad.size, np.float64) for key, grad in grads.items()}
        inputs, targets = self.dataset.train.inputs(), self.dataset.train.targets()
        flip, loss = Augment(("flip",), SHAPE), make_loss(LOSS, WEIGHTS)
        self.losses: list[tuple[float, int]] = []  # sum and rows of each step
        self.rows_seen: set[int] = set()
        usual = BATCH // PIECES // replicas
        for n in range(STEPS):
            rows = sampler.rows(n)
            pieces = []
            for m in range(PIECES):
                cut = micro_batch(len(rows), BATCH, PIECES, m)
                part = span(cut.size, replicas, replica)
                pieces.append(Span(cut.start + part.start, cut.start + part.stop))
            count, total = sum(piece.size for piece in pieces), 0.0
            weight = sum(WEIGHTS[targets[rows[slice(*piece)]]].sum() for piece in pieces) or np.inf
            for m, piece in enumerate(pieces):
                mine = rows[slice(*piece)]
                self.rows_seen |= set(mine.tolist())
                ctx = Context(
                    DEVICE.ops, Workspace(np.float64), True, m > 0, SEED, np.array([float(n)]), piece, piece.size, usual
                )
                x, metrics = np.empty((piece.size, *SHAPE)), np.zeros(5)
                inputs.batch(mine, x, flip, sampler.augment_key(n))
                y, saved = self.layers.forward(self.params, x, ctx)
                dy = loss.forward(y, targets[mine], np.array([weight]), ctx, metrics)
                assert dy is not None
                self.layers.backward(self.params, grads, saved, dy, ctx)
                total += float(metrics[0])
            squares, scale = np.array([sum(float((grad**2).sum()) for grad in grads.values())]), np.zeros(1)
            DEVICE.ops.clip_scale(squares, CLIP, scale)
            numbers = np.array(optimizer.numbers(RATE, n + 1))
            for key, grad in grads.items():
                flat = self.params[key].reshape(-1)
                optimizer.update(DEVICE.ops, flat, grad.reshape(-1), states[key], numbers, scale)
            self.losses.append((total, count))

    def loss(self, params: dict[str, Array], split: Split, rows: Array) -> tuple[float, float]:
        """Loss and accuracy."""
        x = np.empty((len(rows), *SHAPE))
        split.inputs().batch(rows, x)
        ctx, metrics = Context(DEVICE.ops, Workspace(np.float64), training=False, count=len(rows)), np.zeros(5)
        y, _ = self.layers.forward(params, x, ctx)
        targets = split.targets()[rows]
        make_loss(LOSS, WEIGHTS).forward(y, targets, np.ones(1), ctx, metrics, gradient=False)
        return metrics[0] / WEIGHTS[targets].sum(), metrics[1] / len(rows)

    def validation(self, params: dict[str, Array]) -> tuple[float, float]:
        return self.loss(params, self.dataset.train, self.validation_rows)

    def test(self, params: dict[str, Array]) -> tuple[float, float]:
        assert self.dataset.test is not None
        return self.loss(params, self.dataset.test, np.arange(self.dataset.test.rows))


FOUND: dict[Any, Serial] = {}


def serial(network: str, replicas: int, replica: int, partition: str) -> Serial:
    key = (network, replicas, replica, partition)
    if key not in FOUND:
        FOUND[key] = Serial(*key)
    return FOUND[key]


def blocks(engine: Engine) -> dict[str, Array]:
    return {key: block.copy() for key, block in engine.state.params.items()}


def of_peers(engine: Engine, mine: Any) -> list[Any]:
    """What the same place in every replica has, from every replica."""
    place = engine.place
    found = engine.world.comm.allgather(mine)
    return [found[rank] for rank in engine.topology.peers(place.stage, place.row, place.col)]


def average(found: Sequence[dict[str, Array]]) -> dict[str, Array]:
    return {key: np.mean([each[key] for each in found], axis=0) for key in found[0]}


def same_bits(mine: dict[str, Array], other: dict[str, Array]) -> None:
    assert mine.keys() == other.keys()
    for key, array in other.items():
        np.testing.assert_array_equal(mine[key], array, err_msg=key)


def near(mine: dict[str, Array], other: dict[str, Array], tolerance: float) -> None:
    for key, array in mine.items():
        scale = max(float(np.abs(other[key]).max(initial=0)), 1e-300)
        np.testing.assert_allclose(array / scale, other[key] / scale, rtol=0, atol=tolerance, err_msg=key)


def of_team_are_alike(engine: Engine) -> None:
    """All who hold the same block, to the last bit."""
    for flat in engine.state.flats:
        whole = np.empty((flat.group.size, flat.size))
        flat.group.comm.Allgather(np.ascontiguousarray(flat.params), whole)
        np.testing.assert_array_equal(whole, np.broadcast_to(whole[0], whole.shape))


# -- exchange none -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "partition"), [("mlp", "shared"), ("cnn", "disjoint")])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_each_replica_is_a_serial_run(layout: Topology, network: str, partition: str) -> None:
    engine = make(layout, network, partition=partition)
    own = serial(network, layout.replicas, engine.place.replica, partition)
    for n, (loss, rows) in enumerate(own.losses):
        engine.step(n, RATE)
        sums = np.array(engine.metrics.take())[[0, 2]]
        engine.wiring.replica.all_reduce(sums)
        assert sums[1] == rows
        np.testing.assert_allclose(sums[0], loss, rtol=1e-10)
    indices = {key: parameter.index for key, parameter in engine.state.parameters.items()}
    near(engine.state.params, {key: own.params[key][index] for key, index in indices.items()}, 1e-10)
    of_team_are_alike(engine)
    found = of_peers(engine, (own.rows_seen, own.params))
    assert len({b"".join(map(bytes, params.values())) for _, params in found}) == layout.replicas
    if partition == "disjoint":
        assert sum(len(rows) for rows, _ in found) == len(set.union(*(rows for rows, _ in found)))
    check_scores(engine, own, [params for _, params in found])
    engine.close()


def check_scores(engine: Engine, own: Serial, all_params: list[dict[str, Array]]) -> None:
    """Each replica's scores, those of their average, and those of one that is shown."""
    scores = Evaluator(engine).compare()
    assert scores is not None
    assert len(scores) == len(all_params)
    np.testing.assert_allclose(scores[engine.place.replica], own.validation(own.params), rtol=1e-9)
    for best, params in ((None, average(all_params)), (1, all_params[1])):
        with engine.exchange.shown(best):
            found = (Evaluator(engine).test(), Evaluator(engine).validation())
            np.testing.assert_allclose(found, (own.test(params), own.validation(params)), rtol=1e-9)  # type: ignore[arg-type]
    assert Evaluator(engine).compare() == scores


# -- taking and giving back --------------------------------------------------------------------------------------------


def memories(engine: Engine) -> dict[str, Array]:
    """This rank's part of the optimizer's state."""
    buckets = enumerate(engine.state.buckets)
    return {f"{i}/{name}": array.copy() for i, bucket in buckets for name, array in bucket.optimizer.items()}


def check_shown(engine: Engine) -> None:
    before = blocks(engine)
    found = of_peers(engine, before)
    with engine.exchange.shown():
        near(engine.state.params, average(found), 2e-15)
        same_bits(blocks(engine), of_peers(engine, blocks(engine))[0])
        of_team_are_alike(engine)
    same_bits(blocks(engine), before)
    for best in {0, len(found) - 1}:
        with engine.exchange.shown(best):
            same_bits(blocks(engine), found[best])
        same_bits(blocks(engine), before)


def check_become(engine: Engine) -> None:
    own, mean = memories(engine), average(of_peers(engine, blocks(engine)))
    engine.exchange.become()
    near(engine.state.params, mean, 2e-15)
    same_bits(blocks(engine), of_peers(engine, blocks(engine))[0])
    same_bits(memories(engine), own)  # the optimizer's state stays


def check_adopt(engine: Engine) -> None:
    found = of_peers(engine, (blocks(engine), memories(engine)))
    replicas = len(found)
    for takes in (
        list(range(replicas)),
        [r - r % 2 for r in range(replicas)],  # pairs; an odd one keeps its own
        [replicas - 1 if r in (0, replicas - 1) else r for r in range(replicas)],
    ):
        engine.exchange.adopt(takes)
        found = [found[source] for source in takes]
        weights, optimizer = found[engine.place.replica]
        same_bits(blocks(engine), weights)
        same_bits(memories(engine), optimizer)


def check_become_the_best(engine: Engine) -> None:
    last = engine.exchange.count - 1
    weights, optimizer = of_peers(engine, (blocks(engine), memories(engine)))[last]
    engine.exchange.become(last)
    same_bits(blocks(engine), weights)
    same_bits(memories(engine), optimizer)


GOSSIP = choices.Gossip("ring", deadline="none", part=0.3)
IN_MEMORY = [
    (layout, exchange, shared)
    for i, layout in enumerate(LAYOUTS)
    for exchange in ((choices.Nothing(), GOSSIP) if i < 2 else (choices.Nothing(),))
    for shared in ((True, False) if layout.stages[0].rows > 1 else (True,))
]


@pytest.mark.parametrize(
    ("layout", "exchange", "shared"),
    [pytest.param(*case, id=f"{name(case[0])}-{case[1].kind}-{case[2] or 'messages'}") for case in IN_MEMORY],
)
def test_weights_of_all_or_one(
    layout: Topology, exchange: specs.Spec, shared: bool, between_nodes: Callable[[bool], None]
) -> None:
    """With shared memory, and as between nodes."""
    if not shared:
        between_nodes(True)
    engine = make(layout, exchange=exchange)
    checks = (check_shown, check_become, check_adopt, check_become_the_best)
    for n, check in enumerate(checks):
        engine.step(2 * n, RATE)
        engine.step(2 * n + 1, RATE)
        engine.exchange.settle()
        check(engine)
        of_team_are_alike(engine)
        engine.world.barrier()  # nobody trains on, and sends, while others still compare
    engine.step(2 * len(checks), RATE)
    engine.close()


@pytest.mark.ranks(2, 3, 5)
def test_push_sum_is_averaged_by_mass() -> None:
    engine = make(topology(SIZE, (1, 1)), exchange=choices.Gossip(mix=choices.PushSumMix(), deadline="none", part=0.3))
    engine.step(0, RATE)
    engine.exchange.settle()
    mass = 1.0 + RANK
    for array in engine.exchange.memories()["mass"]:
        array[...] = mass
    engine.exchange.recall(0)
    before = blocks(engine)
    masses = {key: 1.0 if "running" in key else mass for key in before}  # statistics have none
    told = engine.world.comm.allgather({key: (masses[key], array) for key, array in before.items()})
    mean = {
        key: sum(each[key][0] * each[key][1] for each in told) / sum(each[key][0] for each in told) for key in before
    }
    with engine.exchange.shown():
        near(engine.state.params, mean, 2e-15)
    same_bits(blocks(engine), before)
    engine.exchange.become()
    near(engine.state.params, mean, 2e-15)
    assert all((array == 1).all() for array in engine.exchange.memories()["mass"])
    engine.close()


def test_with_one_replica_there_is_nothing_to_do() -> None:
    engine = make(topology(1, (SIZE, 1)))
    engine.step(0, RATE)
    assert engine.exchange.count == 1
    before = blocks(engine)
    with engine.exchange.shown():
        same_bits(blocks(engine), before)
    with engine.exchange.shown(0):
        same_bits(blocks(engine), before)
    engine.exchange.become()
    engine.exchange.become(0)
    same_bits(blocks(engine), before)
    found, whole = Evaluator(engine).compare(), Evaluator(engine).validation()
    assert found is not None
    assert whole is not None
    np.testing.assert_allclose(found[0], whole, rtol=1e-14)
    engine.close()
