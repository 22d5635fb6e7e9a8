from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest

from nettorrent_mpi.plan.cost import predict
from nettorrent_mpi.plan.layouts import layers_layout
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.schedule import PIPELINES
from nettorrent_mpi.plan.search import fast_layouts
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology

Networks = dict[str, list[LayerFacts]]

# seconds that can be worked out by hand: one operation a second, everything else free
PLAIN = Machine(flops=1.0, bandwidth=1e30, reduction=1e30, latency=0.0, overhead=0.0, update=0.0)
TWO = [LayerFacts("a", 30.0, 50, 10, 7, 10), LayerFacts("b", 60.0, 44, 4, 10, 4)]
ALONE = Topology(1, (Stage(0, 2, 1, 1),))


def always(micro_batches: int) -> Callable[[int], int]:
    """So many, whatever the stages."""
    return lambda stages: micro_batches


@pytest.mark.parametrize("pipeline", sorted(PIPELINES))
def test_compute_rounds_up(pipeline: str) -> None:
    assert predict(ALONE, TWO, 8, 2, pipeline, PLAIN).seconds == pytest.approx(8 * 90)
    # 7 rows in 2 micro-batches: the larger has 4, of which the larger part of 3 rows has 2, of 3 cols 4/10 and 2/4
    grid = Topology(1, (Stage(0, 2, 3, 3),))
    assert predict(grid, TWO, 7, 2, pipeline, PLAIN).seconds == pytest.approx(2 * 2 * (30 * 0.4 + 60 * 0.5))


def test_a_pipeline_has_its_bubble() -> None:
    pipe = Topology(1, (Stage(0, 1, 1, 1), Stage(1, 2, 2, 1)))
    step = predict(pipe, TWO, 8, 4, "1f1b", PLAIN)
    assert step.seconds == pytest.approx(60 * (4 + 2 - 1))
    assert step.bubble == pytest.approx(1 / 5)
    assert step.compute == pytest.approx((240, 240))


def test_a_pipeline_without_flush_has_none() -> None:
    even = Topology(1, (Stage(0, 1, 1, 1), Stage(1, 2, 2, 1)))
    step = predict(even, TWO, 8, 4, "async", PLAIN)
    assert step.seconds == pytest.approx(60 * 4)
    assert step.bubble == pytest.approx(0)
    assert step.compute == predict(even, TWO, 8, 4, "1f1b", PLAIN).compute
    # only the slowest stage counts, with what it does once a step
    uneven = Topology(1, (Stage(0, 1, 1, 1), Stage(1, 2, 1, 1)))
    step = predict(
        uneven,
        TWO,
        8,
        4,
        "async",
        Machine(flops=1.0, bandwidth=1e30, reduction=1e30, latency=0.0, overhead=0.0, update=1.0),
    )
    assert step.seconds == pytest.approx(8 * 60 + 44)
    assert step.bubble == pytest.approx(1 - (8 * 30 + 50 + 8 * 60 + 44) / (2 * step.seconds))


def test_replicas_that_are_not_alike_sum_nothing() -> None:
    machine = Machine(
        flops=1e30, bandwidth=4.0, reduction=4.0, latency=0.0, overhead=0.0, update=100.0
    )  # an element a second
    topology = Topology(2, (Stage(0, 2, 2, 1),))
    for pipeline in PIPELINES:
        exact = predict(topology, TWO, 8, 2, pipeline, machine)
        assert exact.seconds == pytest.approx(2 * 3 / 4 * 94 + 100 * 94 / 4)
        apart = predict(topology, TWO, 8, 2, pipeline, machine, exact=False)
        assert apart.seconds == pytest.approx(2 * 1 / 2 * 94 + 100 * 94 / 2)
        assert apart.communication == pytest.approx((94,))


def test_communication_by_hand() -> None:
    machine = Machine(
        flops=1e30, bandwidth=4.0, reduction=4.0, latency=100.0, overhead=0.0, update=0.0
    )  # an element a second
    pipe = Topology(1, (Stage(0, 1, 2, 1), Stage(1, 2, 1, 2)))
    step = predict(pipe, TWO, 6, 1, "gpipe", machine)
    # each way 3 rows of 10 to both cols, and 6 rows of 10 from both rows; then the sum of 50 elements over 2 rows
    assert step.communication == pytest.approx((2 * (60 + 2 * 100) + 50 + 2 * 100, 2 * (60 + 2 * 100)))
    merged = predict(Topology(1, (Stage(0, 2, 1, 2),)), TWO, 6, 1, "gpipe", machine)
    assert merged.communication == pytest.approx((2 * (6 * 10 / 2 + 100),)), "gathers half the columns"


