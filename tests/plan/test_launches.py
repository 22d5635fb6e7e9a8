from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nettorrent_mpi.plan.actions import (
    PASSES,
    Action,
    Actions,
    Buffers,
    Kind,
    buffers,
    buffers_for,
    parse,
    peak_stored,
    step_end,
)
from nettorrent_mpi.plan.blocks import Grid, redistribute
from nettorrent_mpi.plan.errors import ScheduleError
from nettorrent_mpi.plan.launches import (
    BEFORE,
    Compute,
    Item,
    OnHost,
    Transfers,
    awaited,
    check_launches,
    launches,
    proved,
)
from nettorrent_mpi.plan.schedule import PIPELINES, build, evaluation
from nettorrent_mpi.plan.stream import stream_step, window_steps
from nettorrent_mpi.plan.topology import Stage, Topology

pipelines = st.sampled_from(sorted(PIPELINES))
ends = st.builds(step_end, clip=st.booleans(), exact=st.booleans(), parts=st.booleans())
grids = st.tuples(st.integers(1, 3), st.integers(1, 2))


def teams(replicas: int, *sizes: tuple[int, int]) -> Topology:
    return Topology(replicas, tuple(Stage(i, i + 1, rows, cols) for i, (rows, cols) in enumerate(sizes)))


topologies = st.builds(
    lambda replicas, sizes: teams(replicas, *sizes), st.integers(1, 3), st.lists(grids, min_size=1, max_size=4)
)


def words(text: str) -> tuple[Action, ...]:
    return tuple(parse(word) for word in text.split())


def rings(lists: Sequence[Actions]) -> list[Buffers]:
    return [buffers_for(s, actions) for s, actions in enumerate(lists)]


def written(items: Iterable[Item]) -> list[str]:
    """One line for each item: its kind, what it waits for, its actions."""
    lines = []
    for item in items:
        after = "" if isinstance(item, OnHost) or item.after is None else f" after {item.after}"
        lines.append(f"{type(item).__name__}{after}: {' '.join(map(str, item.actions))}")
    return lines


def test_launches_as_written_by_hand() -> None:
    lists = build("1f1b", 2, 3, end=step_end(clip=True, exact=False))
    have = rings(lists)
    assert written(launches(lists[0], have[0])) == [
        "Compute after -1: 0F0",
        "Transfers after 0: 0SA0",
        "Compute: 0F1",
        "Transfers after 2: 0SA1 0RG0",
        "Compute after 3: 0L2 0B0 0F2",
        "Transfers after 4: 0SA2 0RG1",
        "Compute after 5: 0L3 0B1",
        "Transfers: 0RG2",
        "Compute after 7: 0B2 0R 0N",
        "OnHost: 0X",
        "Compute: 0U",
        "OnHost: 0Y",
        "Compute: 0G",
    ]
    assert written(launches(lists[1], have[1]))[:5] == [
        "Transfers after -1: 1RA0",
        "Compute after 0: 1F0 1B0",
        "Transfers after 1: 1SG0 1RA1",
        "Compute after 2: 1F1 1B1",
        "Transfers after 3: 1SG1 1RA2",
    ]
    alone = launches(build("gpipe", 1, 2)[0], buffers(0, 2))
    assert written(alone) == ["Compute: 0F0 0F1 0B0 0B1 0L2 0R 0U 0G"], "one graph"
    assert awaited(alone) == {0}
    assert awaited(launches(lists[0], have[0])) == {0, 2, 3, 4, 5, 7, 12}


# -- a plain play, rank by rank, after NCCL's rule --------------------------------------------------------------------

Operation = tuple[Any, ...]  # ("send" | "receive", link, other rank, what) or ("all", group, its members, what)


