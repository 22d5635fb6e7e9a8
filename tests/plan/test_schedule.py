from __future__ import annotations

import itertools
import random
import re
import time
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nettorrent_mpi.plan.actions import (
    ONCE,
    Action,
    Actions,
    Kind,
    buffers,
    buffers_for,
    parse,
    peak_stored,
    splits,
    step_end,
)
from nettorrent_mpi.plan.checker import check
from nettorrent_mpi.plan.errors import ScheduleError
from nettorrent_mpi.plan.schedule import PIPELINES, build, evaluation, forward_only, gpipe, one_f_one_b
from nettorrent_mpi.plan.timeline import Wire, simulate, table
from nettorrent_mpi.plan.topology import Stage, Topology

pipelines = st.sampled_from(sorted(PIPELINES))
ends = st.builds(step_end, clip=st.booleans(), exact=st.booleans(), parts=st.booleans())
MANY = ["L", "PA", "RA", "F", "WA", "SA", "PG", "RG", "B", "I", "W", "WG", "SG"]  # of a micro-batch


def teams(replicas: int, *sizes: tuple[int, int]) -> Topology:
    return Topology(replicas, tuple(Stage(i, i + 1, rows, cols) for i, (rows, cols) in enumerate(sizes)))


def words(text: str) -> Actions:
    return [parse(word) for word in text.split()]


def per_rank(topology: Topology, lists: list[Actions]) -> list[Actions]:
    return [list(lists[topology.place(rank).stage]) for rank in range(topology.size)]


grids = st.tuples(st.integers(1, 3), st.integers(1, 2))
topologies = st.builds(
    lambda replicas, sizes: teams(replicas, *sizes), st.integers(1, 3), st.lists(grids, min_size=1, max_size=4)
)


@given(st.integers(0, 99), st.sampled_from(MANY), st.integers(0, 99))
def test_actions_print_and_parse(stage: int, kind: Kind, micro_batch: int) -> None:
    action = Action(stage, kind, micro_batch)
    assert str(action) == f"{stage}{kind}{micro_batch}"
    assert parse(str(action)) == action


def test_actions_of_a_step_print_and_parse() -> None:
    assert [parse(text) for text in ("2R", "0N", "11U")] == [Action(2, "R"), Action(0, "N"), Action(11, "U")]
    assert str(Action(2, "R")) == "2R"
    assert [parse(text) for text in ("2R0", "0N12", "11U3")] == [
        Action(2, "R", 0),
        Action(0, "N", 12),
        Action(11, "U", 3),
    ]
    assert str(Action(2, "R", 0)) == "2R0"
    for kind in ONCE:
        for number in (None, 0, 7):
            assert parse(str(Action(3, kind, number))) == Action(3, kind, number)
    assert set(MANY) | set(ONCE) == set(get_args(Kind))


@pytest.mark.parametrize("text", ["", "F0", "2F", "2R-1", "2Z1", "2PR0", "2f0", "-1F0", "2F0 "])
def test_other_texts_are_no_actions(text: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(repr(text))):
        parse(text)


def test_lists_as_written_by_hand() -> None:
    assert gpipe(2, 2) == [words("0F0 0F1 0B0 0B1"), words("1F0 1F1 1B0 1B1")]
    assert one_f_one_b(2, 3) == [words("0F0 0F1 0B0 0F2 0B1 0B2"), words("1F0 1B0 1F1 1B1 1F2 1B2")]
    assert build("1f1b", 3, 1, end=step_end(clip=True)) == [
        words("0PG0 0WA0 0F0 0SA0 0L1 0RG0 0B0 0R 0N 0U 0G"),
        words("1PA0 1PG0 1RA0 1WA0 1F0 1SA0 1RG0 1WG0 1B0 1SG0 1R 1N 1U 1G"),
        words("2PA0 2RA0 2F0 2WG0 2B0 2SG0 2R 2N 2U 2G"),
    ]
    # the last of two stages holds one micro-batch, and so has two buffers for inputs; it sends from two
    assert build("1f1b", 2, 4)[1] == words(
        "1PA0 1PA1 1RA0 1F0 1WG0 1B0 1PA2 1SG0 1RA1 1F1 1WG1 1B1 1PA3 1SG1 1RA2 1F2 1WG2 1B2 1SG2 "
        "1RA3 1F3 1WG3 1B3 1SG3 1R 1U 1G"
    )
    assert evaluation([2, 1], 3) == [
        words("0WA0 0F0 0SA0 0WA1 0F1 0SA1 0WA2 0F2 0SA2"),
        words("1PA0 1PA1 1RA0 1F0 1PA2 1RA1 1F1 1RA2 1F2"),
    ]


