"""The timeline of a schedule: its actions simulated in time, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple, cast

from nettorrent_mpi.plan.actions import PASSES, Action, Actions, Kind, splits
from nettorrent_mpi.plan.errors import ScheduleError
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.stream import staleness_bound, stream

Costs = float | Sequence[float]  # seconds: the same for all stages, or one for each


class Wire(NamedTuple):
    """The seconds for which a message occupies the link between two stages, those that it takes to arrive besides, and
    for how much of such work an idle link takes at once (a token bucket's burst)."""

    occupied: float
    latency: float = 0.0
    burst: float = 0.0


class Interval(NamedTuple):
    """An action and when it starts and ends, in seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """One or several simulated steps. `bubble` is the part of makespan x stages in which no pass (F, B, I, W) runs."""

    stages: tuple[tuple[Interval, ...], ...]
    makespan: float
    bubble: float

    @property
    def period(self) -> float:
        """The time from one step to the next where stages follow each other without waiting for all: each begins the
        next step as soon as it has ended this one, so that its start is as far from its end for all steps."""
        return max((events[-1].end - events[0].start for events in self.stages if events), default=0.0)


def simulate(
    lists: Sequence[Actions],
    forward: Costs,
    backward: Costs,
    transfer: Costs | Sequence[Wire],
    finish: Costs = 0.0,
    weights: Costs = 0.0,
) -> Timeline:
    """Simulate a step or a window of several: lists per stage, with or without transfers.

    `forward` and `backward` are the seconds of one micro-batch in a stage, `weights` those of `backward` that are W's
    where it is split; `transfer` those from a stage to the next or back (one, or a Wire, for each boundary), `finish`
    those of a stage's R. A send does not block its stage, and what goes the same way travels one after another; a
    receive waits for the arrival; N waits for all stages; U takes no time. Raises ScheduleError if the lists deadlock.
    """
    count = len(lists)
    f, b, r, w = (_each(cost, count) for cost in (forward, backward, finish, weights))
    wires = _wires(transfer, count - 1)
    arrival: dict[Action, float] = {}  # keyed by the F or B (also where it is split) that it is for
    free = {(s, way): -inf for s in range(count) for way in "FB"}  # when the link has carried what a stage sent last
    events: list[list[Interval]] = [[] for _ in lists]
    at = [0] * count
    now = [0.0] * count
    norms: dict[int | None, float] = {}  # when all stages have reached an N
    moved = True
    while moved:
        moved = False
        for s, actions in enumerate(lists):
            while at[s] < len(actions):
                action = actions[at[s]]
                _, kind, m = action
                start, there = now[s], 0.0
                if kind == "N":
                    if m not in norms:
                        break
                    there = norms[m]
                elif (kind in ("F", "RA") and s > 0) or (kind in ("B", "I", "RG") and s < count - 1):
                    wanted = Action(s, "F" if kind in ("F", "RA") else "B", m)
                    if wanted not in arrival:
                        break
                    there = arrival[wanted]
                if kind in ("SA", "SG"):
                    wire = wires[s if kind == "SA" else s - 1]
                    end = start + wire.occupied + wire.latency
                else:
                    if kind in PASSES:  # where the lists have no transfers, the wait is not part of the compute
                        start = max(start, there)
                    took = {"F": f[s], "B": b[s], "I": b[s] - w[s], "W": w[s], "R": r[s]}
                    end = max(start, there) + took.get(kind, 0.0)
                    now[s] = end
                if (kind == "F" and s < count - 1) or (kind in ("B", "I") and s > 0):
                    wire, to, way = (wires[s], s + 1, "F") if kind == "F" else (wires[s - 1], s - 1, "B")
                    free[s, way] = max(end - wire.burst, free[s, way]) + wire.occupied
                    arrival[Action(to, cast("Kind", way), m)] = max(end, free[s, way]) + wire.latency
                events[s].append(Interval(action, start, end))
                at[s] += 1
                moved = True
        met = {actions[i][1:] if i < len(actions) else None for actions, i in zip(lists, at, strict=True)}
        if not moved and len(met) == 1 and (one := met.pop()) and one[0] == "N":
            norms[one[1]], moved = max(now), True
    stuck = [str(actions[i]) for actions, i in zip(lists, at, strict=True) if i < len(actions)]
    if stuck:
        raise ScheduleError(f"the schedule deadlocks at {', '.join(stuck)}")
    makespan = max(now, default=0.0)
    busy = sum(e.end - e.start for stage in events for e in stage if e.action.kind in PASSES)
    bubble = 1 - busy / (makespan * count) if makespan else 0.0
    return Timeline(tuple(map(tuple, events)), makespan, bubble)


def steady_bubble(line: Timeline) -> float:
    """Return the part of the time in which no F or B runs between warm-up and drain: from when the last stage starts
    its first B until the first stage ends its last F. Raises ScheduleError if there is no such time."""
    compute = [[event for event in events if event.action.kind in ("F", "B")] for events in line.stages]
    begin = max(min(e.start for e in events if e.action.kind == "B") for events in compute)
    end = min(max(e.end for e in events if e.action.kind == "F") for events in compute)
    if end <= begin:
        raise ScheduleError("the drain begins before the warm-up ends: only more micro-batches have a steady state")
    busy = sum(max(0.0, min(e.end, end) - max(e.start, begin)) for events in compute for e in events)
    return max(0.0, 1 - busy / ((end - begin) * len(compute)))


def steady_seconds(
    stages: int,
    micro_batches: int,
    forward: Costs,
    backward: Costs,
    transfer: Costs | Sequence[Wire],
    finish: Costs = 0.0,
) -> float:
    """Return the seconds that one more mini-batch takes in the middle of a stream; costs as in `simulate`.

    The mean over eight mini-batches or more, a multiple of S: where transfers are slow, S micro-batches travel in
    bursts.
    """
    f, b, r = (_each(cost, stages) for cost in (forward, backward, finish))
    slowest = max(range(stages), key=lambda s: micro_batches * (f[s] + b[s]) + r[s])
    late = staleness_bound(stages, micro_batches, 0)
    begin = (
        2 * late + 1
    )  # the pipeline is full after `late` steps, and has adapted to the slowest stage after as many more
    end = begin + stages * -(-8 // stages)
    # the last `late` steps come after the measured ones
    line = simulate(stream(stages, micro_batches, end + late + 1, transfers=False), f, b, transfer, r)
    times = {e.action.micro_batch: e.end for e in line.stages[slowest] if e.action.kind == "R"}
    return (times[end] - times[begin]) / (end - begin)


def _wires(transfer: Costs | Sequence[Wire], count: int) -> list[Wire]:
    each = transfer if isinstance(transfer, Sequence) else [transfer] * count
    assert len(each) == count, f"{len(each)} transfers for {count}"
    return [cost if isinstance(cost, Wire) else Wire(cost) for cost in each]


def _each(cost: Costs, count: int) -> list[float]:
    if isinstance(cost, Sequence):
        assert len(cost) == count, f"{len(cost)} costs for {count}"
        return list(cost)
    return [float(cost)] * count


def table(lists: Sequence[Actions]) -> str:
    """Return the compute of each stage over time as text: stages down, time steps across, every pass one step.

    In lists of several mini-batches a U follows the action after which the update is made: `B3U`.
    """
    compute: list[Actions] = []
    names: dict[Action, str] = {}
    for actions in lists:
        compute.append([])
        for action in actions:
            if action.kind in PASSES:
                compute[-1].append(action)
                names[action] = f"{action.kind}{action.micro_batch}"
            elif action.kind == "U" and action.micro_batch is not None and compute[-1]:
                names[compute[-1][-1]] += "U"
    split = float(any(map(splits, compute)))
    line = simulate(compute, 1.0, 1.0 + split, 0.0, weights=split)
    width = max(map(len, names.values()), default=1)
    label = len(f"stage {max(len(lists) - 1, 0)}")
    rows = [" ".join(["time".ljust(label), *(str(i).rjust(width) for i in range(round(line.makespan)))])]
    for s, events in enumerate(line.stages):
        cells = ["."] * round(line.makespan)
        for action, start, _ in events:
            cells[round(start)] = names[action]
        rows.append(" ".join([f"stage {s}".ljust(label), *(cell.rjust(width) for cell in cells)]))
    return "\n".join(rows)
