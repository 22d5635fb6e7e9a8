from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nettorrent_mpi.plan.actions import ONCE, Action, Actions, Kind, parse, peak_stored, step_end
from nettorrent_mpi.plan.checker import check
from nettorrent_mpi.plan.errors import ScheduleError
from nettorrent_mpi.plan.schedule import PIPELINES, build
from nettorrent_mpi.plan.stream import (
    counted_on,
    mean_staleness,
    reach,
    staleness_bound,
    stream,
    stream_step,
    versions,
    window,
    window_steps,
)
from nettorrent_mpi.plan.timeline import simulate, steady_bubble, steady_seconds, table
from nettorrent_mpi.plan.topology import Stage, Topology

STAGES, MICRO_BATCHES, STEPS = range(1, 7), range(1, 9), range(1, 7)
stages_, micro_batches_, steps_ = (st.sampled_from(r) for r in (STAGES, MICRO_BATCHES, STEPS))
ends_ = st.builds(step_end, clip=st.booleans(), exact=st.booleans(), parts=st.booleans())


def words(text: str) -> Actions:
    return [parse(word) for word in text.split()]


def pipe(stages: int, replicas: int = 1, *grids: tuple[int, int]) -> Topology:
    shapes = [*grids, *[(1, 1)] * (stages - len(grids))]
    return Topology(replicas, tuple(Stage(s, s + 1, *shapes[s]) for s in range(stages)))


def per_rank(topology: Topology, lists: list[Actions]) -> list[Actions]:
    return [list(lists[topology.place(rank).stage]) for rank in range(topology.size)]


def flushed(pipeline: str, stages: int, micro_batches: int, steps: int) -> list[Actions]:
    """Steps of a pipeline with flush, one after another."""
    lists = build(pipeline, stages, micro_batches)
    return [[a for n in range(steps) for a in counted_on(actions, micro_batches, n)] for actions in lists]


def test_lists_as_written_by_hand() -> None:
    assert stream(2, 2, 2) == [
        words(
            "0PG0 0PG1 0WA0 0F0 0SA0 0WA1 0F1 0SA1 0L2 0RG0 0B0 0PG2 0WA2 0F2 0SA2 0L3 0RG1 0B1 0PG3 0R0 0U0 0G0 "
            "0WA3 0F3 0SA3 0L4 0RG2 0B2 0RG3 0B3 0R1 0U1 0G1"
        ),
        words(
            "1PA0 1PA1 1RA0 1F0 1WG0 1B0 1PA2 1SG0 1RA1 1F1 1WG1 1B1 1PA3 1SG1 1R0 1U0 1G0 "
            "1RA2 1F2 1WG2 1B2 1SG2 1RA3 1F3 1WG3 1B3 1SG3 1R1 1U1 1G1"
        ),
    ]
    bare = {"left": 9, "transfers": False}
    assert stream_step(4, 2, 0, first=True, **bare) == words("0F0 0F1 0F2 0F3 0B0 0F4 0B1 0R 0U 0G")
    assert stream_step(4, 2, 0, first=False, **bare, end=step_end(clip=True)) == words("0F3 0B0 0F4 0B1 0R 0N 0U 0G")
    assert stream_step(4, 2, 1, first=False, left=9) == words(
        "1RA2 1WA2 1F2 1SA2 1RG0 1WG0 1B0 1PA4 1PG2 1SG0 1RA3 1WA3 1F3 1SA3 1RG1 1WG1 1B1 1PA5 1PG3 1SG1 1R 1U 1G"
    )
    assert stream_step(4, 2, 0, first=False, left=2, transfers=False) == words("0F3 0B0 0B1 0R 0U 0G")
    assert stream_step(4, 2, 0, first=True, left=1, transfers=False) == words("0F0 0F1 0B0 0B1 0R 0U 0G")