def test_what_ends_a_step() -> None:
    assert step_end() == ("R", "U", "G")
    assert step_end(clip=True, parts=True) == ("R", "M", "N", "U", "G")
    assert step_end(exact=False) == ("R", "X", "U", "Y", "G")


@settings(max_examples=200, deadline=None)
@given(pipelines, st.integers(1, 6), st.integers(1, 8))
def test_receives_are_posted_as_soon_as_their_buffers_are_free(p: str, stages: int, micro_batches: int) -> None:
    """Right after the backward that frees the buffer, or first of all; and buffers are waited for right before use."""
    for s, actions in enumerate(build(p, stages, micro_batches)):
        have = buffers_for(s, actions)
        begins, ends = ("I", "W") if splits(actions) else ("B", "B")
        count = 1 + max(a.micro_batch or 0 for a in actions if a.kind == ends)
        for kind, ring, there in (("PA", have.inputs, s > 0), ("PG", have.dy, s < stages - 1)):
            if there:
                first = [a.micro_batch for a in actions[: actions.index(Action(s, "F", 0))] if a.kind == kind]
                assert first == list(range(min(ring, count)))
                for m in range(ring, count):
                    i = actions.index(Action(s, kind, m))
                    assert {a.kind for a in actions[actions.index(Action(s, ends, m - ring)) + 1 : i]} <= {"PA"}
        for before, action in itertools.pairwise(actions):
            if action.kind == "F" and s < stages - 1:
                assert before == Action(s, "WA", action.micro_batch)
            if action.kind == begins and s > 0:
                assert before == Action(s, "WG", action.micro_batch)
            if before.kind == "I" and s > 0:
                assert action == Action(s, "SG", before.micro_batch), "the stage before waits"


LOADS = {  # pipeline, stages, micro-batches: what the first stage does, without its transfers
    ("1f1b", 1, 1): "0F0 0B0 0L1 0R 0U 0G",
    ("1f1b", 1, 2): "0F0 0B0 0F1 0B1 0L2 0R 0U 0G",
    ("1f1b", 2, 3): "0F0 0F1 0L2 0RG0 0B0 0F2 0L3 0RG1 0B1 0RG2 0B2 0R 0U 0G",
    ("gpipe", 3, 2): "0F0 0F1 0L2 0RG0 0B0 0RG1 0B1 0R 0U 0G",
}


@pytest.mark.parametrize("case", LOADS, ids=str)
def test_rows_are_gathered_before_what_has_to_be_waited_for(case: tuple[str, int, int]) -> None:
    assert " ".join(str(a) for a in build(*case)[0] if a.kind not in ("PG", "WA", "SA")) == LOADS[case]
    assert not any(a.kind == "L" for a in evaluation([case[2]] * case[1], case[2])[0])


