"""Ranks that lie unevenly on hosts, so that some teams share memory and others do not, give what they give on one
host: what replicas exchange does not depend on where the others lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm import reducers
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.from_arrays import unlabelled
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine import bucket_maker
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.evaluation import Evaluator
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.topology import Stage, Topology
from tests.checkpoints import restore, saved, whole

SIZE = MPI.COMM_WORLD.size
SHAPE, CLASSES, ROWS, BATCH = (4, 3, 2), 4, 96, 37
LAYERS = (
    specs.Flatten(),
    specs.Linear(17, activation="tanh"),
    specs.BatchNorm(),
    specs.Linear(19, activation="gelu"),
    specs.Linear(CLASSES),
)
GOSSIP = choices.Gossip("ring", deadline="none", part=1.0, average=("parameters", "optimizer"))
EXCHANGES = {
    "allreduce": choices.Allreduce(),
    "none": choices.Nothing(),
    "gossip": GOSSIP,
    "push_sum": choices.Gossip(mix=choices.PushSumMix(), deadline="none", part=1.0),
    "slow_momentum": choices.Gossip(exact_every=2, slow_momentum=0.5, deadline="none", part=1.0),
    "elite": choices.Elite(every_samples=2 * BATCH),
}


@dataclass(frozen=True)
class Case:
    """Ranks on each host, and a grid of rows x cols for each stage of every replica."""

    hosts: tuple[int, ...]
    replicas: int
    grids: tuple[tuple[int, int], ...]

    @property
    def topology(self) -> Topology:
        cuts = [i * 3 // len(self.grids) for i in range(len(self.grids) + 1)]
        stages = (Stage(cuts[i], cuts[i + 1], *grid) for i, grid in enumerate(self.grids))
        return Topology(self.replicas, tuple(stages))

    def __str__(self) -> str:
        return f"{'+'.join(map(str, self.hosts))}-{self.replicas}*{'|'.join(f'{r}x{c}' for r, c in self.grids)}"


CASES = {
    3: [Case((1, 2), 1, ((3, 1),)), Case((1, 2), 3, ((1, 1),)), Case((1, 2), 1, ((1, 1), (2, 1)))],
    4: [Case((3, 1), 2, ((2, 1),)), Case((3, 1), 2, ((1, 2),)), Case((1, 3), 1, ((2, 2),))],
    8: [
        Case((3, 3), 3, ((2, 1),)),
        Case((3, 3), 2, ((1, 1), (2, 1))),
        Case((2, 1, 3), 3, ((2, 1),)),
        Case((2, 1, 3), 2, ((3, 1),)),
        Case((5, 3), 2, ((2, 2),)),
    ],
}.get(SIZE, [])
QUICK = ("1+2-1*1x1|2x1-allreduce", "3+1-2*2x1-gossip", "3+3-3*2x1-gossip", "2+1+3-3*2x1-gossip")
SLOW = ("3+1-2*2x1-none", "3+1-2*2x1-elite", "3+1-2*1x2-gossip", "1+2-1*3x1-allreduce")
MARKS = dict.fromkeys(QUICK, ()) | dict.fromkeys(SLOW, pytest.mark.slow)
TRIED = [
    pytest.param(case, kind, id=name, marks=MARKS.get(name, pytest.mark.long))
    for case in CASES
    for kind in (EXCHANGES if case.replicas > 1 else ["allreduce"])
    if (name := f"{case}-{kind}")
]
Found = dict[str, Any]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of a network of any size are many, and go around rings, where memory is not shared."""
    monkeypatch.setattr(bucket_maker, "FULL", 1000)
    monkeypatch.setattr(bucket_maker, "LEAST_SHARD", 100)
    monkeypatch.setattr(reducers, "PIECE", 600)


def made(comm: MPI.Intracomm, topology: Topology, exchange: specs.Spec) -> Engine:
    options = Options(
        loss=specs.CrossEntropy(),
        optimizer=specs.Adam(0.01),
        batch_size=BATCH,
        micro_batches=2,
        exchange=exchange,
        dtype="float64",
        kernels="numpy",
    )
    engine = Engine(World(comm), Plan(Network(LAYERS, SHAPE), topology, options))
    data = DataOptions(rows=ROWS, test_rows=29, shape=SHAPE, classes=CLASSES)
    sampler = Sampler(ROWS, 1, 0.2, BATCH, replicas=topology.replicas, micro_batches=2)
    engine.open_data(open_dataset("synthetic", None, options=data), sampler)
    return engine


def train(engine: Engine, evaluator: Evaluator, steps: range) -> None:
    for n in steps:
        engine.step(n, 0.01)
        engine.exchange.at_rest(n + 1, evaluator.compare)


def trained(comm: MPI.Intracomm, case: Case, exchange: specs.Spec, file: Path, read: Path | None = None) -> Found:
    """Train four steps, or the last two from the checkpoint `read`; return what there is half-way and at the end."""
    engine = made(comm, case.topology, exchange)
    evaluator, found = Evaluator(engine), Found()
    evaluator.losses = list(range(case.replicas))
    if read is None:
        train(engine, evaluator, range(2))
    else:
        restore(engine, read)
    found["checkpoint"] = whole(saved(engine, file, 2))
    train(engine, evaluator, range(2, 4))
    found["replicas"], found["evaluation"] = evaluator.compare(), evaluator.evaluate().figures()
    x = np.linspace(-1, 1, 24 * 3).reshape(3, *SHAPE)
    found["outputs"] = evaluator.predict(unlabelled(x, engine.dataset.train, "float64"))
    found["unified"] = evaluator.unify()
    found["parameters"] = engine.parameters()
    found["shared"] = comm.allgather([bucket.memory is not None for bucket in engine.state.buckets])
    engine.close()
    return found


def flat(found: Any, path: str = "") -> dict[str, Any]:
    """The numbers of nested results, by where they stand."""
    if isinstance(found, dict):
        return {k: v for key, each in found.items() for k, v in flat(each, f"{path}/{key}").items()}
    if isinstance(found, list | tuple):
        return {k: v for i, each in enumerate(found) for k, v in flat(each, f"{path}/{i}").items()}
    return {} if found is None or isinstance(found, str) else {path: np.asarray(found)}


@pytest.mark.ranks(3, 4, 8)
@pytest.mark.parametrize(("case", "kind"), TRIED)
def test_hosts_make_no_difference(case: Case, kind: str, hosts: Callable[..., None], shared_path: Path) -> None:
    ranks = case.topology.size
    comm = MPI.COMM_WORLD.Split(0 if MPI.COMM_WORLD.rank < ranks else MPI.UNDEFINED)
    if comm == MPI.COMM_NULL:
        return
    exchange = EXCHANGES[kind]
    together = trained(comm, case, exchange, shared_path / "together")
    hosts(*case.hosts)
    apart = trained(comm, case, exchange, shared_path / "apart")
    resumed = trained(comm, case, exchange, shared_path / "resumed", read=shared_path / "together" / "step-0000000002")
    assert apart.pop("shared") == resumed.pop("shared")
    comm.Free()
    del together["shared"]
    expected = flat(together)
    for name, found in (("apart", flat(apart)), ("resumed", flat(resumed))):
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            np.testing.assert_allclose(found[path], value, rtol=1e-9, atol=1e-11, err_msg=f"{name}: {path}")
