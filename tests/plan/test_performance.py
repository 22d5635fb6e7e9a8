from __future__ import annotations

from dataclasses import replace

import pytest

from nettorrent_mpi.plan.cost import predict
from nettorrent_mpi.plan.performance import LayerCost, LayerTimes, Link, Machine
from nettorrent_mpi.plan.search import fast_layouts, weighed
from nettorrent_mpi.plan.stage_cost import Peering
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology

TWO = [LayerFacts("a", 30.0, 50, 10, 7, 10), LayerFacts("b", 60.0, 40, 4, 10, 4)]
ALONE = Topology(1, (Stage(0, 2, 1, 1),))
ROWS = Topology(1, (Stage(0, 2, 2, 1),))
# forward: 1 s a call, 2 s a row, 3 s a row and all neurons, 4 s for all weights; backward twice that
COST, TWICE = LayerCost(1.0, 2.0, 3.0, 4.0), LayerCost(2.0, 4.0, 6.0, 8.0)
FREE = Machine(bandwidth=1e30, reduction=1e30, latency=0.0, update=0.0, layers={
    name: LayerTimes(COST, TWICE, accumulate=16.0) for name in "ab"
})  # fmt: skip


def test_a_step_of_measured_layers_by_hand() -> None:
    # 8 rows: 1 + 8 x (2 + 3) + 4 = 45 s forward for each of two layers, 90 s backward
    assert predict(ALONE, TWO, 8, 1, "1f1b", FREE).seconds == pytest.approx(2 * 135)
    # in two micro-batches: twice 1 + 4 x 5 + 4 = 25 s, and gradients are added once
    assert predict(ALONE, TWO, 8, 2, "1f1b", FREE).seconds == pytest.approx(2 * (2 * 75 + 16))
    # half the neurons: 1 + 8 x (2 + 1.5) + 2 = 31 s
    cols = Topology(1, (Stage(0, 2, 1, 2),))
    assert predict(cols, TWO, 8, 1, "1f1b", FREE).seconds == pytest.approx(2 * 93)
    # a pass costs 5 s besides, a row 7 s, a step 11 s
    more = replace(FREE, call=5.0, row=7.0, step=11.0)
    assert predict(ALONE, TWO, 8, 1, "1f1b", more).seconds == pytest.approx(2 * 135 + 2 * 5 + 8 * 7 + 11)


def test_messages_of_each_kind_have_their_own_costs() -> None:
    alone = predict(ROWS, TWO, 8, 1, "1f1b", replace(FREE, fence=0.0)).seconds
    assert predict(ROWS, TWO, 8, 1, "1f1b", replace(FREE, fence=3.0)).seconds == pytest.approx(alone + 2 * 3)
    cols = Topology(1, (Stage(0, 2, 1, 2),))
    alone = predict(cols, TWO, 8, 1, "1f1b", FREE).seconds
    more = predict(cols, TWO, 8, 1, "1f1b", replace(FREE, collective=3.0)).seconds
    assert more == pytest.approx(alone + 2 * 3), "one gather each way"
    apart = Topology(2, (Stage(0, 2, 1, 1),))
    sends = Peering(sent=4.0, fitting=False)
    alone = predict(apart, TWO, 8, 1, "1f1b", replace(FREE, mix=0.0), exact=False, peering=sends).seconds
    more = predict(apart, TWO, 8, 1, "1f1b", replace(FREE, mix=0.1, round=5.0), exact=False, peering=sends).seconds
    assert more == pytest.approx(alone + 90 * 4 * 0.1 + 5)


def test_one_rank_has_the_figures_of_a_rank_alone() -> None:
    quick = Machine(layers={name: LayerTimes(COST, COST) for name in "ab"}, bandwidth=1e30, latency=0.0, update=0.0)
    machine = replace(FREE, alone=quick)
    assert predict(ALONE, TWO, 8, 1, "1f1b", machine).seconds == pytest.approx(2 * 90)
    assert predict(ROWS, TWO, 8, 1, "1f1b", machine).seconds == pytest.approx(2 * 75)
    # ranks that have a node each are alone, too
    apart = machine.placed(1, Link(0.0, 1e30))
    assert predict(ROWS, TWO, 8, 1, "1f1b", apart).seconds == pytest.approx(2 * 50)


