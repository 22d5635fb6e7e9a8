"""Reports are sums that nobody waits for: right figures, in order, also where one rank comes late."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine import reports
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.rank_seconds import COMPUTE, WAITING, line
from nettorrent_mpi.engine.reports import Report, Reports
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.topology import Stage, Topology

SIZE, RANK = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
SMALL = (7, 5)
LAYOUTS = [
    Topology(SIZE // sum(rows * cols for _, rows, cols in stages), tuple(Stage(*c, r, n) for c, r, n in stages))
    for stages in ([((0, 3), SIZE, 1)], [((0, 3), 1, 1)], [((0, 3), 1, 2)], [((0, 1), 2, 1), ((1, 3), 1, 2)])
    if SIZE % sum(rows * cols for _, rows, cols in stages) == 0
]


def name(layout: Topology) -> str:
    return f"{layout.replicas}*[{'|'.join(f'{s.layers}:{s.rows}x{s.cols}' for s in layout.stages)}]"


def make(layout: Topology, units: Sequence[int] = SMALL, batch: int = 20, seed: int = 1) -> Engine:
    dataset = open_dataset("synthetic", None, options=DataOptions(rows=64, test_rows=8, shape=(6,), classes=3))
    layers = (*(specs.Linear(n, activation="tanh") for n in units), specs.Linear(3))
    options = Options(
        loss=specs.CrossEntropy(),
        optimizer=specs.Sgd(),
        batch_size=batch,
        micro_batches=2,
        exchange=choices.Nothing(),
        dtype="float64",
    )
    engine = Engine(World(), Plan(Network(layers, (6,)), layout, options))
    engine.open_data(dataset, Sampler(64, 1, 0.0, batch))
    return engine


def closed(found: Reports[int], engine: Engine) -> None:
    found.close()
    engine.close()


def distance(engine: Engine) -> float:
    """Of all replicas from their mean, relative to it, by NumPy from all that the ranks hold."""
    mine = np.concatenate([bucket.params[bucket.shard] for bucket in engine.state.buckets])
    shards = engine.world.comm.allgather(mine)
    replicas = engine.topology.replicas
    each = engine.world.size // replicas
    x = np.array([np.concatenate(shards[r * each : (r + 1) * each]) for r in range(replicas)])
    mean = x.mean(axis=0)
    return float(np.sqrt(((x - mean) ** 2).sum(axis=1).mean() / (mean**2).sum()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_the_sums_of_all_ranks(layout: Topology) -> None:
    engine = make(layout)
    found: Reports[int] = Reports(engine)
    expected: list[tuple[list[tuple[float, ...]], float]] = []
    for n in range(6):
        engine.step(n, 0.3)
        if n % 2:
            expected.append((engine.world.comm.allgather(tuple(engine.metrics.values[:4])), distance(engine)))
            found.start(n)
            assert not engine.metrics.values.any()
    told = list(found.ready(wait=True))
    assert [report.tag for report in told] == [1, 3, 5]
    place = [engine.topology.place(rank).replica for rank in range(SIZE)]
    for report, (tallies, far) in zip(told, expected, strict=True):
        loss, right, rows, _ = np.sum(tallies, axis=0)
        np.testing.assert_allclose(report.training, (loss / rows, right / rows), rtol=1e-13)
        for r in range(layout.replicas):
            own_loss, _, own_rows, _ = np.sum([t for t, p in zip(tallies, place, strict=True) if p == r], axis=0)
            np.testing.assert_allclose(report.replicas[r], own_loss / own_rows, rtol=1e-13)
        assert report.rest is False
        if layout.replicas == 1:
            assert report.distance is None
        else:
            assert report.distance == pytest.approx(far, rel=1e-6)
            assert far > 1e-3
    closed(found, engine)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_equal_replicas_have_no_distance(layout: Topology) -> None:
    """Not even that of rounding, whatever the values are."""
    engine = make(layout)
    found: Reports[int] = Reports(engine)
    for n in range(8):
        for i, bucket in enumerate(engine.state.buckets):
            part = bucket.params[bucket.shard]
            part[...] = np.random.default_rng([n, i, *engine.place[1:]]).normal(size=part.size)
        found.start(n)
    for report in found.ready(wait=True):
        assert report.distance == (None if layout.replicas == 1 else 0.0)
        assert all(math.isnan(loss) for loss in report.replicas), "no rows were seen"
    closed(found, engine)


@pytest.mark.ranks(2, 3, 4)
def test_the_distance_of_many_parameters_is_measured_at_some() -> None:
    engine = make(Topology(SIZE, (Stage(0, 3, 1, 1),)), units=(200, 100))
    for bucket in engine.state.buckets:
        part = bucket.params[bucket.shard]
        part[...] = np.random.default_rng(RANK).normal(size=part.size) * 0.1 + np.random.default_rng(99).normal(
            size=part.size
        )
    found: Reports[int] = Reports(engine)
    found.start(0)
    (report,) = found.ready(wait=True)
    assert report.distance == pytest.approx(distance(engine), rel=0.1)
    closed(found, engine)


def test_one_rank_raises_its_flag_for_all() -> None:
    engine = make(LAYOUTS[-1])
    found: Reports[int] = Reports(engine)
    engine.step(0, 0.1)
    found.start(0, figures=False)
    found.start(1, rest=RANK == SIZE - 1, figures=False)
    found.start(2, rest=True, figures=True)
    found.start(3, figures=False)
    told = list(found.ready(wait=True, but=1))
    assert [(report.tag, report.rest) for report in told] == [(0, False), (1, True), (2, True)]
    assert not math.isnan(told[2].replicas[0]), "reports of requests alone leave the figures to the next"
    assert [(report.tag, report.rest) for report in found.ready(wait=True)] == [(3, False)]
    assert list(found.ready(wait=True)) == []
    closed(found, engine)


@pytest.mark.ranks(2, 3, 5)
def test_a_late_rank_delays_nobody(shared_path: Path) -> None:
    """The last rank starts nothing before the others have told, in files, that they have started six more reports."""
    engine = make(Topology(SIZE, (Stage(0, 3, 1, 1),)))
    found: Reports[int] = Reports(engine)
    late = RANK == SIZE - 1
    told: list[Report[int]] = []
    for n in range(3):
        found.start(n)
    told += list(found.ready(wait=True))
    if late:
        end = time.monotonic() + 20
        while len(list(shared_path.glob("*.told"))) < SIZE - 1:
            assert time.monotonic() < end, "the others wait for this rank"
            time.sleep(0.01)
    for n in range(3, 9):
        found.start(n, rest=late and n == 5)
        early = list(found.ready())
        assert late or not early, "nothing can be known of them yet"
        told += early
    if not late:
        (shared_path / f"{RANK}.told").touch()
    told += list(found.ready(wait=True))
    assert [report.tag for report in told] == list(range(9))
    assert [report.tag for report in told if report.rest] == [5]
    closed(found, engine)


@pytest.mark.ranks(2, 3, 4)
def test_the_seconds_of_each_rank_name_the_slow_one() -> None:
    """The last rank of a team takes 20 ms longer for each forward pass: it computes, and the others wait for it."""
    engine = make(Topology(1, (Stage(0, 3, SIZE, 1),)))
    methods, forward = engine.pipeline._methods, engine.pipeline._methods["F"]
    if RANK == SIZE - 1:
        methods["F"] = lambda m: (time.sleep(0.02), forward(m))[1]
    found: Reports[int] = Reports(engine)
    began = time.perf_counter()
    for n in range(6):
        engine.step(n, 0.1)
        if n % 3 == 2:
            found.start(n)
    passed = time.perf_counter() - began
    for report in found.ready(wait=True):
        assert report.seconds.shape == (SIZE, 3)
        assert (report.seconds >= 0).all()
        assert report.seconds.sum(axis=1).max() <= passed + 0.01
        *others, slow = report.seconds
        assert slow[COMPUTE] > 3 * 2 * 0.02
        assert all(each[WAITING] > 0.06 > slow[WAITING] for each in others)
        told = line(report.seconds, engine.topology)
        assert told is not None
        assert told["slowest"] == SIZE - 1
        assert len(told["compute"]) == len(told["communication"]) == len(told["waiting"]) == SIZE
    closed(found, engine)


def test_more_reports_than_may_be_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MOST", 3)
    engine = make(LAYOUTS[0])
    found: Reports[int] = Reports(engine)
    for n in range(10):
        found.start(n)
    assert [report.tag for report in found.ready(wait=True)] == list(range(10))
    closed(found, engine)