@pytest.mark.parametrize(
    "pipeline", [pytest.param(name, marks=() if name == "1f1b" else pytest.mark.slow) for name in sorted(PIPELINES)]
)
def test_every_schedule_ends(pipeline: str) -> None:
    for stages, micro_batches, clip in itertools.product(range(1, 10), range(1, 13), (False, True)):
        topology = teams(1 + micro_batches % 2, *((1 + s % 2, 1 + s % 3) for s in range(stages)))
        lists = build(pipeline, stages, micro_batches, end=step_end(clip=clip, exact=not clip))
        check(topology, lists)
        slots = [peak_stored(actions) for actions in lists]
        have = [buffers_for(s, actions) for s, actions in enumerate(lists)]
        check(topology, lists, have)
        for passes in (1, 2 * micro_batches + 3):
            check(topology, evaluation(slots, passes), have)
        for s, actions in enumerate(lists):
            stored = {"gpipe": micro_batches, "1f1b": min(micro_batches, stages - s), "async": stages - s}
            stored["zero_bubble"] = min(micro_batches, stages)
            assert peak_stored(actions) == stored[pipeline]
            assert peak_stored(PIPELINES[pipeline](stages, micro_batches)[s]) == stored[pipeline]
            for kind in ("B", "I", "W"):
                backwards = [a.micro_batch for a in actions if a.kind == kind]
                assert backwards == list(range(len(backwards))), "gradients add up in the same order in every pipeline"


def test_nothing_is_stored_in_evaluation() -> None:
    assert peak_stored(forward_only(1, 5)[0]) == 0


@settings(max_examples=200, deadline=None)
@given(topologies, pipelines, st.integers(1, 5), ends)
def test_lists_per_rank_or_per_stage(t: Topology, pipeline: str, micro_batches: int, end: tuple[Kind, ...]) -> None:
    lists = build(pipeline, len(t.stages), micro_batches, end=end)
    check(t, lists)
    check(t, per_rank(t, lists))


def plays(topology: Topology, lists: list[Actions], slots: list[int], order: random.Random) -> bool:
    """Does every rank come to its end? Each rank on its own, in random order: the rules of `check`, written plainly."""
    dice = random.Random(order.getrandbits(32))
    at = [0] * topology.size
    sent: dict[tuple[int, str], list[int | None]] = {}
    posted: dict[tuple[int, str], list[int | None]] = {}
    last: dict[tuple[int, str, int], int] = {}

    def now(rank: int) -> Action | None:
        return lists[rank][at[rank]] if at[rank] < len(lists[rank]) else None

    def may(rank: int, action: Action) -> bool:
        """Has come, or has been taken, what this rank waits for?"""
        place, way, m = topology.place(rank), action.kind[-1], action.micro_batch
        if action.kind in ("RA", "RG"):
            mine = posted.get((rank, way), [])
            others = topology.team(place.replica, place.stage + (1 if way == "G" else -1))
            return m in mine and all(sent.get((o, way), [])[mine.index(m) :][:1] == [m] for o in others)
        if action.kind in ("WA", "WG"):
            assert m is not None
            number = last.get((rank, way, m % (slots[place.stage] if way == "A" else 2)))
            others = topology.team(place.replica, place.stage + (1 if way == "A" else -1))
            return number is None or all(len(posted.get((o, way), [])) > number for o in others)
        return True

    while True:
        ranks = [rank for rank in range(topology.size) if now(rank)]
        dice.shuffle(ranks)
        moved = False
        for rank in ranks:
            action, place = now(rank), topology.place(rank)
            if action is None:
                continue
            group = [rank]
            if action.kind in ("F", "B", "I", "W", "R", "X", "Y", "G"):
                group = topology.swarm(place.stage)
            elif action.kind == "N":
                group = list(range(topology.size))
            if any((a := now(r)) is None or a[1:] != action[1:] for r in group) or not may(rank, action):
                continue
            way, m = action.kind[-1], action.micro_batch
            if action.kind in ("SA", "SG"):
                assert m is not None
                mine = sent.setdefault((rank, way), [])
                last[rank, way, m % (slots[place.stage] if way == "A" else 2)] = len(mine)
                mine.append(m)
            elif action.kind in ("PA", "PG"):
                posted.setdefault((rank, way), []).append(m)
            for r in group:
                at[r] += 1
            moved = True
        if not moved:
            return not ranks


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(topologies, pipelines, st.integers(1, 4), ends, st.randoms(use_true_random=False))
def test_check_agrees_with_a_plain_play(
    t: Topology, pipeline: str, micro_batches: int, end: tuple[Kind, ...], order: random.Random
) -> None:
    whole = build(pipeline, len(t.stages), micro_batches, end=end)
    slots = [peak_stored(actions) for actions in whole]
    lists = per_rank(t, whole)
    for _ in range(order.randrange(3)):
        actions = order.choice(lists)
        i, j = order.randrange(len(actions)), order.randrange(len(actions))
        if order.random() < 0.3 and len(actions) > 1:
            del actions[i]
        else:
            actions[i], actions[j] = actions[j], actions[i]
    ends = plays(t, lists, slots, order)
    try:
        check(t, lists, [buffers_for(s, actions) for s, actions in enumerate(whole)])
        stuck = False
    except ScheduleError as error:
        stuck = "no rank can continue" in str(error)
    assert stuck == (not ends)


