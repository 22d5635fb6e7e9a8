"""Elite: the losers have the winner's weights and optimizer state to the last bit, and validation rows alone judge."""

from __future__ import annotations

import math
from typing import Any

import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import DataOptions, open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.evaluation import Evaluator
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.exchange.elite import steps_between, takes
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.pairing import make_pairing
from nettorrent_mpi.plan.scores import Scores, best_of
from nettorrent_mpi.plan.topology import Stage, Topology

SIZE = MPI.COMM_WORLD.size
LAYERS = (specs.Linear(9, activation="tanh"), specs.BatchNorm(), specs.Linear(3))
NAN = float("nan")


def topology(replicas: int, *grids: tuple[int, int]) -> Topology:
    """(rows, cols) of each stage; two weight layers in all."""
    each = 2 // len(grids)
    return Topology(replicas, tuple(Stage(i * each, (i + 1) * each, *grid) for i, grid in enumerate(grids)))


LAYOUTS = {
    1: [],
    2: [topology(2, (1, 1))],
    3: [topology(3, (1, 1))],
    4: [topology(4, (1, 1)), topology(2, (2, 1)), topology(2, (1, 1), (1, 1))],
    5: [topology(5, (1, 1))],
    8: [topology(8, (1, 1)), topology(4, (1, 2))],
}[SIZE]


def name(layout: Topology) -> str:
    return f"{layout.replicas}*[{'|'.join(f'{s.layers}:{s.rows}x{s.cols}' for s in layout.stages)}]"


def make(layout: Topology, choice: choices.Elite) -> Engine:
    """Replicas that have trained for three steps on rows of their own."""
    dataset = open_dataset("synthetic", None, options=DataOptions(rows=96, test_rows=8, shape=(6,), classes=3))
    sampler = Sampler(96, 1, 0.2, 40, replicas=layout.replicas, partition="disjoint")
    options = Options(
        loss=specs.CrossEntropy(),
        optimizer=specs.Adam(),
        batch_size=40,
        micro_batches=1,
        exchange=choice,
        dtype="float64",
        seed=3,
    )
    engine = Engine(World(), Plan(Network(LAYERS, (6,)), layout, options))
    engine.open_data(dataset, sampler)
    for n in range(3):
        engine.step(n, 0.05)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the test set may not be looked at")

    assert engine.test is not None
    engine.test.begin_rows = refuse  # type: ignore[method-assign]
    return engine


def compare(engine: Engine, number: int) -> Scores:
    """Comparison `number`; in between nothing happens."""
    every = steps_between(choices.Elite(), engine.options.batch_size)
    assert engine.exchange.next_rest(number * every - 1) == number * every
    assert engine.exchange.at_rest(number * every + 1, Evaluator(engine).compare) is None
    best = engine.exchange.at_rest(number * every, Evaluator(engine).compare)
    assert best is not None
    return best


def all_bits(engine: Engine) -> list[bytes]:
    """For each replica all that its part at this place holds: parameters, statistics, optimizer state."""
    arrays = [flat.params for flat in engine.state.flats]
    arrays += [array for bucket in engine.state.buckets for array in bucket.optimizer.values()]
    found = engine.world.comm.allgather(b"".join(array.tobytes() for array in arrays))
    place = engine.place
    return [found[rank] for rank in engine.topology.peers(place.stage, place.row, place.col)]


def key_of(metric: str, scores: Scores) -> float:
    assert scores.accuracy is not None
    return scores.loss if metric == "validation_loss" else -scores.accuracy


@pytest.mark.parametrize("metric", ["validation_loss", "validation_accuracy"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_all_become_the_best(layout: Topology, metric: Any) -> None:
    choice = choices.Elite(metric=metric)
    engine = make(layout, choice)
    before, found = all_bits(engine), Evaluator(engine).compare()
    assert found is not None
    assert len(set(before)) == layout.replicas
    assert len(set(engine.world.comm.allgather(tuple(found)))) == 1, "all ranks judge alike"
    best = min(range(layout.replicas), key=lambda r: key_of(metric, found[r]))
    assert compare(engine, 1) == found[best]
    after = all_bits(engine)
    assert after == [before[best]] * layout.replicas
    engine.step(3, 0.05)  # on their own rows again
    assert len(set(all_bits(engine))) == layout.replicas
    engine.close()


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_losers_take_the_winners_of_random_pairs(layout: Topology) -> None:
    choice = choices.Elite(mode="tournament")
    engine = make(layout, choice)
    count = layout.replicas
    for number in (1, 2, 3):
        before, found = all_bits(engine), Evaluator(engine).compare()
        assert found is not None
        expected, paired = list(range(count)), set()
        for a, b, _ in make_pairing("shuffle", count, 3).edges(number):
            paired |= {a, b}
            expected[a] = a if (found[a].loss, a) < (found[b].loss, b) else b
        assert len(paired) == count - count % 2
        best = compare(engine, number)
        assert best.loss == min(scores.loss for scores in found)
        assert all_bits(engine) == [before[source] for source in expected]
        engine.step(2 + number, 0.05)
    engine.close()


@pytest.mark.ranks(1)
def test_what_is_not_a_number_never_wins() -> None:
    bad, worse, good = Scores(NAN, 0.9), Scores(math.inf, 0.9), Scores(1e9, 0.1)
    for metric in ("validation_loss", "validation_accuracy"):
        assert best_of([bad, good], metric) == 1
        assert best_of([worse, bad, good, good], metric) == 2
    assert best_of([bad, worse], "validation_loss") == 0  # there has to be one
    assert best_of([Scores(1.0, None), Scores(0.5, None)], "validation_loss") == 1
    assert best_of([Scores(0.5, 0.6), Scores(1.0, 0.7)], "validation_accuracy") == 1
    assert takes(choices.Elite(), [bad, good, bad], 1, 1) == [1, 1, 1]
    assert takes(choices.Elite(mode="tournament"), [good, bad], 1, 1) == [0, 0]
    assert takes(choices.Elite(mode="tournament"), [bad, good], 5, 1) == [1, 1]
    rounds = [takes(choices.Elite(mode="tournament"), [Scores(r, None) for r in range(5)], n, 1) for n in range(1, 9)]
    assert all(source <= r and found[source] == source for found in rounds for r, source in enumerate(found))
    assert all(len(set(found)) == 3 for found in rounds)
    assert len({tuple(found) for found in rounds}) > 3, "pairs are drawn anew"


@pytest.mark.ranks(1)
def test_comparisons_are_counted_in_rows() -> None:
    for samples, batch, steps in ((1000, 128, 8), (1024, 128, 8), (1025, 128, 9), (1, 128, 1)):
        assert steps_between(choices.Elite(samples), batch) == steps
