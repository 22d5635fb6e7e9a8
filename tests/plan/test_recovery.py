"""Recoveries: which copies make up a whole state, whatever is lost and whenever, and where the survivors go on."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nettorrent_mpi.plan.actions import Actions
from nettorrent_mpi.plan.checker import check
from nettorrent_mpi.plan.errors import ScheduleError
from nettorrent_mpi.plan.recovery import (
    PLACES,
    Bring,
    Copies,
    Kept,
    LiveReplicas,
    Snapshot,
    Survivor,
    buddies,
    copies_due,
    layout_of_survivors,
    places_of_survivors,
    replicas_of_survivors,
    source,
)
from nettorrent_mpi.plan.schedule import build
from nettorrent_mpi.plan.stream import stream
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology

ONE = Topology(1, (Stage(0, 1, 4, 1),))


# -- buddies ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=24))
def test_buddies_are_a_permutation_over_nodes(nodes: list[int]) -> None:
    found, size = buddies(nodes), len(nodes)
    assert sorted(found) == list(range(size))
    assert size == 1 or all(found[rank] != rank for rank in range(size))
    together = sum(nodes[rank] == nodes[found[rank]] for rank in range(size))
    assert together == max(2 * max(Counter(nodes).values()) - size, 0)
    assert sum(found[found[rank]] != rank for rank in range(size)) == (3 if size % 2 and size > 1 else 0)


def test_buddies_by_hand() -> None:
    assert buddies([0]) == [0]
    assert buddies([0, 0]) == [1, 0]
    assert buddies([0, 0, 0]) == [1, 2, 0]
    assert buddies([0, 0, 2, 2]) == [2, 3, 0, 1]
    assert buddies([0, 1, 0, 1, 0, 1]) == [1, 0, 3, 2, 5, 4]


# -- copies -----------------------------------------------------------------------------------------------------------


class Player:
    """One rank: its copies and what is really in their places, the step whose messages are under way, its barrier."""

    def __init__(self, rank: int):
        self.rank, self.copies = rank, Copies()
        self.own: list[object] = [None] * PLACES
        self.ward: list[object] = [None] * PLACES
        self.place = self.step = 0
        self.entered = 0  # barriers
        self.left = 0  # barriers


class Play:
    """Ranks that keep copies step after step. A random order decides who does what next; messages may be half written
    when ranks are lost."""

    def __init__(self, nodes: list[int], every: int, draw: random.Random):
        self.keepers, self.every, self.draw = buddies(nodes), every, draw
        self.players = [Player(rank) for rank in range(len(nodes))]
        self.sent: list[list[tuple[int, str]]] = [[] for _ in nodes]  # to each rank, in order
        self.whole: list[int] = []  # steps that some rank knew to be whole

    def go(self) -> None:
        """One rank does one thing that is possible."""
        possible = [action for player in self.players for action in self.actions(player)]
        if possible:
            what, player = self.draw.choice(possible)
            getattr(self, what)(player)

    def actions(self, player: Player) -> list[tuple[str, Player]]:
        found = []
        if player.copies.latest == player.copies.whole:
            found.append(("begin", player))
        elif player.entered == player.left:
            if self.sent[player.rank]:
                found += [("half", player), ("arrive", player)]
        elif all(other.entered >= player.entered for other in self.players):
            found.append(("leave", player))
        return found

    def begin(self, player: Player) -> None:
        player.step += self.every
        player.place = player.copies.begin(player.step)
        player.own[player.place] = (player.rank, player.step)
        self.sent[self.keepers[player.rank]].append((player.rank, str(player.step)))

    def half(self, player: Player) -> None:
        player.ward[player.place] = "half written"

    def arrive(self, player: Player) -> None:
        ward, step = self.sent[player.rank].pop(0)
        assert int(step) == player.step
        player.ward[player.place] = (ward, player.step)
        player.copies.arrived()
        player.entered += 1

    def leave(self, player: Player) -> None:
        player.left += 1
        player.copies.all_have()
        self.whole.append(player.step)

    def survivors(self, lost: set[int]) -> list[Survivor]:
        found = []
        for player in self.players:
            if player.rank not in lost:
                of = player.rank, self.keepers.index(player.rank)
                kept = []
                for step, ward, place in player.copies.kept():
                    there = (player.ward if ward else player.own)[place]
                    assert there == (of[ward], step), "a copy that is taken for complete is not"
                    kept.append(Kept(step, of[ward]))
                found.append(Survivor(player.rank, kept))
        return found


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=6), st.integers(1, 5), st.integers(0, 2**32), st.data())
def test_the_last_step_known_to_be_whole_is_never_lost(
    nodes: list[int], every: int, seed: int, data: st.DataObject
) -> None:
    """Whatever the order of events, and whenever ranks are lost of which none keeps another's blocks."""
    play, size = Play(nodes, every, random.Random(seed)), len(nodes)
    for _ in range(data.draw(st.integers(0, 60))):
        play.go()
    topology = Topology(1, (Stage(0, 1, size, 1),))
    for count in range(size):
        for lost in map(set, combinations(range(size), count)):
            found = source(topology, False, play.survivors(lost))
            if any(play.keepers[rank] in lost for rank in lost):
                continue
            if play.whole:
                assert isinstance(found, Snapshot)
                assert found.step >= max(play.whole)
                # While one step's copies travel nobody begins another: at most one step is lost besides.
                assert max(player.step for player in play.players) - found.step <= 2 * every
            if found is not None:
                assert isinstance(found, Snapshot)
                assert {bring.step for bring in found.bring} == {found.step}
                assert [bring.rank for bring in found.bring] == list(range(size))