class Rank:
    """What one rank launches: every launch is a set of operations."""

    def __init__(self, topology: Topology, rank: int, *, exact: bool, of: int, buckets: int, early: bool, apart: bool):
        self.topology, self.rank, self.exact, self.of = topology, rank, exact, of
        self.buckets, self.early, self.apart = buckets, early, apart
        self.place = topology.place(rank)
        replica, s, row, col = self.place
        holders = topology.exact_group(s, col) if exact else topology.row_group(replica, s, col)
        self.cols = ("cols", replica, s, row), topology.col_group(replica, s, row)
        self.holders = ("holders", s, col, 0 if exact else replica), holders

    def launches(self, items: Sequence[Item]) -> list[list[Operation]]:
        last = max((a.micro_batch or 0 for item in items for a in item.actions if a.kind in "BW"), default=0)
        return [launch for item in items for launch in self._item(item, last)]

    def _item(self, item: Item, last: int) -> Iterable[list[Operation]]:
        if isinstance(item, Transfers):
            operations = [operation for action in item.actions for operation in self._pieces(action)]
            if not self.apart:
                return [operations] if operations else []
            links: dict[Any, list[Operation]] = defaultdict(list)
            for operation in operations:
                links[operation[1]].append(operation)
            return links.values()
        return [[operation] for action in item.actions for operation in self._collectives(action, last)]

    def _collectives(self, action: Action, last: int) -> Iterable[Operation]:
        kind, what = action.kind, action[1:]
        replica, s, row, col = self.place
        if kind in PASSES and kind != "W":  # two layers with batch norm, each with its columns
            for layer in range(2):
                yield "all", *self.cols, (*what, layer)
                yield "all", *self.holders, (*what, layer)
        leaves = [("B", last), ("W", last)] if self.early else [("R", action.micro_batch)]
        if what in leaves or kind == "G":
            for bucket in range(self.buckets):
                yield "all", *self.holders, (*what, bucket)
        if kind == "N":
            yield "all", ("replica", replica), self.topology.replica(replica), what
        if kind in ("X", "Y"):
            yield "all", ("peers", s, row, col), self.topology.peers(s, row, col), what

    def _pieces(self, action: Action) -> Iterable[Operation]:
        """The messages that this rank has in a micro-batch of `of` rows."""
        replica, s, row, col = self.place
        sends, forward = action.kind[0] == "S", action.kind[1] == "A"
        upstream = s if sends == forward else s - 1
        writer, reader = self.topology.stages[upstream], self.topology.stages[upstream + 1]
        here = row * self.topology.stages[s].cols + col
        others = self.topology.team(replica, upstream + 1 if upstream == s else upstream)
        for piece in redistribute(self.of, 4, Grid(writer.rows, writer.cols), Grid(reader.rows, reader.cols)):
            mine, other = (piece.source, piece.target) if upstream == s else (piece.target, piece.source)
            if mine == here and piece.rows.size and piece.cols.size:
                way = "send" if sends else "receive"
                yield way, (replica, upstream), others[other], (action.kind[1], action.micro_batch)


def ends_at(todo: Sequence[list[list[Operation]]], dice: random.Random) -> list[int]:
    """Play: one launch at a time on every rank, each operation a rendezvous, in any order. Returns the ranks that do
    not come to their end."""
    at = [0] * len(todo)
    done: list[set[int]] = [set() for _ in todo]
    ranks = list(range(len(todo)))

    def find(rank: int, wanted: Operation, *, equal: bool) -> int | None:
        if at[rank] < len(todo[rank]):
            for i, operation in enumerate(todo[rank][at[rank]]):
                if i not in done[rank] and operation[:3] == wanted[:3]:
                    if equal:
                        assert operation == wanted, "two halves that do not belong together"
                    return i if operation == wanted else None
        return None

    moved = True
    while moved:
        moved = False
        dice.shuffle(ranks)
        for rank in ranks:
            if at[rank] == len(todo[rank]):
                continue
            for i, operation in enumerate(todo[rank][at[rank]]):
                if i in done[rank]:
                    continue
                way, group, other, what = operation
                if way == "all" and rank == other[0]:
                    places = {member: find(member, operation, equal=False) for member in other}
                    if all(j is not None for j in places.values()):
                        for member, j in places.items():
                            done[member].add(j)  # type: ignore[arg-type]
                        moved = True
                elif way == "send" and (j := find(other, ("receive", group, rank, what), equal=True)) is not None:
                    done[rank].add(i)
                    done[other].add(j)
                    moved = True
        for rank in ranks:
            while at[rank] < len(todo[rank]) and len(done[rank]) == len(todo[rank][at[rank]]):
                at[rank] += 1
                done[rank].clear()
                moved = True
    return [rank for rank in sorted(ranks) if at[rank] < len(todo[rank])]