several = topologies.filter(lambda t: len(t.stages) > 1)


@settings(max_examples=300, deadline=None)
@given(several, pipelines, st.integers(1, 4), st.data())
def test_a_missing_transfer_is_named(t: Topology, pipeline: str, micro_batches: int, data: st.DataObject) -> None:
    lists = per_rank(t, build(pipeline, len(t.stages), micro_batches))
    rank = data.draw(st.integers(0, t.size - 1))
    lost = data.draw(st.sampled_from([a for a in lists[rank] if len(a.kind) == 2]))
    lists[rank].remove(lost)
    with pytest.raises(ScheduleError) as error:
        check(t, lists)
    told = str(error.value)
    if lost.kind[0] == "S":  # its receivers wait for it, by name
        step, receive = (1, "RA") if lost.kind == "SA" else (-1, "RG")
        waiting = rf"at {lost.stage + step}{receive}{lost.micro_batch} waits? for {lost} of ranks? .*\b{rank}\b"
        assert re.search(waiting, told)
    elif lost.kind[0] == "P":  # the rank itself cannot go on
        wait = lost._replace(kind="RA" if lost.kind == "PA" else "RG")
        assert re.search(rf"\b{rank}\b.* at {wait} waits? for {lost} of ranks? .*\b{rank}\b", told)
    else:
        assert re.search(rf"{lost} of rank {rank} is missing", told)


@settings(max_examples=200, deadline=None)
@given(several, pipelines, st.integers(2, 6), st.data())
def test_a_buffer_too_few_is_found(t: Topology, pipeline: str, micro_batches: int, data: st.DataObject) -> None:
    lists = build(pipeline, len(t.stages), micro_batches)
    have = [buffers_for(s, actions) for s, actions in enumerate(lists)]
    check(t, lists, have)
    s = data.draw(st.integers(0, len(lists) - 1))
    count = 1 + max(a.micro_batch or 0 for a in lists[s] if a.kind in "BW")
    fewer = {}
    if s and have[s].inputs <= count:
        fewer["inputs"] = r"\dPA\d+ .* takes the input buffer that \d[BW]\d+ still needs"
    if s < len(lists) - 1 and have[s].dy <= count:
        fewer["dy"] = r"\dPG\d+ .* takes the dy buffer that \d[BW]\d+ still needs"
    if have[s].slots > 1:
        fewer["slots"] = r"\dF\d+ .* (takes the slot buffer that \d[BW]\d+ still needs|writes the output buffer of)"
    name = data.draw(st.sampled_from(sorted(fewer))) if fewer else None
    if name:
        have[s] = have[s]._replace(**{name: getattr(have[s], name) - 1})
        with pytest.raises(ScheduleError, match=fewer[name] + "|no rank can continue"):
            check(t, lists, have)


