from __future__ import annotations

import itertools
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nettorrent_mpi.plan.actions import with_loads
from nettorrent_mpi.plan.errors import ScheduleError
from nettorrent_mpi.plan.schedule import (
    PIPELINES,
    Action,
    Actions,
    Kind,
    add_transfers,
    build,
    check,
    forward_only,
    gpipe,
    one_f_one_b,
    parse,
    peak_stored,
    simulate,
    table,
)
from nettorrent_mpi.plan.topology import Stage, Topology

pipelines = st.sampled_from(sorted(PIPELINES))


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


@given(st.integers(0, 99), st.sampled_from(["F", "B", "L", "SA", "RA", "SG", "RG"]), st.integers(0, 99))
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


@pytest.mark.parametrize("text", ["", "F0", "2F", "2R-1", "2X1", "2f0", "-1F0", "2F0 "])
def test_other_texts_are_no_actions(text: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(repr(text))):
        parse(text)


def test_lists_as_written_by_hand() -> None:
    assert gpipe(2, 2) == [words("0F0 0F1 0B0 0B1"), words("1F0 1F1 1B0 1B1")]
    assert one_f_one_b(2, 3) == [words("0F0 0F1 0B0 0F2 0B1 0B2"), words("1F0 1B0 1F1 1B1 1F2 1B2")]
    assert build("1f1b", 3, 1, clip=True) == [
        words("0F0 0SA0 0RG0 0B0 0R 0N 0U"),
        words("1RA0 1F0 1SA0 1RG0 1B0 1SG0 1R 1N 1U"),
        words("2RA0 2F0 2B0 2SG0 2R 2N 2U"),
    ]
    assert add_transfers(forward_only(2, 2)) == [words("0F0 0SA0 0F1 0SA1"), words("1RA0 1F0 1RA1 1F1")]


LOADS = {  # pipeline, stages, micro-batches: what the first stage does
    ("1f1b", 1, 1): "0F0 0B0 0L1 0R 0U",
    ("1f1b", 1, 2): "0F0 0B0 0F1 0B1 0L2 0R 0U",
    ("1f1b", 2, 3): "0F0 0SA0 0F1 0SA1 0L2 0RG0 0B0 0F2 0SA2 0L3 0RG1 0B1 0RG2 0B2 0R 0U",
    ("gpipe", 3, 2): "0F0 0SA0 0F1 0SA1 0L2 0RG0 0B0 0RG1 0B1 0R 0U",
}


@pytest.mark.parametrize("case", LOADS, ids=str)
def test_rows_are_gathered_before_what_has_to_be_waited_for(case: tuple[str, int, int]) -> None:
    assert " ".join(map(str, with_loads(build(*case)[0]))) == LOADS[case]
    evaluation = add_transfers(forward_only(*case[1:]))[0]
    assert with_loads(evaluation) == evaluation


@pytest.mark.parametrize("pipeline", sorted(PIPELINES))
def test_every_schedule_ends(pipeline: str) -> None:
    for stages, micro_batches, clip in itertools.product(range(1, 10), range(1, 13), (False, True)):
        topology = teams(1 + micro_batches % 2, *((1 + s % 2, 1 + s % 3) for s in range(stages)))
        lists = build(pipeline, stages, micro_batches, clip=clip)
        check(topology, lists)
        check(topology, add_transfers(forward_only(stages, micro_batches)))
        for s, actions in enumerate(lists):
            stored = {"gpipe": micro_batches, "1f1b": min(micro_batches, stages - s), "async": stages - s}
            assert peak_stored(actions) == stored[pipeline]
            assert peak_stored(PIPELINES[pipeline](stages, micro_batches)[s]) == stored[pipeline]
            backwards = [a.micro_batch for a in actions if a.kind == "B"]
            assert backwards == list(range(len(backwards))), "gradients add up in the same order in every pipeline"


def test_nothing_is_stored_in_evaluation() -> None:
    assert peak_stored(forward_only(1, 5)[0]) == 0


