from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.errors import LayoutError
from nettorrent_mpi.plan.layouts import factor, given_layout, layers_layout, layout_of, partition
from nettorrent_mpi.plan.topology import LayerFacts, Place, Stage, Topology, compact

Networks = dict[str, list[LayerFacts]]


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    stages, first = [], 0
    for _ in range(draw(st.integers(1, 5))):
        stop = first + draw(st.integers(1, 3))
        stages.append(Stage(first, stop, draw(st.integers(1, 5)), draw(st.integers(1, 4))))
        first = stop
    return Topology(draw(st.integers(1, 4)), tuple(stages))


def everywhere(topology: Topology) -> list[int]:
    return list(range(topology.size))


@settings(max_examples=500, deadline=None)
@given(topologies())
def test_ranks_and_places_are_one_to_one(topology: Topology) -> None:
    places = [topology.place(rank) for rank in everywhere(topology)]
    assert [topology.rank(*place) for place in places] == everywhere(topology)
    assert set(places) == {
        Place(replica, s, row, col)
        for replica in range(topology.replicas)
        for s, stage in enumerate(topology.stages)
        for row in range(stage.rows)
        for col in range(stage.cols)
    }
    assert places == sorted(places), "cols are nearest, then rows, stages, replicas"


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(topologies())
def test_every_kind_of_group_divides_the_ranks(topology: Topology) -> None:
    t, replicas = topology, range(topology.replicas)
    numbered = list(enumerate(t.stages))
    kinds = {
        "swarm": [t.swarm(s) for s, _ in numbered],
        "team": [t.team(r, s) for r in replicas for s, _ in numbered],
        "peers": [t.peers(s, i, j) for s, x in numbered for i in range(x.rows) for j in range(x.cols)],
        "row_group": [t.row_group(r, s, j) for r in replicas for s, x in numbered for j in range(x.cols)],
        "col_group": [t.col_group(r, s, i) for r in replicas for s, x in numbered for i in range(x.rows)],
        "exact_group": [t.exact_group(s, j) for s, x in numbered for j in range(x.cols)],
    }
    for kind, groups in kinds.items():
        assert sorted(itertools.chain(*groups)) == everywhere(t), kind
    for replica, (s, stage) in itertools.product(replicas, numbered):
        team = t.team(replica, s)
        assert [t.place(rank)[2:] for rank in team] == [(i, j) for i in range(stage.rows) for j in range(stage.cols)]
        assert team == range(team[0], team[-1] + 1), "neighbouring ranks"
    for group in kinds["exact_group"]:
        assert len({(t.place(rank).stage, t.place(rank).col) for rank in group}) == 1
        assert [t.place(rank) for rank in group] == sorted(t.place(rank) for rank in group)


@settings(max_examples=200, deadline=None)
@given(topologies())
def test_groups_are_the_ranks_at_their_places(topology: Topology) -> None:
    t, found = topology, dict[tuple[int, ...], list[Sequence[int]]]()
    places = [t.place(rank) for rank in everywhere(t)]
    for own in places:
        replica, stage, row, col = own
        swarm = [rank for rank, p in enumerate(places) if p.stage == stage]
        groups = [
            (t.swarm(stage), swarm),
            (t.exact_group(stage, col), [rank for rank in swarm if places[rank].col == col]),
            (t.team(replica, stage), [rank for rank in swarm if places[rank].replica == replica]),
            (t.replica(replica), [rank for rank, p in enumerate(places) if p.replica == replica]),
            (t.peers(stage, row, col), [rank for rank in swarm if places[rank][2:] == (row, col)]),
            (t.row_group(replica, stage, col), [t.rank(replica, stage, i, col) for i in range(t.stages[stage].rows)]),
            (t.col_group(replica, stage, row), [t.rank(replica, stage, row, j) for j in range(t.stages[stage].cols)]),
        ]
        for group, expected in groups:
            assert list(group) == [group[i] for i in range(len(group))] == expected
            assert [rank in group for rank in everywhere(t)] == [rank in expected for rank in everywhere(t)]
            assert list(group[1:3]) == expected[1:3]
            found.setdefault(tuple(expected), []).append(group)
    for alike in found.values():  # the same ranks are one key, however they were found
        assert len(set(alike)) == 1
    assert len({each for alike in found.values() for each in alike}) == len(found)


@pytest.mark.parametrize("ranks", [(3,), (0, 1, 2), (1, 4, 7), (0, 1, 3), (5, 2), (0, 2, 1)])
def test_ranks_that_ascend_evenly_become_a_range(ranks: tuple[int, ...]) -> None:
    found = compact(ranks)
    assert tuple(found) == ranks
    assert isinstance(found, range) == (ranks in [(3,), (0, 1, 2), (1, 4, 7)])


