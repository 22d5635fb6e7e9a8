"""What a stage's largest rank holds, by hand."""

from __future__ import annotations

from nettorrent_mpi.plan.layouts import layers_layout
from nettorrent_mpi.plan.memory import Memory, memory
from nettorrent_mpi.plan.schedule import PIPELINES
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology

TWO = [LayerFacts("a", 30.0, 50, 10, 7, 10), LayerFacts("b", 60.0, 44, 4, 10, 4)]
ALONE = Topology(1, (Stage(0, 2, 1, 1),))
NONE = [(0, 0), (0, 0)]


def test_one_rank() -> None:
    # parameters and gradients; two states; the input of the 4 rows of a micro-batch, and of the next one
    found = memory(ALONE, TWO, 8, 2, "1f1b", [(100, 30)], states=2, itemsize=8)
    assert found == [Memory(parameters=8 * 2 * 94, optimizer=8 * 2 * 94, layers=130, links=8 * 4 * 2 * 7)]
    assert found[0].total == 8 * (4 * 94 + 56) + 130


def test_a_pipeline_of_teams() -> None:
    pipe = Topology(2, (Stage(0, 1, 1, 2), Stage(1, 2, 2, 1)))
    first, second = memory(pipe, TWO, 8, 2, "1f1b", [(100, 30), (10, 3)], states=2, itemsize=1)
    # Two replicas hold each col's 25 parameters; two micro-batches of 2 rows are under way.
    assert (first.parameters, first.optimizer, first.layers) == (3 * 25, 25, 230)
    assert first.links == 2 * (3 * 7 + 2 * 5)  # two inputs and the next one; the outputs' gradients
    # Two replicas and two rows hold the 44; of 1 row each. The inputs come from two cols, in pieces.
    assert (second.parameters, second.optimizer, second.layers) == (3 * 44, 22, 13)
    assert second.links == 2 * 2 * 10 + 2 * 2 * 10


def test_replicas_that_differ_have_nothing_in_common() -> None:
    pipe = Topology(2, (Stage(0, 1, 1, 2), Stage(1, 2, 2, 1)))
    first, second = memory(pipe, TWO, 8, 2, "1f1b", NONE, states=2, itemsize=1, exact=False)
    assert (first.parameters, first.optimizer) == (2 * 25, 2 * 25)
    assert (second.parameters, second.optimizer) == (3 * 44, 44)


def test_what_is_added_up_from_several_cols_has_buffers() -> None:
    first, _ = memory(Topology(1, (Stage(0, 1, 1, 1), Stage(1, 2, 1, 3))), TWO, 4, 1, "gpipe", NONE, itemsize=1)
    assert first.links == 4 * (2 * 7 + 2 * 3 * 10)


def test_without_flush_earlier_versions_are_kept() -> None:
    pipe = Topology(1, (Stage(0, 1, 1, 1), Stage(1, 2, 1, 1)))
    first, second = memory(pipe, TWO, 4, 1, "async", NONE, itemsize=1)
    assert (first.parameters, second.parameters) == (3 * 50, 2 * 44)


def test_gpipe_keeps_more(networks: dict[str, list[LayerFacts]]) -> None:
    facts = networks["cnn"]
    topology = layers_layout(facts, 6, 16)
    layers = [(1000, 0)] * len(topology.stages)
    kept = {p: [m.total for m in memory(topology, facts, 128, 8, p, layers)] for p in PIPELINES}
    assert all(a >= b for a, b in zip(kept["gpipe"], kept["1f1b"], strict=True))
    assert kept["gpipe"][-1] > kept["1f1b"][-1]
