"""GPUs give the CPU's weights: the layouts, schedules and networks of test_parallel.py on the host device.

Its kernels are those of kernels.cu; its streams run in any order that events allow, another one for each seed and rank;
its graphs replay what was captured; and the host cannot read its memory. Row counts divide by nothing, and a last
mini-batch is smaller, so that every run of compute is captured for two sizes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import nettorrent_mpi as nt
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.layouts import layers_layout
from nettorrent_mpi.plan.moves import Holding
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.gpu.host.main import install
from tests.gpu.host.runtime import HostRuntime
from tests.ranks.test_parallel import CASES, CLASSES, NETWORKS, OPTIMIZERS, SHAPE, WEIGHTS, Trained, compare, serial

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the host device needs g++"),
    pytest.mark.ranks(1, 2, 3, 4),
    *([pytest.mark.slow] if MPI.COMM_WORLD.size == 4 else []),  # left to CI: many layouts
]


# Of the layouts of test_parallel.py those of `make test`; `make test-all` has all, with every network and pipeline.
ON_GPUS = [case._replace(marks=[pytest.mark.long] if case.marks else []) for case in CASES]


def on_gpus(seed: int, network: str, topology: Topology, *, shared: bool = False, **options: Any) -> Trained:
    install(seed, shared=shared)
    return Trained(World(), network, topology, device="gpu", **options)


def check(mine: Trained, network: str, tolerance: float, **options: Any) -> None:
    if MPI.COMM_WORLD.rank == 0:
        compare(mine, serial(network, **options), tolerance)


@pytest.mark.parametrize(("network", "topology", "pipeline"), ON_GPUS)
def test_any_layout_gives_the_cpus_weights(network: str, topology: Topology, pipeline: str) -> None:
    check(on_gpus(1, network, topology, pipeline=choices.PIPELINES[pipeline]()), network, 1e-10)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 22))
@pytest.mark.parametrize("network", list(NETWORKS))
def test_any_order_of_work_gives_the_cpus_weights(network: str, seed: int) -> None:
    facts = Network(NETWORKS[network], SHAPE).facts
    check(on_gpus(seed, network, layers_layout(facts, MPI.COMM_WORLD.size, 13)), network, 1e-10)


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize(
    ("network", "micro_batches"), [("cnn", 5), ("resnet", 3), pytest.param("mlp", 7, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_split_passes_give_the_cpus_weights(network: str, micro_batches: int, seed: int) -> None:
    """A pass keeps what the gradients of weights need, whatever the order of work; graphs replay both halves."""
    options = {"micro_batches": micro_batches}
    topology = layers_layout(Network(NETWORKS[network], SHAPE).facts, MPI.COMM_WORLD.size, 13)
    assert len(topology.stages) > 1
    mine = on_gpus(seed, network, topology, pipeline=choices.ZeroBubble(), **options)
    check(mine, network, 1e-10, **options)


@pytest.mark.parametrize("network", ["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def test_float32(network: str) -> None:
    options = {"dtype": "float32", "optimizer": specs.Sgd(momentum=0.9), "clip_norm": None, "rate": 0.005}
    topology = layers_layout(Network(NETWORKS[network], SHAPE).facts, MPI.COMM_WORLD.size, 13)
    check(on_gpus(1, network, topology, **options), network, 1e-4, **options)


@pytest.mark.parametrize("weights", ["given", pytest.param("balanced", marks=pytest.mark.slow)])
def test_class_weights(weights: str) -> None:
    """Steps are captured once, though the weights of a mini-batch's rows, which the loss is divided by, are others in
    every step."""
    options = {"loss": specs.CrossEntropy(0.1, WEIGHTS[weights]), "optimizer": OPTIMIZERS["cnn"], "rate": 0.02}
    size, facts = MPI.COMM_WORLD.size, Network(NETWORKS["mlp"], SHAPE).facts
    for topology in dict.fromkeys((layers_layout(facts, size, 13), Topology(size, (Stage(0, len(facts), 1, 1),)))):
        check(on_gpus(1, "mlp", topology, **options), "mlp", 1e-12, **options)


@pytest.mark.ranks(2, 4)
def test_ranks_that_share_a_gpu(recwarn: pytest.WarningsRecorder) -> None:
    size, count = MPI.COMM_WORLD.size, Network(NETWORKS["cnn"], SHAPE).weight_layers
    topology = Topology(1, (Stage(0, 2, size // 2, 1), Stage(2, count, 1, size // 2)))
    check(on_gpus(1, "cnn", topology, shared=True), "cnn", 1e-10)


NARROW = (specs.Flatten(), specs.Linear(11, activation="relu"), specs.Linear(CLASSES))


@pytest.mark.parametrize("keeps_nan", [True, False])
def test_weights_that_are_nan_are_found(keeps_nan: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ReLU hides nothing, whatever the library makes of NaN."""
    monkeypatch.setattr(HostRuntime, "keeps_nan", keeps_nan)
    network, size, found = Network(NARROW, SHAPE), MPI.COMM_WORLD.size, []

    def spoil(blocks: Mapping[Holding, Array]) -> None:
        for holding, array in blocks.items():
            if holding.name.endswith("linear1/weight"):
                array[...] = np.nan

    for device in ("cpu", "gpu"):
        install(1)
        options = Options(specs.CrossEntropy(), specs.Sgd(), batch_size=37, micro_batches=3, device=device)
        engine = Engine(World(), Plan(network, layers_layout(network.facts, size, 13), options))
        dataset = open_dataset("synthetic", None, options=DataOptions(rows=87, shape=SHAPE, classes=CLASSES))
        engine.open_data(dataset, Sampler(dataset.train.rows, seed=3, validation=0.1, batch_size=37))
        for step in range(5):
            if step == 3:
                engine.blocks.load(spoil)
            engine.step(step, 0.01)
        at = engine.pipeline.divergence.found()
        found.append(MPI.COMM_WORLD.allgather(None if at is None else at[0]))
        engine.close()
    assert found[0] == found[1]
    assert 3 in found[0]


@pytest.mark.ranks(2, 3)
def test_reports_of_a_pipeline_without_flush_wait_for_no_gpu() -> None:
    """A GPU's launches may wait there for those of a neighbour's next step, whose host must not wait meanwhile."""
    install(1)
    rng = np.random.default_rng(1)
    data = rng.normal(size=(96, 12)), np.arange(96) % 3
    layers = [nt.Linear(16, activation="tanh"), nt.Linear(8, activation="tanh"), nt.Linear(3)]
    weights = {}
    for device in ("cpu", "gpu"):
        how = {"batch_size": 12, "micro_batches": 3, "dtype": "float64", "pipeline": "async", "report_every": 1}
        with nt.Trainer(layers, data, device=device, optimizer=nt.Sgd(0.05), **how) as trainer:
            records = list(trainer.train(epochs=3))
            assert len(records) == 24
            weights[device] = trainer.parameters()
    for key, array in weights["cpu"].items():
        np.testing.assert_allclose(weights["gpu"][key], array, rtol=0, atol=1e-10, err_msg=key)