@settings(max_examples=300, deadline=None)
@given(topologies(), st.integers(1, 40), st.integers(1, 6))
def test_every_stage_sees_every_row_once_on_each_col(topology: Topology, batch_size: int, micro_batches: int) -> None:
    for s, stage in enumerate(topology.stages):
        for col in range(stage.cols):
            rows = [
                row
                for m in range(micro_batches)
                for rank in topology.exact_group(s, col)
                for row in range(*topology.batch_rows(topology.place(rank), batch_size, micro_batches, m))
            ]
            assert rows == list(range(batch_size))


def test_rows_of_a_micro_batch_do_not_depend_on_the_stage() -> None:
    topology = Topology(2, (Stage(0, 1, 3, 1), Stage(1, 2, 1, 2)))
    # 10 rows in 2 micro-batches of 5, of which replica 1 has the last 2
    assert topology.batch_rows(Place(1, 1, 0, 1), 10, 2, 1) == Span(8, 10)
    assert [topology.batch_rows(Place(1, 0, row, 0), 10, 2, 1) for row in range(3)] == [(8, 9), (9, 10), (10, 10)]


def test_describe() -> None:
    names = ["conv2d1", "conv2d2", "linear1"]
    topology = Topology(2, (Stage(0, 1, 3, 1), Stage(1, 3, 1, 2)))
    assert topology.describe(names) == "2 replicas x [conv2d1 3x1 | conv2d2..linear1 1x2]"
    assert Topology(1, (Stage(0, 3, 1, 1),)).describe(names) == "1 replica x [conv2d1..linear1 1x1]"


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_partition_is_the_best_there_is(weights: list[int], data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, len(weights)))

    def cost(cuts: tuple[int, ...]) -> tuple[int, int]:
        sums = [sum(weights[a:b]) for a, b in itertools.pairwise((0, *cuts, len(weights)))]
        return max(sums), sum(s * s for s in sums)

    chosen = partition([float(w) for w in weights], groups)
    assert [s.start for s in chosen] == [0, *(s.stop for s in chosen[:-1])]
    assert chosen[-1].stop == len(weights)
    assert all(s.size for s in chosen)
    best = min(cost(cuts) for cuts in itertools.combinations(range(1, len(weights)), groups - 1))
    assert cost(tuple(s.start for s in chosen[1:])) == best


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet"])
@pytest.mark.parametrize("rows", [1, 7, 32])
def test_layers_layout_uses_all_ranks(networks: Networks, name: str, rows: int) -> None:
    facts = networks[name]
    total, most = sum(w.operations for w in facts), sum(w.units for w in facts) * rows
    for ranks in [*range(1, 201), 255, 256, 257, 499, 512, 733, 997, 999, 1000]:
        topology = layers_layout(facts, ranks, rows)
        assert topology.size == ranks
        assert topology.replicas == 1
        assert len(topology.stages) == min(ranks, len(facts))
        for stage in topology.stages:
            held = facts[stage.first : stage.stop]
            assert stage.cols <= min(w.units for w in held)
            assert stage.rows <= rows or ranks > most, "nobody idles without need"
            if ranks < len(facts):
                assert stage.size == 1
            elif ranks <= 64 and rows == 32:  # where no limit interferes: proportion, rounded, but at least 1
                share = held[0].operations / total * ranks
                assert stage.size < max(share, 1) + 1


def test_layers_layout_rounds_by_largest_remainder() -> None:
    facts = [LayerFacts(str(i), w, 1, 1000, 1, 1) for i, w in enumerate([50.0, 30.0, 14.0, 6.0])]
    # quotas of 9 after 1 for the last: 8 * (50, 30, 14) / 94 = 4.26, 2.55, 1.19
    assert [s.size for s in layers_layout(facts, 9, 100).stages] == [4, 3, 1, 1]


def test_layers_layout_moves_ranks_when_a_prime_cannot_be_factored() -> None:
    # in proportion each would have 13 ranks, a prime: with 8 units and 8 rows only 8, 9, 10, 12, 14, ... can be
    facts = [LayerFacts(str(i), 1.0, 1, 8, 1, 1) for i in range(2)]
    assert sorted(s.size for s in layers_layout(facts, 26, 8).stages) == [12, 14]


def test_layers_layout_with_more_ranks_than_the_network_can_use() -> None:
    facts = [LayerFacts("a", 5.0, 1, 2, 1, 1), LayerFacts("b", 1.0, 1, 2, 1, 1)]
    for ranks in range(1, 60):
        topology = layers_layout(facts, ranks, 3)
        assert topology.size == ranks
        if ranks > 12:  # the heavy layer keeps all the ranks it can use
            assert topology.stages[0].rows >= 3
            assert topology.stages[0].cols == 2