@settings(max_examples=100, deadline=None)
@given(stages_, micro_batches_, steps_)
def test_streams_follow_their_rule(stages: int, micro_batches: int, steps: int) -> None:
    count = micro_batches * steps
    for s, actions in enumerate(stream(stages, micro_batches, steps, transfers=False)):
        ahead = stages - s - 1
        plain = [Action(s, "F", g) for g in range(min(ahead, count))]
        for g in range(count):
            if g + ahead < count:
                plain.append(Action(s, "F", g + ahead))
            plain.append(Action(s, "B", g))
            if g % micro_batches == micro_batches - 1:
                plain += [Action(s, kind, g // micro_batches) for kind in ("R", "U", "G")]
        assert actions == plain


@settings(max_examples=100, deadline=None)
@given(stages_, micro_batches_, steps_, ends_)
def test_steps_make_the_stream(stages: int, micro_batches: int, steps: int, end: tuple[Kind, ...]) -> None:
    for s, whole in enumerate(stream(stages, micro_batches, steps, end=end)):
        joined: Actions = []
        for n in range(steps):
            step = stream_step(stages, micro_batches, s, first=n == 0, left=steps - n, end=end)
            assert step[-len(end) :] == [Action(s, kind) for kind in end]
            joined += counted_on(step, micro_batches, n)
        assert joined == whole
        for kind in ("PA", "RA", "F", "WA", "SA", "PG", "RG", "B", "WG", "SG"):
            numbers = [a.micro_batch for a in joined if a.kind == kind]
            assert numbers in ([], list(range(micro_batches * steps))), "each once, in order"
        assert staleness_bound(stages, micro_batches, 0) <= reach(stages, micro_batches)
        for first in (True, False):
            far = reach(stages, micro_batches)
            one, many = (stream_step(stages, micro_batches, s, first=first, left=far + n) for n in (1, 9))
            assert one == many, "the step is always the same until the drain comes near"


def test_streams_are_accepted() -> None:
    for stages, micro_batches, steps in itertools.product(STAGES, MICRO_BATCHES, STEPS):
        grids = [(1 + s % 3, 1 + (s + micro_batches) % 2) for s in range(stages)]
        lists = stream(stages, micro_batches, steps, end=step_end(clip=steps % 2 == 0, exact=steps % 3 > 0))
        check(pipe(stages, 1 + steps % 2, *grids), lists)


grids_ = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(grids_, st.integers(1, 2), micro_batches_, steps_, ends_)
def test_streams_of_single_ranks_are_accepted(
    grids: list[tuple[int, int]], replicas: int, micro_batches: int, steps: int, end: tuple[Kind, ...]
) -> None:
    topology = pipe(len(grids), replicas, *grids)
    check(topology, per_rank(topology, stream(len(grids), micro_batches, steps, end=end)))


def play(actions: Actions, micro_batches: int) -> tuple[list[int], int]:
    """(updates between forward and own update for each micro-batch, the most versions of the weights held at once)."""
    used: dict[int, int] = {}  # micro-batches in flight: the version that their forward used
    own: dict[int, int] = {}
    late: list[int] = []
    updates = most = 0
    for action in actions:
        m = action.micro_batch
        assert m is not None
        if action.kind == "F":
            used[m] = updates
        elif action.kind == "B":
            own[m] = used.pop(m)
        elif action.kind == "U":
            assert sorted(own) == list(range(m * micro_batches, (m + 1) * micro_batches))
            late += [updates - own[g] for g in sorted(own)]
            own.clear()
            updates += 1
        # the version that the oldest B still to come uses is kept, too, while that B runs
        most = max(
            most, len({updates, *used.values(), *own.values()} if action.kind == "B" else {updates, *used.values()})
        )
    assert not used
    return late, most


def test_staleness_and_versions_are_those_of_a_play() -> None:
    for stages, micro_batches in itertools.product(STAGES, MICRO_BATCHES):
        for s in range(stages):
            bound, held = staleness_bound(stages, micro_batches, s), versions(stages, micro_batches, s)
            for steps in STEPS:
                late, most = play(stream(stages, micro_batches, steps, transfers=False)[s], micro_batches)
                assert max(late) <= bound
                assert most <= held
            late, most = play(stream(stages, micro_batches, 2 * bound + 3, transfers=False)[s], micro_batches)
            assert (max(late), most) == (bound, held)
            steady = late[bound * micro_batches :]  # the pipeline is full from here on
            assert sum(steady) / len(steady) == pytest.approx(mean_staleness(stages, micro_batches, s))
            assert (held <= 2) == (stages - s - 1 <= micro_batches), "two versions: PipeDream-2BW's condition"
            if s == stages - 1:
                assert bound == 0


def test_a_window_shows_all_there_is() -> None:
    for stages, micro_batches in itertools.product(STAGES, MICRO_BATCHES):
        lists, compute = build("async", stages, micro_batches), PIPELINES["async"](stages, micro_batches)
        assert compute == window(stages, micro_batches)
        assert lists == stream(stages, micro_batches, window_steps(stages, micro_batches))
        for s, actions in enumerate(lists):
            assert peak_stored(actions) == peak_stored(compute[s]) == stages - s
            steps = [a for a in actions if a.kind in ("F", "B", *ONCE)]
            assert max(play(steps, micro_batches)[0]) == staleness_bound(stages, micro_batches, s)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.data())
def test_what_is_missing_or_doubled_is_refused(
    stages: int, micro_batches: int, steps: int, more: bool, data: st.DataObject
) -> None:
    topology = pipe(stages, 1, (2, 1))
    end = step_end(clip=more, exact=not more)
    lists = per_rank(topology, stream(stages, micro_batches, steps, end=end))
    actions = data.draw(st.sampled_from(lists))
    # rows that were not loaded ahead are loaded when they are needed
    i = data.draw(st.sampled_from([i for i, action in enumerate(actions) if action.kind != "L"]))
    if data.draw(st.booleans()):
        actions.insert(data.draw(st.integers(0, len(actions))), actions[i])
    else:
        del actions[i]
    with pytest.raises(ScheduleError):
        check(topology, lists)


def obeys(actions: Actions, stages: int, micro_batches: int, steps: int) -> bool:
    """Does a complete list of one stage keep the order of a stream, and are its buffers free when they are written? The
    rules of `check`, written plainly."""
    s = actions[0].stage
    at = {action: i for i, action in enumerate(actions)}
    slots = peak_stored(actions)
    inputs = slots + (s > 0)

    def ordered(*chain: tuple[Kind, int]) -> bool:
        places = [at[Action(s, kind, m)] for kind, m in chain if Action(s, kind, m) in at]
        return places == sorted(places)

    return actions[-1] == Action(s, "G", steps - 1) and all(
        ordered(("PA", g), ("RA", g), ("F", g), ("SA", g), ("RG", g), ("B", g), ("SG", g))
        and ordered(("PG", g), ("RG", g))
        and ordered(("B", g), ("R", g // micro_batches), ("U", g // micro_batches), ("G", g // micro_batches))
        and ordered(("G", g // micro_batches - 1), ("B", g))
        and ordered(("B", g - stages + s), ("F", g))
        and ordered(("B", g - inputs), ("PA", g))
        and ordered(("B", g - 2), ("PG", g))
        and ordered(("B", g - slots), ("F", g))
        and ordered(("SA", g - slots), ("WA", g), ("F", g))
        and ordered(("SG", g - 2), ("WG", g), ("B", g))
        for g in range(micro_batches * steps)
    ) and not any(
        at[Action(s, "U", n)] < at[Action(s, kind, g)] < at[Action(s, "G", n)]
        for n in range(steps) for g in range(micro_batches * steps) for kind in ("F", "B")
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_what_is_out_of_order_is_refused(stages: int, micro_batches: int, steps: int, data: st.DataObject) -> None:
    lists = stream(stages, micro_batches, steps)
    actions = data.draw(st.sampled_from(lists))
    i, j = (data.draw(st.integers(0, len(actions) - 1)) for _ in range(2))
    actions[i], actions[j] = actions[j], actions[i]
    told = ""
    try:
        check(pipe(stages), lists)
    except ScheduleError as error:
        told = str(error)
    if "no rank can continue" not in told:
        assert bool(told) == (not obeys(actions, stages, micro_batches, steps)), told


# two mini-batches of one micro-batch, on two stages
TWO = [
    "0PG0 0PG1 0WA0 0F0 0SA0 0WA1 0F1 0SA1 0L2 0RG0 0B0 0R0 0U0 0G0 0RG1 0B1 0R1 0U1 0G1",
    "1PA0 1PA1 1RA0 1F0 1WG0 1B0 1SG0 1R0 1U0 1G0 1RA1 1F1 1WG1 1B1 1SG1 1R1 1U1 1G1",
]


@pytest.mark.parametrize(
    ("stage", "old", "new", "told"),
    [
        (0, "", "", None),
        (0, "0R0 0U0 0G0 0RG1 0B1", "0RG1 0B1 0R0 0U0 0G0", r"0B1 of rank 0 comes before 0G0"),
        (0, "0B0 0R0", "0R0 0B0", r"0R0 of rank 0 comes before 0B0"),
        (0, "0R0 0U0", "0U0 0R0", r"0U0 of rank 0 comes before 0R0"),
        (0, "0R0 0U0 0G0 0RG1 0B1 0R1", "0R1 0U0 0G0 0RG1 0B1 0R0", r"0U0 of rank 0 comes before 0R0"),
        (0, "0U0 0G0 0RG1 0B1 0R1 0U1", "0U1 0G0 0RG1 0B1 0R1 0U0", r"0G0 of rank 0 comes before 0U0"),
        (0, "0U0 ", "", r"0U0 of rank 0 is missing"),
        (0, "0U1", "0U1 0U2", r"3 mini-batches .* there are 2"),
        (0, "0R1", "0R", r"0R of rank 0 has no number"),
        (0, "0U0", "0N0 0U0", r"0N0 waits for 1N0 of rank 1"),
        (1, "1SG0 1R0 1U0 1G0 1RA1 1F1", "1R0 1U0 1G0 1RA1 1F1 1SG0", None),
        (1, "1WG0 1B0 1SG0 1R0 1U0 1G0 1RA1 1F1", "1RA1 1F1 1WG0 1B0 1SG0 1R0 1U0 1G0", r"1F1 .* comes before 1B0"),
        (1, "1SG1 1R1 1U1 1G1", "1R1 1U1 1G1 1SG1", r"1SG1 of rank 1 comes after 1G1"),
        (1, " 1SG1", "", r"0RG1 waits for 1SG1 of rank 1, which has ended"),
        (1, "1G0 1RA1 1F1", "1RA1 1F1 1G0", r"1F1 of rank 1 comes between an update and its 1G"),
        (0, "0PG1 ", "", r"rank 0 at 0RG1 waits for 0PG1 of rank 0"),
    ],
)  # fmt: skip
def test_faults_are_named(stage: int, old: str, new: str, told: str | None) -> None:
    whole = [words(text.replace(old, new) if s == stage else text) for s, text in enumerate(TWO)]
    if told is None:
        check(pipe(2), whole)
        return
    with pytest.raises(ScheduleError, match=told):
        check(pipe(2), whole)


def test_the_ranks_of_a_swarm_use_the_same_weights() -> None:
    topology = pipe(2, 1, (2, 1))
    lists = per_rank(topology, stream(2, 2, 3, transfers=True))
    i = lists[1].index(parse("0R0"))
    assert lists[1][i + 3 : i + 5] == words("0WA3 0F3")
    lists[1][i : i + 5] = [*lists[1][i + 3 : i + 5], *lists[1][i : i + 3]]
    with pytest.raises(ScheduleError, match="rank 1 at 0F3 waits for 0F3 of rank 0, which is at 0R0"):
        check(topology, lists)


def test_steps_with_flush_are_accepted() -> None:
    for stages, micro_batches in itertools.product((1, 2, 4), (1, 3, 6)):
        check(pipe(stages, 2), flushed("1f1b", stages, micro_batches, 3))
    with pytest.raises(ScheduleError, match="0F2 of rank 0 comes before 0B0"):  # more in flight than a stream has
        check(pipe(2), flushed("gpipe", 2, 3, 2))


def test_times_by_hand() -> None:
    # stage 0: F0 F1 .  .  B0 B0 F2 B1 B1 .  B2 B2    stage 1: .  F0 B0 B0 F1 B1 B1 F2 B2 B2
    line = simulate(stream(2, 1, 3), 1.0, 2.0, 0.0)
    assert line.makespan == 12
    assert [(str(e.action), e.start, e.end) for e in line.stages[0] if e.action.kind in ("F", "B", "U")] == [
        ("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 4, 6), ("0U0", 6, 6), ("0F2", 6, 7), ("0B1", 7, 9), ("0U1", 9, 9),
        ("0B2", 10, 12), ("0U2", 12, 12),
    ]  # fmt: skip
    assert line.bubble == pytest.approx(1 - 18 / 24)
    # a second for each R: stage 1 ends at 2+2+1, 5+3+1, 9+3+1; B2 of stage 0 waits for B2 of stage 1 at 12, then R2
    assert simulate(stream(2, 1, 3), 1.0, 2.0, 0.0, 1.0).makespan == 15
    # and every stage waits for both at N
    norms = simulate(stream(2, 1, 3, end=step_end(clip=True)), 1.0, 2.0, 0.0, 1.0)
    ends = [[e.end for e in events if e.action.kind == "N"] for events in norms.stages]
    assert ends == [[7, 13, 19]] * 2  # after each N: F and B of stage 1, B and R of stage 0


@pytest.mark.slow
def test_the_bubble_in_the_middle() -> None:
    for stages, micro_batches, steps in itertools.product(STAGES, MICRO_BATCHES, STEPS):
        lists = stream(stages, micro_batches, steps)
        line = simulate(lists, 1.0, 2.0, 0.0)
        assert line.makespan == pytest.approx(3 * (micro_batches * steps + stages - 1)), "one warm-up, one drain"
        if micro_batches * steps > stages:
            assert steady_bubble(line) == pytest.approx(0, abs=1e-12)
        elif stages > 1:
            with pytest.raises(ScheduleError, match="drain begins before"):
                steady_bubble(line)
        if stages > 1 and steps > 1:
            if micro_batches * steps > stages:
                assert steady_bubble(simulate(lists, 1.0, 2.0, 0.5)) > 0, "transfers are not hidden"
            if micro_batches > 1:
                assert steady_bubble(simulate(flushed("1f1b", stages, micro_batches, steps), 1.0, 2.0, 0.0)) > 0


@pytest.mark.slow
def test_the_seconds_of_one_more_mini_batch() -> None:
    for stages, micro_batches in itertools.product(STAGES, MICRO_BATCHES):
        assert steady_seconds(stages, micro_batches, 1.0, 2.0, 0.0) == pytest.approx(3 * micro_batches)
        # S micro-batches go round in the time of one through all stages and back
        slow = steady_seconds(stages, micro_batches, 1.0, 2.0, 5.0)
        assert slow == pytest.approx(micro_batches * (3 + 2 * 5.0 * (stages - 1) / stages))
        # the slowest stage alone counts
        for s in range(stages):
            forward = [1.0 + (i == s) for i in range(stages)]
            finish = [2.0 * (i == s) for i in range(stages)]
            assert steady_seconds(stages, micro_batches, forward, 2.0, 0.0, finish) >= 4 * micro_batches + 2
            assert steady_seconds(stages, micro_batches, forward, 2.0, 0.0) == pytest.approx(4 * micro_batches)


def test_table() -> None:
    assert table(stream(2, 2, 2)).splitlines() == [
        "time      0   1   2   3   4   5   6   7   8   9",
        "stage 0  F0  F1   .  B0  F2 B1U  F3  B2   . B3U",
        "stage 1   .  F0  B0  F1 B1U  F2  B2  F3 B3U   .",
    ]
    assert table(PIPELINES["async"](2, 1)).splitlines() == [
        "time     0  1  2  3  4  5",
        "stage 0 F0 F1  . B0  . B1",
        "stage 1  . F0 B0 F1 B1  .",
    ]