def test_replicas_are_rows_where_there_is_one_stage(networks: Networks) -> None:
    facts = networks["cnn"]
    times = [
        predict(Topology(r, (Stage(0, len(facts), 12 // r, 2),)), facts, 128, 4, "1f1b").seconds for r in (1, 2, 3, 12)
    ]
    assert times == pytest.approx([times[0]] * 4)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
def test_auto_layout_uses_all_ranks_and_is_never_behind(networks: Networks, name: str) -> None:
    facts = networks[name]
    for ranks in [*range(1, 34), 48, 64, 97, 128, 199, 200]:
        for pipeline, micro_batches in (("1f1b", 4), ("gpipe", 1)):
            chosen = fast_layouts(facts, ranks, 128, always(micro_batches), pipeline)[0]
            assert chosen.size == ranks
            assert chosen.stages[-1].stop == len(facts)
            for stage in chosen.stages:
                assert stage.cols <= min(w.units for w in facts[stage.first : stage.stop])
            seconds = predict(chosen, facts, 128, micro_batches, pipeline).seconds
            others = [layers_layout(facts, ranks, -(-128 // micro_batches))]
            others += [Topology(1, (Stage(0, len(facts), ranks, 1),))]
            for other in others:
                assert seconds <= predict(other, facts, 128, micro_batches, pipeline).seconds * 1.05


@pytest.mark.parametrize("exact", [True, False])
def test_auto_layout_of_other_pipelines_and_exchanges(networks: Networks, exact: bool) -> None:
    for name, ranks in itertools.product(("mlp", "cnn"), (1, 5, 12, 64)):
        facts = networks[name]
        chosen = fast_layouts(facts, ranks, 128, always(4), "async", exact=exact)[0]
        assert chosen.size == ranks
        seconds = predict(chosen, facts, 128, 4, "async", exact=exact).seconds
        others = [layers_layout(facts, ranks, 32)]
        others += [Topology(r, (Stage(0, len(facts), ranks // r, 1),)) for r in range(1, ranks + 1) if ranks % r == 0]
        for other in others:
            assert seconds <= predict(other, facts, 128, 4, "async", exact=exact).seconds * 1.05


@pytest.mark.parametrize(("ranks", "pipeline"), [(840, "1f1b"), (997, "1f1b"), (1000, "1f1b"), (840, "async")])
def test_auto_layout_is_quick(networks: Networks, ranks: int, pipeline: str) -> None:
    start = time.process_time()
    assert fast_layouts(networks["resnet"], ranks, 128, always(8), pipeline)[0].size == ranks
    assert time.process_time() - start < 3


def test_auto_layout_finds_the_obvious() -> None:
    # communication is free and nothing divides the rows but rows: 8 rows on 8 ranks, without a bubble
    # Calls cost as much as the work: one stage, whose mini-batch is in one piece, wins where a pipeline's is in four.
    dear = Machine(flops=1.0, bandwidth=1e30, reduction=1e30, latency=0.0, overhead=90.0, update=0.0)
    assert fast_layouts(TWO, 2, 8, always(4), "1f1b", dear)[0].stages == (Stage(0, 1, 1, 1), Stage(1, 2, 1, 1))
    assert fast_layouts(TWO, 2, 8, lambda stages: 4 if stages > 1 else 1, "1f1b", dear)[0].stages == (
        Stage(0, 2, 2, 1),
    )
    assert fast_layouts(TWO, 8, 8, always(1), "1f1b", PLAIN)[0].stages == (Stage(0, 2, 8, 1),)
    # one row: only cols and stages can help, and the stages of one micro-batch never work at once
    assert fast_layouts(TWO, 2, 1, always(1), "1f1b", PLAIN)[0].stages == (Stage(0, 2, 1, 2),)
    # many micro-batches, and sums of gradients that cost more than a link
    heavy = [LayerFacts(w.name, 45.0, 10**6, 1, 1, 1) for w in TWO]
    linked = Machine(flops=1.0, bandwidth=4e4, reduction=4e4, latency=0.0, overhead=0.0, update=0.0)
    assert fast_layouts(heavy, 2, 8, always(8), "1f1b", linked)[0].stages == (Stage(0, 1, 1, 1), Stage(1, 2, 1, 1))
    # where replicas need not be alike, they have no sums to wait for
    assert fast_layouts(heavy, 2, 16, always(8), "1f1b", linked, exact=False)[0] == Topology(2, (Stage(0, 2, 1, 1),))
    # one micro-batch fills two stages only where the pipeline does not flush
    assert fast_layouts(heavy, 2, 8, always(1), "1f1b", linked)[0].stages == (Stage(0, 2, 2, 1),)
    assert fast_layouts(heavy, 2, 8, always(1), "async", linked)[0].stages == (Stage(0, 1, 1, 1), Stage(1, 2, 1, 1))
