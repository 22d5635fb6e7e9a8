"""The pipeline without flush gives what its definition says, on any layout; its steady state allocates nothing.

The definition is written out below (`Emulated`), in one process and without schedules, buffers or messages. Row counts
divide by nothing: mini-batches of 37, 37 and 12 rows in 1, 2, 3 or 5 micro-batches; epochs of three steps turn in the
middle of what is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Workspace
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine import bucket_maker
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
from nettorrent_mpi.plan.blocks import micro_batch
from nettorrent_mpi.plan.stream import versions
from nettorrent_mpi.plan.topology import Stage, Topology

DEVICE = make_device()
SIZE = MPI.COMM_WORLD.size
WINDOWS = (1, 5, 2, 3, 9)  # mini-batches from one drain to the next
SHAPE, CLASSES, SEED, BATCH = (7, 6, 2), 5, 5, 37
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.0, 3.5])

MLP = (
    specs.Flatten(),
    specs.Linear(11, activation="tanh"),
    specs.LayerNorm(),
    specs.Linear(13, activation="gelu"),
    specs.Dropout(0.3),
    specs.Linear(9, activation="sigmoid"),
    specs.BatchNorm(),
    specs.Linear(8, activation="tanh"),
    specs.Dropout(0.2),
    specs.Linear(CLASSES),
)
CNN = (
    specs.Conv2d(5, kernel=3, padding="same", bias=False),
    specs.BatchNorm(),
    specs.Relu(),
    specs.Dropout(0.2),
    specs.Conv2d(6, kernel=(3, 2), activation="leaky_relu"),
    specs.MaxPool2d(2),
    specs.Flatten(),
    specs.LayerNorm(),
    specs.Linear(8, activation="relu"),
    specs.Linear(CLASSES),
)
NETWORKS = {"mlp": MLP, "cnn": CNN}
# What stands before a batch norm has gradients that cancel but for rounding, which Adam would scale up to a step.
OPTIMIZERS = {"mlp": specs.Adam(lr=0.004), "cnn": specs.Sgd(lr=0.01, momentum=0.8, nesterov=True, weight_decay=0.01)}
RATES = {"mlp": 0.004, "cnn": 0.01}


class Case(NamedTuple):
    """What to train on which layout. Rates are such that rounding does not grow much in twenty steps."""

    network: str
    replicas: int
    grids: tuple[tuple[int, int], ...]  # (rows, cols) of each stage
    micro_batches: int
    aware: bool = False
    clip: float | None = None
    shared: bool = True  # may memory be shared?

    @property
    def cuts(self) -> list[int]:
        """The weight layers at which the stages begin, and the end."""
        count, stages = Network(NETWORKS[self.network], SHAPE).weight_layers, len(self.grids)
        return [i * count // stages for i in range(stages + 1)]

    @property
    def divides_rows(self) -> bool:
        return self.replicas > 1 or any(rows > 1 for rows, _ in self.grids)

    @property
    def topology(self) -> Topology:
        spans = pairwise(self.cuts)
        return Topology(self.replicas, tuple(Stage(*s, *grid) for s, grid in zip(spans, self.grids, strict=True)))

    def __str__(self) -> str:
        stages = "|".join(f"{rows}x{cols}" for rows, cols in self.grids)
        more = "-aware" * self.aware + "-clip" * bool(self.clip) + "-apart" * (not self.shared)
        return f"{self.network}-{self.replicas}*[{stages}]-{self.micro_batches}{more}"


class Result(NamedTuple):
    """The loss of each step; loss and accuracy of test and validation rows at each drain; the arrays at the end."""

    losses: list[float]
    scores: list[float]
    arrays: dict[str, np.ndarray]


def data() -> tuple[Any, Sampler]:
    options = DataOptions(rows=87 + 9, test_rows=29, shape=SHAPE, classes=CLASSES)
    dataset = open_dataset("synthetic", None, options=options)
    return dataset, Sampler(dataset.train.rows, seed=3, validation=0.1, batch_size=BATCH)


def counting_down(windows: Iterable[int]) -> list[int]:
    return [left for window in windows for left in range(window, 0, -1)]


def train(case: Case, lefts: Sequence[int], pipeline: specs.Spec | None = None) -> Result:
    """A training on all ranks, which run apart between drains. The arrays are there on rank 0."""
    network = Network(NETWORKS[case.network], SHAPE)
    options = Options(
        loss=specs.CrossEntropy(0.1, tuple(WEIGHTS)),
        optimizer=OPTIMIZERS[case.network],
        batch_size=BATCH,
        micro_batches=case.micro_batches,
        pipeline=pipeline or choices.Async(staleness_aware=case.aware),
        clip_norm=case.clip,
        dtype="float64",
        seed=SEED,
        augment=("flip",),
    )
    engine = Engine(World(), Plan(network, case.topology, options))
    engine.open_data(*data())
    assert engine.schedule.asynchronous == (pipeline is None and len(case.grids) > 1)
    if engine.schedule.asynchronous:
        held = versions(len(case.grids), case.micro_batches, engine.place.stage)
        assert len(engine.state.versions) == held - 1
    sums, scores = np.zeros((len(lefts), 5)), []
    for n, left in enumerate(lefts):
        engine.step(n, RATES[case.network] / (1 + n // 7), left)
        sums[n] = engine.metrics.take()
        if left == 1:
            for found in (Evaluator(engine).test(), Evaluator(engine).validation()):
                assert found is not None
                scores += found
    engine.world.all_reduce(sums)
    arrays = engine.parameters()
    engine.close()
    return Result((sums[:, 0] / (sums[:, 2] + sums[:, 4])).tolist(), scores, arrays)


class Emulated:
    """The definition. Stage s of S has d = S - s micro-batches in flight: of all micro-batches, of which M make a
    mini-batch, number g goes forward and back with the weights after floor((g - d + 1) / M) updates, wherever the
    pipeline is drained in between. Each mini-batch's gradients are added up and applied to every stage's newest
    weights."""

    def __init__(self, case: Case, windows: Iterable[int]):
        network = Network(NETWORKS[case.network], SHAPE)
        self.case = case
        self.stages = [network.stage(*layers, 1, 0) for layers in pairwise(case.cuts)]
        self.versions: list[list[dict[str, np.ndarray]]] = []  # of each stage
        for stage in self.stages:
            first = {key: initial_value(p, SEED, key.rpartition("/")[0]) for key, p in stage.parameters}
            self.versions.append([first])
        self.grads = [
            {key: np.zeros(p.shape) for key, p in stage.parameters if p.trainable} for stage in self.stages
        ]  # fmt: skip
        self.optimizer, self.loss = (
            make_optimizer(OPTIMIZERS[case.network]),
            make_loss(specs.CrossEntropy(0.1), WEIGHTS),
        )
        self.memory = [
            {key: self.optimizer.init(DEVICE, g.size, "float64") for key, g in grads.items()} for grads in self.grads
        ]
        self.dataset, self.sampler = data()
        self.inputs, self.targets = self.dataset.train.inputs(), self.dataset.train.targets()
        self.flip = Augment(("flip",), SHAPE)
        self.losses: list[float] = []
        self.scores: list[float] = []
        for window in windows:
            for _ in range(window):
                self.mini_batch()
            test = self.dataset.test
            self.evaluate(test.inputs(), test.targets(), np.arange(test.rows))
            self.evaluate(self.inputs, self.targets, self.sampler.validation_rows)
        arrays = {key: array for of_stage in self.versions for key, array in of_stage[-1].items()}
        self.result = Result(self.losses, self.scores, arrays)

    def mini_batch(self) -> None:
        step, count = len(self.losses), self.case.micro_batches
        rows = self.sampler.rows(step)
        x = np.empty((len(rows), *SHAPE))
        self.inputs.batch(rows, x, self.flip, self.sampler.augment_key(step))
        total, weight = 0.0, float(WEIGHTS[self.targets[rows]].sum())
        for m in range(count):
            span = micro_batch(len(rows), BATCH, count, m)
            if span.size:
                told = Context(
                    DEVICE.ops,
                    Workspace("float64"),
                    training=True,
                    accumulate=m > 0,
                    seed=SEED,
                    step=np.array([float(step)]),
                    rows=span,
                    count=span.size,
                    usual=BATCH // count,
                )
                x_m, targets = x[slice(*span)], self.targets[rows[slice(*span)]]
                total += self.micro_batch(step * count + m, x_m, targets, weight, told)
        self.losses.append(total / weight)
        self.update(step)

    def micro_batch(self, g: int, x: np.ndarray, targets: np.ndarray, weight: float, told: Context) -> float:
        """Adds to the gradients; gives the sum of the losses."""
        depth, flow, done = len(self.stages), x, []
        for s, stage in enumerate(self.stages):
            version = self.versions[s][max(0, (g - (depth - s) + 1) // self.case.micro_batches)]
            told.workspace = Workspace("float64")
            flow, saved = stage.forward(version, flow.copy(), told)
            done.append((version, saved, told.workspace))
        metrics = np.zeros(5)
        back = self.loss.forward(flow, targets, np.array([weight]), told, metrics)
        for s in reversed(range(depth)):
            version, saved, told.workspace = done[s]
            assert back is not None
            back = self.stages[s].backward(version, self.grads[s], saved, back.copy(), told)
        return float(metrics[0])

    def update(self, step: int) -> None:
        depth, case = len(self.stages), self.case
        norm = np.sqrt(sum(float((g**2).sum()) for grads in self.grads for g in grads.values()))
        scale = 1.0 if case.clip is None else min(1.0, case.clip / (norm + 1e-6))
        for s, grads in enumerate(self.grads):
            rate = RATES[case.network] / (1 + step // 7)
            if case.aware:
                rate /= 1 + (depth - 1 - s) / case.micro_batches  # the mean of the updates by which gradients are late
            newest = dict(self.versions[s][-1])  # running statistics have no versions: every forward moves them on
            for key, g in grads.items():
                newest[key] = newest[key].copy()
                numbers = np.array(self.optimizer.numbers(rate, step + 1))
                flat = newest[key].reshape(-1)
                self.optimizer.update(DEVICE.ops, flat, scale * g.reshape(-1), self.memory[s][key], numbers)
            self.versions[s].append(newest)

    def evaluate(self, inputs: Any, targets: np.ndarray, rows: np.ndarray) -> None:
        x = np.empty((len(rows), *SHAPE))
        inputs.batch(rows, x)
        for stage, of_stage in zip(self.stages, self.versions, strict=True):
            told = Context(DEVICE.ops, Workspace("float64"), training=False)
            x, _ = stage.forward(of_stage[-1], x.copy(), told)
        metrics = np.zeros(5)
        self.loss.forward(x, targets[rows], np.ones(1), told, metrics, gradient=False)
        self.scores += [metrics[0] / WEIGHTS[targets[rows]].sum(), metrics[1] / len(rows)]


def compare(mine: Result, reference: Result) -> None:
    np.testing.assert_allclose(mine.losses, reference.losses, rtol=1e-10)
    np.testing.assert_allclose(mine.scores, reference.scores, rtol=1e-10)
    assert mine.arrays.keys() == reference.arrays.keys()
    for key, array in reference.arrays.items():
        scale = np.abs(array).max() or 1.0
        np.testing.assert_allclose(mine.arrays[key] / scale, array / scale, rtol=0, atol=1e-10, err_msg=key)


ONE = (1, 1)
CASES = {
    2: [
        Case("mlp", 1, (ONE, ONE), 1),
        Case("cnn", 1, (ONE, ONE), 1, aware=True),
        Case("cnn", 1, (ONE, ONE), 2, clip=0.7),
        Case("mlp", 1, (ONE, ONE), 3, aware=True),
        Case("cnn", 1, (ONE, ONE), 5),
    ],
    3: [
        Case("mlp", 1, (ONE, ONE, ONE), 1),
        Case("cnn", 1, (ONE, ONE, ONE), 2, aware=True),
        Case("cnn", 1, ((2, 1), ONE), 1),
        Case("mlp", 1, ((2, 1), ONE), 3, shared=False),
        Case("mlp", 1, (ONE, (1, 2)), 2),
        Case("cnn", 1, ((1, 2), ONE), 5, clip=0.7),
    ],
    4: [
        Case("cnn", 1, (ONE, ONE, ONE, ONE), 1),
        Case("mlp", 1, (ONE, ONE, ONE, ONE), 2, aware=True),
        Case("mlp", 2, (ONE, ONE), 1),
        Case("cnn", 2, (ONE, ONE), 3, shared=False),
        Case("cnn", 1, ((1, 2), (2, 1)), 2),
        Case("mlp", 1, ((1, 2), (2, 1)), 1, shared=False),
        Case("mlp", 1, (ONE, (2, 1), ONE), 5),
    ],
    5: [
        Case("mlp", 1, (ONE,) * 5, 1),
        Case("mlp", 1, (ONE,) * 5, 3, aware=True),
        Case("cnn", 1, ((2, 1), (1, 2), ONE), 1, clip=0.7),
        Case("mlp", 1, ((1, 3), (2, 1)), 5),
        Case("cnn", 1, ((3, 1), (1, 2)), 2, shared=False),
    ],
    8: [
        Case("mlp", 2, (ONE, ONE, ONE, ONE), 1),
        Case("cnn", 2, ((2, 1), ONE, ONE), 2, aware=True),
        Case("cnn", 2, ((2, 1), ONE, ONE), 1, shared=False),
        Case("mlp", 2, ((1, 2), (2, 1)), 3),
        Case("mlp", 1, ((1, 3), (2, 2), ONE), 2, clip=0.7),
    ],
}


QUICK = [pytest.param(case, marks=() if i < 2 else pytest.mark.slow) for i, case in enumerate(CASES.get(SIZE, []))]


@pytest.mark.ranks(*CASES)
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_any_layout_gives_what_the_definition_says(case: Case, between_nodes: Callable[[bool], None]) -> None:
    if not case.shared:
        between_nodes(True)
    mine = train(case, counting_down(WINDOWS))
    if MPI.COMM_WORLD.rank == 0:
        compare(mine, Emulated(case, WINDOWS).result)


@pytest.mark.slow
@pytest.mark.ranks(3, 4, 5, 8)
@pytest.mark.parametrize("case", [case for case in CASES.get(SIZE, []) if case.shared and case.divides_rows], ids=str)
def test_gradients_in_parts(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a mini-batch are kept until its gradients are computed, and no later ones come among them."""
    monkeypatch.setattr(bucket_maker, "in_parts", lambda rows, sharers, *_: sharers > 1)
    mine = train(case, counting_down(WINDOWS))
    if MPI.COMM_WORLD.rank == 0:
        compare(mine, Emulated(case, WINDOWS).result)


