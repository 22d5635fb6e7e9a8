"""The trace records when each rank began and ended each action, for chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.plan.actions import Action

FIELDS = 4  # step, number of the action, begin, end: nanoseconds of a clock that the ranks of a host share
TAG = 77


class Trace:
    """A trace keeps one rank's last `capacity` spans, in memory made once."""

    def __init__(self, capacity: int = 65536):
        self._spans = np.zeros((capacity, FIELDS), np.int64)
        self._count = 0
        self._numbers: dict[Action, int] = {}
        self._names: list[str] = []

    @staticmethod
    def now() -> int:
        """Return the time in nanoseconds, for `add`."""
        return time.time_ns()

    def add(self, step: int, action: Action, began: int) -> None:
        """Record an action that began at `began` and has just ended."""
        number = self._numbers.get(action)
        if number is None:
            number = self._numbers[action] = len(self._names)
            self._names.append(str(action))
        self._spans[self._count % len(self._spans)] = (step, number, began, time.time_ns())
        self._count += 1

    def spans(self) -> np.ndarray:
        """Return the spans, oldest first, as an array (count, FIELDS)."""
        if self._count <= len(self._spans):
            return self._spans[: self._count]
        return np.roll(self._spans, -(self._count % len(self._spans)), axis=0)

    def gather(self, world: World, places: list[str]) -> str | None:
        """Return on rank 0 the spans of all ranks as a Chrome trace (JSON) whose time starts with the earliest span;
        elsewhere None. Every rank calls. `places` describes each rank's position."""
        spans = np.ascontiguousarray(self.spans())
        first = int(spans[:, 2].min()) if len(spans) else time.time_ns()
        gathered = world.gather_objects((len(spans), self._names, first))  # once, at the end
        origin = min(first for _, _, first in gathered)
        if world.rank != 0:
            world.trade([(spans, 0)], [], TAG)
            return None
        found = [spans, *(np.empty((count, FIELDS), np.int64) for count, _, _ in gathered[1:])]
        world.trade([], [(theirs, rank) for rank, theirs in enumerate(found) if rank], TAG)
        return as_chrome(
            (
                rank,
                places[rank],
                [
                    TracedAction(step, names[number], begin - origin, end - begin)
                    for step, number, begin, end in theirs.tolist()
                ],
            )
            for rank, (theirs, (_, names, _)) in enumerate(zip(found, gathered, strict=True))
        )


class TracedAction(NamedTuple):
    """A TracedAction is an action of a step: its name, its begin and its length in nanoseconds."""

    step: int
    name: str
    begin: int
    length: int


def as_chrome(ranks: Iterable[tuple[int, str, Sequence[TracedAction]]]) -> str:
    """Write the spans of ranks, each with its number and place, as a Chrome trace (JSON)."""
    events: list[dict[str, object]] = []
    for rank, place, spans in ranks:
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}: {place}"}})
        events += [
            {
                "ph": "X", "pid": rank, "tid": 0, "name": name, "cat": name.strip("0123456789"),
                "ts": begin / 1000, "dur": length / 1000, "args": {"step": step},
            }
            for step, name, begin, length in spans
        ]  # fmt: skip
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