def test_every_rank_gets_on() -> None:
    """The barriers stop nobody for ever."""
    play = Play([0, 0, 1, 1, 2], 1, random.Random(1))
    for _ in range(2000):
        play.go()
    assert min(player.left for player in play.players) > 20


# -- how often ------------------------------------------------------------------------------------------------------


def test_copies_take_a_hundredth_of_the_time() -> None:
    assert copies_due(0.0018, 0.0029) == 63
    assert copies_due(1e-4, 0.02) == 1
    assert copies_due(2e-4, 0.02) == 1
    assert copies_due(2.1e-4, 0.02) == 2
    assert copies_due(0.9, 0.2) == 150  # 30 seconds, not 450 steps
    assert copies_due(9.0, 45.0) == 1


@given(st.floats(1e-6, 1e4), st.floats(1e-6, 1e4))
def test_copies_are_seldom_but_not_too_seldom(copies: float, step: float) -> None:
    every = copies_due(copies, step)
    assert every >= 1
    assert every == 1 or every * step <= 30.001
    assert copies <= 0.01 * every * step * 1.001 or (every + 1) * step > 30  # less often would lose too much
    assert every == 1 or copies > 0.01 * (every - 1) * step * 0.999  # and no more seldom than that


# -- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["1f1b", "gpipe", "async"])
@pytest.mark.parametrize("stages", range(2, 8))
def test_a_step_is_completed_without_what_others_do_later(pipeline: str, stages: int) -> None:
    """So a rank may wait, after a step, until all others have done it, with the next step not begun."""
    for micro_batches in (1, 2, 3, 4, 7):
        for step in range(4):
            lists = _until(pipeline, stages, micro_batches, step)
            topology = Topology(1, tuple(Stage(s, s + 1, 1, 1) for s in range(stages)))
            problem = ""
            try:
                check(topology, lists)
            except ScheduleError as error:  # messages that the lists' continuation receives
                problem = str(error)
            assert "deadlock" not in problem


def _until(pipeline: str, stages: int, micro_batches: int, step: int) -> list[Actions]:
    """The lists of a training up to the end of this step, cut out of a longer one."""
    if pipeline != "async":
        return build(pipeline, stages, micro_batches)
    found = []
    for actions in stream(stages, micro_batches, 9):
        end = next(i for i, action in enumerate(actions) if action.kind == "G" and action.micro_batch == step)
        found.append(actions[: end + 1])
    return found


# -- the source of the state ------------------------------------------------------------------------------------------


def test_a_rank_brings_its_own_copy_and_the_buddy_that_of_a_lost_one() -> None:
    kept = [Survivor(0, [Kept(5, 0), Kept(10, 0), Kept(5, 2)]), Survivor(1, [Kept(5, 1), Kept(10, 1), Kept(5, 3)])]
    kept.append(Survivor(3, [Kept(10, 3), Kept(5, 3), Kept(10, 1)]))
    found = source(ONE, False, kept)
    assert found == Snapshot((0,), 5, (Bring(0, 0, 5), Bring(1, 1, 5), Bring(0, 2, 5), Bring(2, 3, 5)))
    assert source(ONE, False, kept[1:]) is None
    assert source(ONE, False, [Survivor(rank) for rank in range(4)]) is None


def test_replicas_that_live_go_on_with_what_they_hold() -> None:
    topology = Topology(3, (Stage(0, 1, 2, 1),))
    kept = [Survivor(rank, [Kept(10, rank)], live) for rank, live in ((0, 17), (1, 17), (3, None), (4, 19), (5, 19))]
    assert source(topology, True, kept) == LiveReplicas((0, 2), 19)
    assert source(topology, True, kept[:3]) == LiveReplicas((0,), 17)


def test_of_broken_replicas_the_whole_copies_count() -> None:
    topology = Topology(3, (Stage(0, 1, 2, 1),))
    kept = [
        Survivor(1, [Kept(10, 1), Kept(10, 0)]),
        Survivor(2, [Kept(20, 2)]),
        Survivor(4, [Kept(30, 5), Kept(30, 4)]),
    ]
    found = source(topology, True, kept)
    assert found == Snapshot((0, 2), 30, (Bring(0, 0, 10), Bring(0, 1, 10), Bring(2, 4, 30), Bring(2, 5, 30)))
    assert source(topology, True, kept[1:2]) is None