worlds = st.builds(
    dict,
    of=st.integers(1, 7),
    buckets=st.integers(1, 2),
    early=st.booleans(),
    apart=st.booleans(),
)


def play(t: Topology, items: Sequence[Sequence[Item]], exact: bool, world: dict[str, Any], dice: random.Random) -> bool:
    """Play lists of items, one for each stage or for each rank; tell whether all end."""
    per_rank = len(items) == t.size > len(t.stages)
    todo = []
    for rank in range(t.size):
        mine = items[rank if per_rank else t.place(rank).stage]
        todo.append(Rank(t, rank, exact=exact, **world).launches(mine))
    return not ends_at(todo, dice)


def possible(pipeline: str, stages: int, end: tuple[Kind, ...]) -> tuple[Kind, ...]:
    """The norm is never there at one time in a pipeline that does not flush."""
    return tuple(kind for kind in end if kind != "N") if pipeline == "async" and stages > 1 else end


def every_list_ends(
    t: Topology, pipeline: str, micro_batches: int, end: tuple[Kind, ...], world: dict[str, Any], dice: random.Random
) -> None:
    end = possible(pipeline, len(t.stages), end)
    lists = build(pipeline, len(t.stages), micro_batches, end=end)
    have = rings(lists)
    slots = [peak_stored(actions) for actions in lists]
    for those in (lists, evaluation(slots, dice.randrange(1, 8))):
        proved(t, those, have)
        items = [launches(actions, have[s]) for s, actions in enumerate(those)]
        check_launches(t, [items[t.place(rank).stage] for rank in range(t.size)])
        assert play(t, items, "X" not in end, world, dice)


schedules = (topologies, pipelines, st.integers(1, 5), ends, worlds, st.randoms(use_true_random=False))
test_lists_end = settings(max_examples=25, deadline=None)(given(*schedules)(every_list_ends))
test_many_lists_end = pytest.mark.slow(settings(max_examples=400, deadline=None)(given(*schedules)(every_list_ends)))


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", sorted(PIPELINES))
def test_every_schedule_ends(pipeline: str) -> None:
    dice = random.Random(1)
    for stages, micro_batches in itertools.product(range(1, 10), range(1, 13)):
        topology = teams(1 + micro_batches % 2, *((1 + s % 2, 1 + s % 3) for s in range(stages)))
        lists = build(pipeline, stages, micro_batches, end=possible(pipeline, stages, step_end(clip=True)))
        have = rings(lists)
        proved(topology, lists, have)
        if stages * micro_batches <= 30:
            items = [launches(actions, have[s]) for s, actions in enumerate(lists)]
            world = {"of": 5, "buckets": 2, "early": True, "apart": True}
            assert play(topology, items, True, world, dice)


# -- planted faults ---------------------------------------------------------------------------------------------------


def apart(items: Sequence[Item]) -> list[Item]:
    """One launch for each transfer."""
    return [
        one
        for item in items
        for one in ([Transfers((a,)) for a in item.actions] if isinstance(item, Transfers) else [item])
    ]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_launch_for_each_transfer_deadlocks(stages: int) -> None:
    topology = teams(1, *[(1, 1)] * stages)
    for pipeline, micro_batches in itertools.product(("1f1b", "async"), (4, 8)):
        lists = build(pipeline, stages, micro_batches)
        have = rings(lists)
        items = [launches(actions, have[s]) for s, actions in enumerate(lists)]
        check_launches(topology, items)
        with pytest.raises(ScheduleError, match=r"stage 0 in \[0SA\d\], which waits for 1RA\d of stage 1, which is in"):
            check_launches(topology, [apart(those) for those in items])
        world = {"of": 5, "buckets": 1, "early": False, "apart": False}
        assert not play(topology, [apart(those) for those in items], True, world, random.Random(1))