def test_measured_times_decide_where_layers_are_divided() -> None:
    slow = {"a": LayerTimes(LayerCost(0, 10.0, 0, 0), LayerCost(0, 10.0, 0, 0)), "b": LayerTimes(COST, COST)}
    machine = replace(FREE, layers=slow)
    first, second = weighed(TWO, machine, 8)
    assert first.operations / second.operations == pytest.approx(160 / 90)
    assert weighed(TWO, Machine(), 8) == TWO


def test_gradients_travel_between_nodes() -> None:
    machine = replace(FREE, layers={name: LayerTimes(LayerCost(0, 0, 0, 0), LayerCost(0, 0, 0, 0)) for name in "ab"})
    here = predict(ROWS, TWO, 8, 1, "1f1b", machine).seconds
    assert here == pytest.approx(0)
    # 90 parameters of 4 bytes: half of them there and half of them back, in two messages each way
    apart = machine.placed(1, Link(1.0, 10.0))
    assert predict(ROWS, TWO, 8, 1, "1f1b", apart).seconds == pytest.approx(90 * 4 / 10 + 2 * 1.0)
    assert predict(ROWS, TWO, 8, 1, "1f1b", machine.placed(2, Link(1.0, 10.0))).seconds == pytest.approx(0)
    # four ranks on two nodes: a node's link carries 3/4 of the gradients, once for both of its ranks
    four = Topology(1, (Stage(0, 2, 4, 1),))
    step = predict(four, TWO, 8, 1, "1f1b", machine.placed(2, Link(0.0, 10.0)))
    assert step.seconds == pytest.approx(2 * 3 / 4 * 90 * 4 / 10), "short: not around a ring"


def test_micro_batches_travel_between_nodes_one_after_another() -> None:
    free = LayerTimes(LayerCost(0, 0, 0, 0), LayerCost(0, 0, 0, 0))
    machine = replace(FREE, layers=dict.fromkeys("ab", free), node=1, link=Link(0.0, 10.0))
    pipe = Topology(1, (Stage(0, 1, 1, 1), Stage(1, 2, 1, 1)))
    # 8 rows of 10 numbers of 4 bytes there, and, as gpipe has it, afterwards back
    step = predict(pipe, TWO, 8, 4, "gpipe", machine)
    assert step.seconds == pytest.approx(2 * 8 * 10 * 4 / 10)
    # what a token bucket takes at once waits for nothing, but no more goes through it in the long run
    step = predict(pipe, TWO, 8, 4, "gpipe", replace(machine, link=Link(0.0, 10.0, burst=1000)))
    assert step.seconds == pytest.approx(8 * 10 * 4 / 10)


@pytest.mark.parametrize(
    ("node", "first", "count", "steps", "inside"),
    [
        (None, 0, 64, (), True),
        (8, 0, 8, (), True),
        (8, 4, 8, (), False),
        (8, 0, 4, (4,), True),
        (8, 0, 3, (3,), False),  # 6, 7, 8
        (6, 0, 4, (4,), False),
    ],
)
def test_groups_inside_a_node(node: int | None, first: int, count: int, steps: tuple[int, ...], inside: bool) -> None:
    one = Topology(1, (Stage(0, 2, 64, 1),))
    assert Machine(node=node).inside(one, first, count, *steps) == inside


def test_a_slow_link_keeps_weights_inside_nodes() -> None:
    heavy = [LayerFacts(name, 1e6, 10**6, 64, 64, 64) for name in "ab"]
    slow = Machine(node=4, link=Link(1e-3, 1e6))
    found = fast_layouts(heavy, 8, 64, lambda stages: 4, "1f1b", slow)[0]
    assert all(stage.rows == 1 or stage.size <= 4 for stage in found.stages), "weights do not travel"
    rows = Topology(1, (Stage(0, 2, 8, 1),))
    best, other = (predict(t, heavy, 64, 4, "1f1b", slow).seconds for t in (found, rows))
    assert best < other / 10