@settings(max_examples=200, deadline=None)
@given(topologies, pipelines, st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_lists_per_rank_or_per_stage(t: Topology, pipeline: str, micro_batches: int, cap: int, clip: bool) -> None:
    lists = build(pipeline, len(t.stages), micro_batches, clip=clip)
    check(t, lists, cap)
    check(t, per_rank(t, lists), cap)


def plays(topology: Topology, lists: list[Actions], capacity: int, order: random.Random) -> bool:
    """Does every rank come to its end? Each rank on its own, in random order: the rules of `check`, written plainly."""
    at = [0] * topology.size
    sent: dict[tuple[int, str], list[int | None]] = {}
    got: dict[tuple[int, str], int] = {}

    def now(rank: int) -> Action | None:
        return lists[rank][at[rank]] if at[rank] < len(lists[rank]) else None

    while True:
        ranks = [rank for rank in range(topology.size) if now(rank)]
        order.shuffle(ranks)
        for rank in ranks:
            action, place = now(rank), topology.place(rank)
            assert action is not None
            way, group = action.kind[-1], [rank]
            step = 1 if action.kind in ("SA", "RG") else -1
            others = topology.team(place.replica, place.stage + step) if action.kind[0] in "SR" and way in "AG" else []
            if action.kind in ("F", "B", "R"):
                group = topology.swarm(place.stage)
            elif action.kind == "N":
                group = list(range(topology.size))
            if any((a := now(r)) is None or a[1:] != action[1:] for r in group):
                continue
            mine = sent.setdefault((rank, way), [])
            if action.kind[0] == "S":
                if any(len(mine) - got.get((o, way), 0) >= capacity for o in others):
                    continue
                mine.append(action.micro_batch)
            elif others:
                number = got.get((rank, way), 0)
                if any(sent.get((o, way), [])[number : number + 1] != [action.micro_batch] for o in others):
                    continue
                got[rank, way] = number + 1
            for r in group:
                at[r] += 1
            break
        else:
            return not ranks


@settings(max_examples=300, deadline=None)
@given(topologies, pipelines, st.integers(1, 4), st.integers(1, 2), st.booleans(), st.randoms(use_true_random=False))
def test_check_agrees_with_a_plain_play(
    t: Topology, pipeline: str, micro_batches: int, capacity: int, clip: bool, order: random.Random
) -> None:
    lists = per_rank(t, build(pipeline, len(t.stages), micro_batches, clip=clip))
    for _ in range(order.randrange(3)):
        actions = order.choice(lists)
        i, j = order.randrange(len(actions)), order.randrange(len(actions))
        if order.random() < 0.3 and len(actions) > 1:
            del actions[i]
        else:
            actions[i], actions[j] = actions[j], actions[i]
    ends = plays(t, lists, capacity, order)
    try:
        check(t, lists, capacity)
        stuck = False
    except ScheduleError as error:
        stuck = "no rank can go on" in str(error)
    assert stuck == (not ends)


@settings(max_examples=200, deadline=None)
@given(topologies.filter(lambda t: len(t.stages) > 1), pipelines, st.integers(1, 4), st.data())
def test_a_missing_transfer_is_named(t: Topology, pipeline: str, micro_batches: int, data: st.DataObject) -> None:
    lists = per_rank(t, build(pipeline, len(t.stages), micro_batches))
    rank = data.draw(st.integers(0, t.size - 1))
    lost = data.draw(st.sampled_from([a for a in lists[rank] if a.kind in ("SA", "RA", "SG", "RG")]))
    lists[rank].remove(lost)
    with pytest.raises(ScheduleError) as error:
        check(t, lists)
    if lost.kind[0] == "S":  # its receivers wait for it, by name
        step, receive = (1, "RA") if lost.kind == "SA" else (-1, "RG")
        waiting = rf"at {lost.stage + step}{receive}{lost.micro_batch} waits? for {lost} of ranks? .*\b{rank}\b"
        assert re.search(waiting, str(error.value))
    else:
        assert re.search(rf"\b{rank}\b", str(error.value))
        assert str(lost.micro_batch) in str(error.value)


@pytest.mark.parametrize(
    ("stage", "instead", "told"),
    [
        # crossed receives
        (1, ("1RA0", "1RA1"), r"rank 1 at 1RA1 waits for 0SA1 of rank 0, which sent 0SA0 instead"),
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


@pytest.mark.parametrize(
    ("lists", "told"),
    [
        (["0F0 0SA0 0RG0 0B0 0R 0U", "1RA0 1F0 1B0 1SG0 1U"], r"1R of rank 1 is missing"),
        (["0F0 0SA0 0RG0 0B0 0R 0U", "1RA0 1F0 1B0 1SG0 1SG0 1R 1U"], r"1SG0 of rank 1 stands there twice"),
        (["0F0 0SA0 0RG0 0B0 0R 0U", "1RA0 1F0 1SG0 1B0 1R 1U"], r"1SG0 of rank 1 comes before 1B0"),
        (["0F0 0SA0 0RG0 0B0 0R 0U", "1RA0 1F0 1B0 1R 1SG0 1SA0 1U"], r"1SA0 of rank 1: there is no stage"),
        (["0F0 0SA0 0RG0 0B0 0R 0U", "1RA0 1F0 1B0 1SG0 1R 1U 0F1"], r"0F1 of rank 1: these ranks work on stage 1"),
        (["0F0 0SA0 0F1 0SA1", "1RA0 1F0"], r"0SA1 of rank 0 is never received by rank 1"),
        (["0F0 0SA0 0R 0B0 0U", "1RA0 1F0 1R 1B0 1U"], r"0RG0 of rank 0 is missing"),
        (["0F0 0SA0 0RG0 0R 0U", "1RA0 1F0 1B0 1SG0 1R 1U"], r"0B0 of rank 0 is missing"),
        (["0F0 0SA0 0RG0 0R 0B0 0U", "1RA0 1F0 1B0 1SG0 1R 1U"], r"0R of rank 0 comes before 0B0"),
        (["0F0 0SA0 0RG0 0B0 0R 0N 0U", "1RA0 1F0 1B0 1SG0 1R 1U"], r"0N waits for 1N of rank 1, which has ended"),
        (["0RG0 0F0 0SA0 0B0 0R 0U", "1RA0 1F0 1B0 1SG0 1R 1U"], r"0RG0 waits for 1SG0 of rank 1, which is at 1RA0"),
        (["", ""], None),
        ([""], r"1 lists for 2 stages"),
    ],
)
def test_other_faults_are_named(lists: list[str], told: str | None) -> None:
    topology, written = teams(1, (1, 1), (1, 1)), [words(text) for text in lists]
    if told is None:
        check(topology, written)
        return
    with pytest.raises(ScheduleError, match=told):
        check(topology, written)


def test_capacity_decides() -> None:
    # stage 0 sends all before it receives; stage 1 sends back what it has before it receives more
    lists = [build("gpipe", 2, 4)[0], build("1f1b", 2, 4)[1]]
    check(teams(1, (1, 1), (1, 1)), lists, 2)
    with pytest.raises(ScheduleError, match="rank 0 at 0SA3 waits for 1RA2 of rank 1, which is at 1SG1"):
        check(teams(1, (1, 1), (1, 1)), lists, 1)


def test_check_is_quick() -> None:
    topology = teams(10, *[(5, 2)] * 10)
    lists = per_rank(topology, build("1f1b", 10, 16, clip=True))
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
    lists = build(pipeline, stages, micro_batches, clip=True)
    line = simulate(lists, forward, backward, transfer, finish)
    times = {event.action: event for events in line.stages for event in events}
    for s, (events, actions) in enumerate(zip(line.stages, lists, strict=True)):
        assert [event.action for event in events] == actions
        occupied = [e for e in events if e.action.kind not in ("SA", "SG")]
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(occupied)), "one thing at a time"
        for m in {a.micro_batch for a in actions if a.kind == "F"}:
            assert times[Action(s, "F", m)].end - times[Action(s, "F", m)].start == pytest.approx(forward[s])
            assert times[Action(s, "B", m)].end - times[Action(s, "B", m)].start == pytest.approx(backward[s])
            if s:
                arrived = times[Action(s - 1, "F", m)].end + transfer[s - 1]
                assert times[Action(s, "F", m)].start >= arrived - 1e-9
                arrived = times[Action(s, "B", m)].end + transfer[s - 1]
                assert times[Action(s - 1, "B", m)].start >= arrived - 1e-9
    for reduced in [action for action in lists[0] if action.kind == "R"]:
        n = reduced.micro_batch
        norm = max(times[Action(s, "R", n)].end for s in range(stages))
        assert all(times[Action(s, "N", n)].end == pytest.approx(norm) for s in range(stages))
    assert line.makespan == pytest.approx(norm)


def test_simulate_reports_lists_that_wait_for_ever() -> None:
    with pytest.raises(ScheduleError, match="for ever at 0B0, 1F0"):
        simulate([words("0B0 0F0"), words("1F0 1B0")], 1, 1, 0)
    with pytest.raises(ScheduleError, match="for ever at 0N"):
        simulate([words("0F0 0B0 0N"), words("1F0 1B0")], 1, 1, 0)


def test_table() -> None:
    assert table(build("1f1b", 2, 3)).splitlines() == [
        "time     0  1  2  3  4  5  6  7",
        "stage 0 F0 F1  . B0 F2 B1  . B2",
        "stage 1  . F0 B0 F1 B1 F2 B2  .",
    ]
    assert table(forward_only(1, 2)).splitlines() == ["time     0  1", "stage 0 F0 F1"]