@pytest.mark.parametrize(
    ("stage", "instead", "told"),
    [
        # crossed receives
        (1, ("1PA0", "1PA1"), r"rank 1 at 1RA0 waits for 0SA0 of rank 0, which sent 0SA1 instead"),
        (1, ("1RA0", "1RA1"), r"1F0 of rank 1 comes before 1RA0"),
        # waited for before it is posted
        (1, ("1PA0", "1RA0"), r"rank 1 at 1RA0 waits for 1PA0 of rank 1"),
        # a forward that one rank does in another order than the rest of its swarm cannot begin
        (2, ("2F0", "2F1"), r"rank 2 at 2F1 waits for 2F1 of rank 3, which is at 2F0"),
        # sent before there is a result, received after use
        (0, ("0F0", "0SA0"), r"0SA0 of rank 0 comes before 0F0"),
        (0, ("0RG0", "0B0"), r"0B0 of rank 0 comes before 0RG0"),
        (1, ("1R", "1U"), r"1U of rank 1 comes before 1R|1R of rank 1 comes after 1U"),
    ],
)
def test_swapped_actions_are_named(stage: int, instead: tuple[str, str], told: str) -> None:
    topology = teams(1, (1, 1), (1, 1), (1, 2))
    lists = per_rank(topology, build("gpipe", 3, 3))
    i, j = (lists[stage].index(parse(text)) for text in instead)
    lists[stage][i], lists[stage][j] = lists[stage][j], lists[stage][i]
    with pytest.raises(ScheduleError, match=told):
        check(topology, lists)


TWO = [  # two stages, two micro-batches
    "0PG0 0PG1 0WA0 0F0 0SA0 0WA1 0F1 0SA1 0L2 0RG0 0B0 0RG1 0B1 0R 0U 0G",
    "1PA0 1PA1 1RA0 1F0 1WG0 1B0 1SG0 1RA1 1F1 1WG1 1B1 1SG1 1R 1U 1G",
]


@pytest.mark.parametrize(
    ("stage", "old", "new", "told"),
    [
        (0, "", "", None),
        (1, "1R ", "", r"1R of rank 1, which is at 1U|1R of rank 1 is missing"),
        (1, "1SG0", "1SG0 1SG0", r"1SG0 of rank 1 occurs twice"),
        (1, "1B0 1SG0", "1SG0 1B0", r"1SG0 of rank 1 comes before 1B0"),
        (1, "1U", "1SA0 1U", r"1SA0 of rank 1: there is no stage"),
        (1, "1G", "1G 0F1", r"0F1 of rank 1: these ranks work on stage 1"),
        (0, "0B1 0R", "0R 0B1", r"0R of rank 0 comes before 0B1"),
        (0, "0RG1 0B1 ", "0RG1 ", r"0B1 of rank 0 is missing"),
        (0, "0U 0G", "0G 0U", r"0G of rank 0 comes before 0U"),
        (0, "0R 0U 0G", "0R 0G", r"0U of rank 0 is missing"),
        (0, "0R 0U", "0R 0N 0U", r"0N waits for 1N of rank 1, which is at 1R|1N of rank 1, which has ended"),
        (0, "0WA0 0F0", "0RG0 0WA0 0F0", r"0RG0 of rank 0 occurs twice"),
        (0, "0PG0 0PG1 ", "0PG0 ", r"rank 0 at 0RG1 waits for 0PG1 of rank 0"),
        (0, "0WA1 ", "", r"0WA1 of rank 0 is missing"),
        (0, "0WA1 0F1", "0F1 0WA1", r"0F1 of rank 0 comes before 0WA1"),
        (1, "1WG1 ", "", r"1WG1 of rank 1 is missing"),
        (1, "1RA1 1F1", "1F1 1RA1", r"1F1 of rank 1 comes before 1RA1"),
        (1, "1PA0 1PA1 ", "1PA0 1PA1 1PA2 ", r"1PA2 of rank 1 gets no message from rank 0"),
        (0, "0RG1 0B1 ", "0B1 0RG1 ", r"0B1 of rank 0 comes before 0RG1"),
    ],
)
def test_other_faults_are_named(stage: int, old: str, new: str, told: str | None) -> None:
    texts = [text.replace(old, new) if s == stage else text for s, text in enumerate(TWO)]
    topology, written = teams(1, (1, 1), (1, 1)), [words(text) for text in texts]
    if told is None:
        assert written == build("1f1b", 2, 2)
        check(topology, written)
        return
    with pytest.raises(ScheduleError, match=told):
        check(topology, written)