def test_layers_layout_without_operations() -> None:
    facts = [LayerFacts(str(i), 0.0, 0, 4, 1, 1) for i in range(3)]
    assert [s.size for s in layers_layout(facts, 6, 8).stages] == [2, 2, 2]


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 12))
def test_factor_has_the_least_share_and_most_rows(size: int, rows: int, units: int) -> None:
    layer = LayerFacts("a", 3.0, 1, units, 1, 1)
    share, r, c = factor(size, rows, [layer])
    assert r * c == size
    assert c <= units
    grids = [(size // k, k) for k in range(1, min(size, units) + 1) if size % k == 0]
    busy = [grid for grid in grids if grid[0] <= rows] or grids
    others = [(math.ceil(rows / i) * math.ceil(units / k) / (rows * units), -i) for i, k in busy]
    least = min(others)[0]
    assert share == pytest.approx(least)
    assert r == max(-negative for value, negative in others if value <= least * (1 + 1e-9))


def test_given_layout(networks: Networks) -> None:
    topology = given_layout(2, [(1, 3, 1), (5, 1, 2)], networks["cnn"], 10)
    assert topology == Topology(2, (Stage(0, 1, 3, 1), Stage(1, 6, 1, 2)))


@pytest.mark.parametrize(
    ("replicas", "swarms", "ranks", "told"),
    [
        (0, [(6, 1, 1)], 1, r"layout\.replicas: 0 is too few"),
        (1, [], 1, r"layout\.swarms is empty.*swarms: \[\{layers: 6, rows: 1, cols: 1\}\]"),
        (1, [(1, 1, 1), (5, 0, 1)], 2, r"layout\.swarms\[1\]\.rows: 0 is too few"),
        (1, [(1, 1, 1)] * 7, 7, r"7 swarms for the network's 6 weight layers .*conv2d1.*at most 6"),
        (1, [(2, 1, 1), (3, 1, 1)], 2, r"hold 5 weight layers, the network has 6 .*layers: 4 in the last swarm"),
        (1, [(6, 1, 1), (1, 1, 1)], 2, r"hold 7 weight layers, the network has 6 .*take fewer"),
        (1, [(1, 1, 33), (5, 1, 1)], 34, r"swarms\[0\]\.cols: 33 .*the 32 units of conv2d1; at most 32"),
        (1, [(4, 1, 1), (2, 1, 11)], 12, r"swarms\[1\]\.cols: 11 .*the 10 units of linear2; at most 10"),
        (2, [(3, 2, 1), (3, 1, 1)], 5, r"needs 6 ranks, the run has 5: start it with 6 ranks, or .*rows: 3.*rows: 2"),
        (2, [(3, 2, 1), (3, 1, 1)], 9, r"needs 6 ranks, the run has 9: .*replicas: 3,"),
        (1, [(2, 2, 1), (2, 2, 1), (2, 2, 1)], 2, r"needs 6 ranks, the run has 2: .*layers: 3, .*layers: 3"),
    ],
)
def test_given_layout_tells_what_is_possible(
    networks: Networks, replicas: int, swarms: list[tuple[int, int, int]], ranks: int, told: str
) -> None:
    with pytest.raises(LayoutError, match=told):
        given_layout(replicas, swarms, networks["cnn"], ranks)


@settings(max_examples=300, deadline=None)
@given(topologies(), st.integers(1, 60))
def test_the_layout_that_an_error_proposes_is_one(topology: Topology, ranks: int) -> None:
    facts = [LayerFacts(str(i), 1.0, 1, 4, 1, 1) for i in range(topology.stages[-1].stop)]
    swarms = [(s.layers, s.rows, s.cols) for s in topology.stages]
    if topology.size == ranks:
        assert given_layout(topology.replicas, swarms, facts, ranks) == topology
        return
    with pytest.raises(LayoutError) as error:
        given_layout(topology.replicas, swarms, facts, ranks)
    proposed = str(error.value).partition("layout: {")[2]
    numbers = [int(word.strip("[]{},")) for word in proposed.split() if word.strip("[]{},").isdigit()]
    again = list(zip(numbers[1::3], numbers[2::3], numbers[3::3], strict=True))
    assert given_layout(numbers[0], again, facts, ranks).size == ranks


def test_a_layout_is_read_from_its_line(networks: dict[str, list[LayerFacts]]) -> None:
    facts = networks["cnn"]
    names = [layer.name for layer in facts]
    for ranks in (1, 2, 5, 6, 24, 64):
        topology = layers_layout(facts, ranks, 32)
        topology = Topology(3, topology.stages)
        assert layout_of(topology.describe(names), facts, 3 * ranks) == topology
        assert layout_of(topology.describe(names), facts, 3 * ranks + 1) is None
    line = Topology(1, (Stage(0, 6, 1, 2),)).describe(names)
    assert layout_of(line, facts, 2) is not None
    for other in ("", line[:-1], line.replace("conv2d1", "conv2d9"), line.replace("1x2", "2x0"), "1 replica x []"):
        assert layout_of(other, facts, 2) is None
    assert layout_of(line, facts[:-1], 2) is None
    assert layout_of(line.replace("1x2", "1x20"), facts, 20) is None, "more cols than the last layer has units"