@settings(max_examples=150, deadline=None)
@given(topologies, pipelines, st.integers(1, 4), ends, worlds, st.randoms(use_true_random=False))
def test_what_a_plain_play_finds_the_proof_finds(
    t: Topology, pipeline: str, micro_batches: int, end: tuple[Kind, ...], world: dict[str, Any], dice: random.Random
) -> None:
    """Items of one rank are swapped, lost, or lose an action; the proof may be stricter, never more lenient."""
    lists = build(pipeline, len(t.stages), micro_batches, end=end)
    have = rings(lists)
    whole = [launches(actions, have[s]) for s, actions in enumerate(lists)]
    items = [list(whole[t.place(rank).stage]) for rank in range(t.size)]
    those = dice.choice(items)
    i, j = dice.randrange(len(those)), dice.randrange(len(those))
    if dice.random() < 0.3:
        those[i] = those[i]._replace(actions=those[i].actions[1:])
    else:
        those[i], those[j] = those[j], those[i]
    try:
        check_launches(t, items)
    except ScheduleError:
        return
    assert play(t, items, "X" not in end, world, dice)


def test_faults_are_named() -> None:
    topology = teams(1, (1, 1), (1, 1))  # a stage sends what the next one receives only after the norm of all stages
    lists = build("async", 2, 1, end=step_end(clip=True))
    with pytest.raises(ScheduleError, match=r"stage 0 in \[0SA1 0RG0\], which waits for 1RA1 of stage 1, which is in"):
        proved(topology, lists, rings(lists))
    topology = teams(1, (1, 1), (2, 1))
    lists = build("1f1b", 2, 3)
    have = rings(lists)
    first, second = (launches(actions, have[s]) for s, actions in enumerate(lists))
    check_launches(topology, [first, second, second])
    late = [*second[:2], second[4], second[3], second[2], *second[5:]]
    with pytest.raises(ScheduleError, match="0SA1 of rank 0 meets 1RA2 of rank 1 instead of 1RA1"):
        check_launches(topology, [first, late, second])
    swapped = [*second[:1], Compute(words("1B0 1F0")), *second[2:]]
    with pytest.raises(ScheduleError, match=r"rank 1 in \[1B0\], which waits for rank 2, which is in \[1F0\]"):
        check_launches(topology, [first, swapped, second])
    with pytest.raises(ScheduleError, match=r"waits for 1SG2 of rank 2, which has ended"):
        check_launches(topology, [first, second, second[:-2]])
    with pytest.raises(ScheduleError, match="1 lists for 2 stages of 3 ranks"):
        check_launches(topology, [first])


# -- what waits for what ----------------------------------------------------------------------------------------------