@pytest.mark.parametrize(("network", "replicas", "rows"), [("mlp", SIZE, 1), ("cnn", 1, SIZE)])
def test_one_stage_is_never_late(network: str, replicas: int, rows: int) -> None:
    """What is asked for ahead is not done ahead, and the result is bit for bit that of a pipeline that flushes."""
    case = Case(network, replicas, ((rows, 1),), 3, aware=True, clip=0.7)
    lefts = counting_down([1, 4, 2])
    mine, flushed = train(case, lefts), train(case, lefts, choices.OneFOneB())
    assert mine.losses == flushed.losses
    assert mine.scores == flushed.scores
    for key, array in flushed.arrays.items():
        np.testing.assert_array_equal(mine.arrays[key], array, err_msg=key)


@pytest.mark.ranks(2, 3, 4, 5)
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("begun", [1, 4])
def test_a_drain_may_come_sooner_than_was_planned(micro_batches: int, begun: int) -> None:
    """A run that is told to stop finishes what it has begun, and one mini-batch more; then all goes on as ever."""
    case = Case("mlp", 1, (ONE,) * SIZE, micro_batches)
    ahead = -(-(SIZE - 1) // micro_batches)
    windows = (begun + 1 + ahead, 3, 2)
    lefts = [50] * begun + counting_down([1 + ahead, 3, 2])
    mine = train(case, lefts)
    if MPI.COMM_WORLD.rank == 0:
        compare(mine, Emulated(case, windows).result)


@pytest.mark.ranks(3)
def test_a_drain_cannot_come_before_what_was_begun() -> None:
    """Ranks that wait for messages which nobody will send would take later ones for them."""
    network = Network(MLP, SHAPE)
    options = Options(
        specs.CrossEntropy(), specs.Sgd(), batch_size=BATCH, micro_batches=1, pipeline=choices.Async(), dtype="float64"
    )
    engine = Engine(World(), Plan(network, Case("mlp", 1, (ONE,) * SIZE, 1).topology, options))
    engine.open_data(*data())
    engine.step(0, 0.01, 50)
    for n, (left, impossible) in enumerate([(3, (1, 2)), (2, (1,)), (1, (2, 50))], start=1):
        for other in impossible:
            with pytest.raises(AssertionError):
                engine.step(n, 0.01, other)
        with pytest.raises(AssertionError):
            Evaluator(engine).test()
        engine.step(n, 0.01, left)
    assert Evaluator(engine).test() is not None
    engine.close()