# -- the layout of the survivors --------------------------------------------------------------------------------------


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    layers = draw(st.integers(1, 5))
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1), max_size=3))) if layers > 1 else []
    bounds = [0, *cuts, layers]
    small = st.integers(1, 3)
    stages = tuple(Stage(a, b, draw(small), draw(small)) for a, b in pairwise(bounds))
    return Topology(draw(st.integers(1, 4)), stages)


def facts_of(layers: int, seed: int) -> list[LayerFacts]:
    draw = random.Random(seed)
    found = []
    for i in range(layers):
        units, inputs = draw.randint(3, 300), draw.randint(3, 300)
        found.append(LayerFacts(f"linear{i}", 6.0 * inputs * units, inputs * units + units, units, inputs, units))
    return found


@settings(max_examples=25, deadline=None)
@given(topologies(), st.integers(0, 99), st.sampled_from(["1f1b", "gpipe", "async"]), st.booleans())
def test_any_number_of_survivors_has_a_valid_layout(old: Topology, seed: int, pipeline: str, exact: bool) -> None:
    layers = old.stages[-1].stop
    facts, team = facts_of(layers, seed), old.size // old.replicas
    for ranks in range(1, old.size):
        for live in range(1, old.replicas + 1) if not exact else [1]:
            new = layout_of_survivors(facts, old, ranks, live, 32, lambda stages, replicas: 4, pipeline, exact=exact)
            assert new.stages[-1].stop == layers
            assert all(s.cols <= min(f.units for f in facts[s.first : s.stop]) for s in new.stages)
            assert {s.first for s in new.stages} <= {s.first for s in old.stages}  # no stage is cut in two
            assert len(new.stages) == min(len(old.stages), ranks // new.replicas)
            assert new.replicas <= old.replicas
            if exact:
                assert new.size == ranks
            else:
                assert new.replicas == replicas_of_survivors(old, ranks, live)
                assert 0 <= ranks - new.size < new.replicas  # no replica could have one rank more
            if not exact and ranks // new.replicas == team:
                assert new.stages == old.stages
            elif exact and ranks % team == 0:
                assert new == Topology(ranks // team, old.stages)


def test_as_many_replicas_as_there_is_room_for() -> None:
    two = Topology(3, (Stage(0, 1, 1, 1), Stage(1, 2, 1, 1)))
    assert [replicas_of_survivors(two, ranks, 3) for ranks in range(1, 7)] == [1, 1, 1, 2, 2, 3]
    assert [replicas_of_survivors(two, ranks, 1) for ranks in range(1, 7)] == [1] * 6
    assert [replicas_of_survivors(ONE, ranks, 3) for ranks in range(1, 7)] == [1, 2, 3, 3, 3, 3]


def survivors_of(old: Topology, lost: set[int], newest: int) -> list[Survivor]:
    """Return what ranks bring that kept copies within their replica, and whose replica is at rest where all of it
    lives."""
    found = []
    for rank in sorted(set(range(old.size)) - lost):
        members = old.replica(old.place(rank).replica)
        ward = members[buddies([0] * len(members)).index(members.index(rank))]
        whole = not lost.intersection(members)
        found.append(Survivor(rank, [Kept(newest, rank), Kept(newest, ward)], newest + 7 if whole else None))
    return found


@settings(max_examples=40, deadline=None)
@given(topologies().filter(lambda topology: topology.size <= 12), st.integers(0, 99))
def test_live_replicas_go_on_as_they_are(old: Topology, seed: int) -> None:
    """Whichever ranks are lost: no live replica is merged with others, whole teams stay where they are, and only ranks
    of broken replicas have no place."""
    facts, draw = facts_of(old.stages[-1].stop, seed), random.Random(seed)
    sets = [set(lost) for count in range(1, old.size) for lost in combinations(range(old.size), count)]
    for lost in draw.sample(sets, min(60, len(sets))):
        survivors = survivors_of(old, lost, 10)
        ranks = [survivor.rank for survivor in survivors]
        found = source(old, True, survivors)
        there = old.replicas if found is None else len(found.replicas)
        new = layout_of_survivors(facts, old, len(ranks), there, 32, lambda s, r: 4, "1f1b", exact=False)
        staying = places_of_survivors(old, ranks, found, new.size)
        assert len(staying) == new.size
        assert staying == sorted(set(staying))
        live = [r for r in range(old.replicas) if not lost.intersection(old.replica(r))]
        if not live:
            continue
        assert isinstance(found, LiveReplicas)
        assert list(found.replicas) == live
        assert new.replicas == len(live)
        kept = [ranks[position] for position in staying]
        assert set(kept) >= {rank for replica in live for rank in old.replica(replica)}
        if new.stages == old.stages:
            assert kept == [rank for replica in live for rank in old.replica(replica)]
            for number, rank in enumerate(kept):
                assert new.place(number) == old.place(rank)._replace(replica=live.index(old.place(rank).replica))


def test_with_an_exact_exchange_all_survivors_have_a_place() -> None:
    survivors = survivors_of(ONE, {2}, 10)
    assert places_of_survivors(ONE, [survivor.rank for survivor in survivors], source(ONE, False, survivors), 3) == [
        0,
        1,
        2,
    ]