def unordered(lists: Sequence[tuple[Actions, int, bool]], stage: int, stages: int, have: Buffers, forget: int | None):
    """Run lists of one stage, each with its number of micro-batches and whether the pipeline was empty before, on two
    streams; return what conflicts in a buffer and is not ordered by events, and the number of waits. `forget`: the wait
    that is left out."""
    base = waits = 0
    clocks: list[tuple[int, int]] = []  # of each launch: the last of both streams before it
    last = [-1, -1]  # the last launch of each stream
    streams: list[int] = []
    uses: dict[tuple[str, int], list[tuple[int, str, int]]] = defaultdict(list)
    wrong = []
    for actions, count, first in lists:
        base = 0 if first else base
        start, before = len(clocks), list(last)
        training = any(action.kind in "BW" for action in actions)
        for item in launches(actions, have):
            number, stream = len(clocks), int(isinstance(item, Transfers))
            clock = list(clocks[last[stream]]) if last[stream] >= 0 else [-1, -1]
            clock[stream] = last[stream]
            if not isinstance(item, OnHost) and item.after is not None:
                target = before[1 - stream] if item.after == BEFORE else start + item.after
                if waits != forget and target >= 0:
                    assert streams[target] == 1 - stream
                    clock = [max(a, b) for a, b in zip(clock, clocks[target], strict=True)]
                    clock[1 - stream] = max(clock[1 - stream], target)
                waits += 1
            clocks.append((clock[0], clock[1]))
            streams.append(stream)
            last[stream] = number
            for _, kind, m in item.actions:
                g = base + (m or 0)
                x, y, dy, dx = ("x", g % have.inputs), ("y", g % have.slots), ("dy", g % have.dy), ("dx", g % have.dx)
                accesses = {"RA": ["w", x], "SA": ["r", y], "RG": ["w", dy], "SG": ["r", dx]}
                accesses |= {"F": ["r", x, "w", y], "B": ["r", x, "r", y, "r", dy, "w", dx]} if training else {}
                accesses |= {"I": ["r", x, "r", y, "r", dy, "w", dx], "W": ["r", x, "r", dy]} if training else {}
                accesses.setdefault("F", ["r", x, "w", y])
                todo = accesses.get(kind, [])
                for how, buffer in zip(todo[::2], todo[1::2], strict=True):
                    if (buffer[0] in ("x", "dx") and stage == 0) or (buffer[0] in ("y", "dy") and stage == stages - 1):
                        continue
                    for other, did, content in reversed(uses[buffer]):
                        if other != number and "w" in (how, did) and clock[streams[other]] < other:
                            wrong.append((item, buffer, other))
                        if did == "w":
                            assert how == "w" or content == g, "the buffer holds another micro-batch"
                            break
                    uses[buffer].append((number, how, g))
        base += count
    return wrong, waits


def several(pipeline: str, stages: int, micro_batches: int, stage: int, end: Sequence[Kind], evaluated: int):
    """Lists of one stage: steps until the pipeline is empty, an evaluation, and once more."""
    lists = build(pipeline, stages, micro_batches, end=end)
    slots = [peak_stored(actions) for actions in lists]
    steps: list[tuple[Actions, int, bool]] = [(lists[stage], micro_batches, True)] * 3
    if pipeline == "async":
        number = window_steps(stages, micro_batches) + 1
        steps = []
        for n in range(number):
            step = stream_step(stages, micro_batches, stage, first=n == 0, left=number - n, end=end)
            steps.append((step, micro_batches, n == 0))
    passes = evaluation(slots, evaluated)[stage]
    return [*steps, (passes, evaluated, True), *steps], buffers_for(stage, lists[stage])


@settings(max_examples=150, deadline=None)
@given(pipelines, st.integers(1, 5), st.integers(1, 6), ends, st.integers(1, 6), st.data())
def test_events_order_all_uses_of_a_buffer(
    pipeline: str, stages: int, micro_batches: int, end: tuple[Kind, ...], evaluated: int, data: st.DataObject
) -> None:
    """No compute overwrites what is still being sent or reads what has not arrived, no receive overwrites what is still
    read."""
    stage = data.draw(st.integers(0, stages - 1))
    lists, have = several(pipeline, stages, micro_batches, stage, end, evaluated)
    wrong, waits = unordered(lists, stage, stages, have, None)
    assert not wrong
    assert (waits > 0) == (stages > 1)


@settings(max_examples=100, deadline=None)
@given(pipelines, st.integers(2, 5), st.integers(1, 6), st.data())
def test_a_wait_left_out_is_found(pipeline: str, stages: int, micro_batches: int, data: st.DataObject) -> None:
    """No wait within a list is there for nothing, and the test above would find its absence."""
    stage = data.draw(st.integers(0, stages - 1))
    lists, have = several(pipeline, stages, micro_batches, stage, step_end(), 3)
    items = [item for actions, _, _ in lists for item in launches(actions, have) if not isinstance(item, OnHost)]
    waits = [item for item in items if item.after is not None]
    within = [number for number, item in enumerate(waits) if item.after != BEFORE]
    forget = data.draw(st.sampled_from(within))
    assert unordered(lists, stage, stages, have, forget)[0]


def test_the_proof_is_quick() -> None:
    topology = teams(10, *[(5, 2)] * 10)
    lists = build("1f1b", 10, 64, end=step_end(clip=True))
    began = time.perf_counter()
    proved(topology, lists, rings(lists))
    assert time.perf_counter() - began < 2
