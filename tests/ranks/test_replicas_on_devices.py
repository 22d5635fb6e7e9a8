"""Training with gossip and elite on the host device gives the CPU's weights, in several layouts and orders of work."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.reports import Reports
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.scores import Scores
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.gpu.host.main import install

SIZE = MPI.COMM_WORLD.size
LAYERS = (
    specs.Linear(7, activation="tanh"),
    specs.BatchNorm(),
    specs.Linear(5, activation="relu"),
    specs.Linear(3),
)
ONE = choices.OneFOneB()
HALF = 4
STEPS = 2 * HALF

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the host device's kernels are compiled by g++")


def topology(replicas: int, *grids: tuple[int, int]) -> Topology:
    """(rows, cols) of each stage; three weight layers in all."""
    cuts = {1: (0, 3), 2: (0, 1, 3), 3: (0, 1, 2, 3)}[len(grids)]
    return Topology(replicas, tuple(Stage(a, b, *grid) for a, b, grid in zip(cuts, cuts[1:], grids, strict=False)))


LAYOUTS = {
    2: [topology(2, (1, 1))],
    3: [topology(3, (1, 1))],
    4: [topology(2, (2, 1)), topology(2, (1, 1), (1, 1)), topology(4, (1, 1)), topology(2, (1, 2))],
}.get(SIZE, [])


def gossip(pairing: str = "ring", **more: Any) -> choices.Gossip:
    return choices.Gossip(pairing, **{"deadline": "none", "part": 1.0, **more})


QUICK = {
    "ring, by loss": gossip(mix=choices.LossMix(), average=("parameters", "optimizer")),
    "best": choices.Elite(every_samples=111),
}
MORE = {
    "random, push-sum": gossip("random", mix=choices.PushSumMix()),
    "withheld": gossip(withhold=0.25),
    "in parts, at once": gossip(part=0.4, overlap=False),
    "exact, slow": gossip(exact_every=3, slow_momentum=0.5),
    "consensus": gossip(consensus=choices.Consensus(1e-9)),
    "tournament": choices.Elite(mode="tournament", every_samples=74),
    "apart": choices.Nothing(),
}


def name(layout: Topology) -> str:
    return f"{layout.replicas}*[{'|'.join(f'{s.layers}:{s.rows}x{s.cols}' for s in layout.stages)}]"


def trained(layout: Topology, exchange: Any, device: Any, pipeline: Any) -> tuple[dict[Any, np.ndarray], list[Any]]:
    """All blocks of this rank after some steps, a look at the average in between, and a restart; and what was told."""
    dataset = open_dataset("synthetic", None, options=DataOptions(rows=96, test_rows=8, shape=(6,), classes=3))
    options = Options(
        loss=specs.CrossEntropy(),
        optimizer=specs.Adam(),
        pipeline=pipeline,
        batch_size=37,
        micro_batches=2,
        exchange=exchange,
        dtype="float64",
        device=device,
        kernels="numpy",
        seed=3,
    )
    world, plan = World(), Plan(Network(LAYERS, (6,)), layout, options)
    engine = Engine(world, plan)
    engine.open_data(dataset, Sampler(96, 1, 0.0, 37))
    reports, told = Reports[int](engine), []
    for n in range(STEPS):
        left = HALF - n % HALF
        engine.step(n, 0.02 * (n + 1), left)
        rests = left == 1 or not engine.schedule.asynchronous
        reports.start(n)
        told += [(r.training, r.replicas, r.distance) for r in reports.ready(wait=rests)]
        if engine.exchange.next_rest(n) == n + 1 and rests:
            scores = [Scores(float((r * 5 + n) % SIZE), 0.5) for r in range(layout.replicas)]
            told.append(engine.exchange.at_rest(n + 1, lambda scores=scores: scores, 1.0))
        if n == HALF - 1:
            reports.close()
            engine.attach(world, plan, engine.detach())
            reports = Reports(engine)
    found = {f"{holding}": np.array(array) for holding, array in engine.blocks.held().items()}
    reports.close()
    engine.close()
    return found, told


def compare(
    layout: Topology, exchange: Any, seeds: Iterable[int], *, shared: bool = False, pipeline: Any = ONE
) -> None:
    expected, wanted = trained(layout, exchange, "cpu", pipeline)
    for seed in seeds:
        install(seed, shared=shared)
        found, told = trained(layout, exchange, "gpu", pipeline)
        assert found.keys() == expected.keys()
        for holding, values in expected.items():
            np.testing.assert_allclose(found[holding], values, rtol=1e-9, atol=1e-10, err_msg=f"{holding}, {seed}")
        assert len(told) == len(wanted)
        for here, there in zip(told, wanted, strict=True):
            if isinstance(there, tuple) and len(there) == 3:
                np.testing.assert_allclose(here[0], there[0], rtol=1e-9)
                np.testing.assert_allclose(here[1], there[1], rtol=1e-9)
                assert here[2] == pytest.approx(there[2], rel=1e-6, abs=1e-7)
            else:
                assert here == there


@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=name)
@pytest.mark.parametrize("kind", QUICK)
def test_replicas_agree_as_on_the_cpu(kind: str, layout: Topology) -> None:
    compare(layout, QUICK[kind], [1])


@pytest.mark.long
@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("kind", MORE)
def test_so_do_many_more(kind: str, layout: Topology) -> None:
    compare(layout, MORE[kind], [2])


@pytest.mark.long
@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_ranks_that_share_a_gpu(layout: Topology) -> None:
    """What NCCL would carry goes through the host's memory, where ranks wait for each other on the host."""
    compare(layout, QUICK["ring, by loss"], [3], shared=True)


@pytest.mark.long
@pytest.mark.ranks(4)
@pytest.mark.parametrize("kind", ["ring, by loss", "withheld"])
def test_without_flush(kind: str) -> None:
    compare(topology(2, (1, 1), (1, 1)), (QUICK | MORE)[kind], [4, 5], pipeline=choices.Async())


@pytest.mark.long
@pytest.mark.ranks(2, 3, 4)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
@pytest.mark.parametrize("kind", QUICK | MORE)
def test_over_many_orders(kind: str, layout: Topology) -> None:
    compare(layout, (QUICK | MORE)[kind], range(10, 20))