def test_lists_have_to_fit() -> None:
    check(teams(1, (1, 1), (1, 1)), [[], []])
    with pytest.raises(ScheduleError, match="1 lists for 2 stages"):
        check(teams(1, (1, 1), (1, 1)), [[]])


@pytest.mark.parametrize(
    ("stage", "old", "new", "told"),
    [
        # posted while the buffer's last message is still needed, written while it is still sent
        (1, "1B1 1PA3", "1PA3 1B1", r"1PA3 of rank 1 takes the input buffer that 1B1 still needs"),
        (0, "0B1 0PG3", "0PG3 0B1", r"0PG3 of rank 0 takes the dy buffer that 0B1 still needs"),
        (1, "1SG1", "1WG3 1SG1", r"1B3 of rank 1 writes the dx buffer of 1SG1 before 1WG3 has waited for it"),
        (0, "0SA1", "0WA3 0SA1", r"0F3 of rank 0 writes the output buffer of 0SA1 before 0WA3 has waited for it"),
        (0, "0B1", "0WA3 0F3 0B1", r"0F3 of rank 0 takes the input buffer that 0B1 still needs"),
    ],
)
def test_double_use_of_a_buffer_is_named(stage: int, old: str, new: str, told: str) -> None:
    lists = build("1f1b", 2, 4)
    text = " ".join(str(a) for a in lists[stage] if a.kind != "L")
    moved = [word for word in new.split() if word not in old.split()]
    for word in moved:
        text = text.replace(f"{word} ", "")
    assert old in text
    lists[stage] = words(text.replace(old, new))
    have = [buffers(0, 2), buffers(1, 1)]
    with pytest.raises(ScheduleError, match=told):
        check(teams(1, (1, 1), (1, 1)), lists, have)


def test_buffers_decide() -> None:
    """Stage 0 does all forwards before it receives; stage 1 sends back what it has before it receives more. That ends
    where stage 0 has a buffer for every output, and waits for ever where it has two."""
    lists = [build("gpipe", 2, 5)[0], build("1f1b", 2, 5)[1]]
    topology, have = teams(1, (1, 1), (1, 1)), [buffers(0, 5), buffers(1, 1)]
    check(topology, lists, have)
    told = "rank 0 at 0WA4 waits for 1PA2 of rank 1, which is at 1WG2"
    lists[1] = words(
        "1PA0 1PA1 1RA0 1F0 1WG0 1B0 1SG0 1RA1 1F1 1WG1 1B1 1SG1 1WG2 "
        + " ".join(f"1PA{m} 1RA{m} 1F{m} {f'1WG{m} ' * (m > 2)}1B{m} 1SG{m}" for m in (2, 3, 4))
        + " 1R 1U 1G"
    )
    lists[0] = [action for action in lists[0] if action not in words("0PG0 0PG1")]
    i = lists[0].index(parse("0RG0"))
    lists[0][i:i] = words("0PG0 0PG1")
    check(topology, lists, have)
    with pytest.raises(ScheduleError, match=told):
        check(topology, lists, [buffers(0, 2), buffers(1, 1)])


def test_check_is_quick() -> None:
    topology = teams(10, *[(5, 2)] * 10)
    lists = per_rank(topology, build("1f1b", 10, 16, end=step_end(clip=True)))
    start = time.perf_counter()
    check(topology, lists)
    lists[777].remove(parse("7SA9"))
    with pytest.raises(ScheduleError, match="7SA9 of rank 777"):
        check(topology, lists)
    assert time.perf_counter() - start < 2


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 8), st.integers(1, 12), st.booleans())
def test_bubbles_of_equal_stages_are_the_textbooks(pipeline: str, stages: int, micro_batches: int, full: bool) -> None:
    lists = build(pipeline, stages, micro_batches) if full else PIPELINES[pipeline](stages, micro_batches)
    line = simulate(lists, 1.0, 2.0, 0.0)
    assert line.makespan == pytest.approx(3 * (micro_batches + stages - 1))
    assert line.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@settings(max_examples=200, deadline=None)
@given(pipelines, st.integers(1, 6), st.integers(1, 8), st.data())
def test_the_timeline_respects_order_and_transfers(
    pipeline: str, stages: int, micro_batches: int, data: st.DataObject
) -> None:
    seconds = st.floats(0.01, 5)
    forward, backward, finish = (data.draw(st.lists(seconds, min_size=stages, max_size=stages)) for _ in range(3))
    transfer = data.draw(st.lists(seconds, min_size=stages - 1, max_size=stages - 1))
    lists = build(pipeline, stages, micro_batches, end=step_end(clip=True))
    line = simulate(lists, forward, backward, transfer, finish, [b / 3 for b in backward])
    times = {event.action: event for events in line.stages for event in events}
    for s, (events, actions) in enumerate(zip(line.stages, lists, strict=True)):
        assert [event.action for event in events] == actions
        occupied = [e for e in events if e.action.kind not in ("SA", "SG")]
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(occupied)), "one thing at a time"
        split = splits(actions)
        sends: Kind = "I" if split else "B"
        for m in {a.micro_batch for a in actions if a.kind == "F"}:
            assert times[Action(s, "F", m)].end - times[Action(s, "F", m)].start == pytest.approx(forward[s])
            took = [times[Action(s, kind, m)] for kind in (("I", "W") if split else ("B",))]  # type: ignore[arg-type]
            assert sum(each.end - each.start for each in took) == pytest.approx(backward[s])
            if s:
                arrived = times[Action(s - 1, "F", m)].end + transfer[s - 1]
                assert times[Action(s, "F", m)].start >= arrived - 1e-9
                arrived = times[Action(s, sends, m)].end + transfer[s - 1]
                assert times[Action(s - 1, sends, m)].start >= arrived - 1e-9
    for reduced in [action for action in lists[0] if action.kind == "R"]:
        n = reduced.micro_batch
        norm = max(times[Action(s, "R", n)].end for s in range(stages))
        assert all(times[Action(s, "N", n)].end == pytest.approx(norm) for s in range(stages))
    assert line.makespan == pytest.approx(norm)


def test_simulate_reports_lists_that_wait_for_ever() -> None:
    with pytest.raises(ScheduleError, match="deadlocks at 0B0, 1F0"):
        simulate([words("0B0 0F0"), words("1F0 1B0")], 1, 1, 0)
    with pytest.raises(ScheduleError, match="deadlocks at 0N"):
        simulate([words("0F0 0B0 0N"), words("1F0 1B0")], 1, 1, 0)


@pytest.mark.parametrize(
    ("burst", "starts"), [(0.0, [3.5, 5.5, 7.5, 9.5]), (3.0, [1.5, 2.5, 4.5, 6.5]), (100.0, [1.5, 2.5, 3.5, 4.5])]
)
def test_an_idle_link_takes_a_burst_at_once(burst: float, starts: list[float]) -> None:
    """Messages of 2 seconds leave after each second; a link that was idle carries the first `burst` seconds at once.

    With a burst of 3, the first message leaves the link busy until second 0, the second until 2, the third until 4.
    """
    lists = [[Action(0, "F", m) for m in range(4)], [Action(1, "F", m) for m in range(4)]]
    line = simulate(lists, 1.0, 1.0, [Wire(2.0, 0.5, burst)])
    assert [each.start for each in line.stages[1]] == starts


def test_table() -> None:
    assert table(build("1f1b", 2, 3)).splitlines() == [
        "time     0  1  2  3  4  5  6  7",
        "stage 0 F0 F1  . B0 F2 B1  . B2",
        "stage 1  . F0 B0 F1 B1 F2 B2  .",
    ]
    assert table(forward_only(1, 2)).splitlines() == ["time     0  1", "stage 0 F0 F1"]
