"""A TracedRun is the trace.json of a run, read again: it says when each rank began and ended each action."""

from __future__ import annotations

import re
from typing import NamedTuple

from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.plan.actions import Action, parse
from nettorrent_mpi.plan.errors import DataError, ScheduleError
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.topology import Place

_PLACE = re.compile(r"rank (\d{1,7}): replica (\d{1,7}), stage (\d{1,7}) \(.*\), row (\d{1,7}), col (\d{1,7})")


class TracedSpan(NamedTuple):
    """A TracedSpan is one action of a rank, from begin to end in microseconds, within a step."""

    rank: int
    action: Action
    step: int
    begin: float
    end: float


@dataclass(frozen=True)
class TracedRun:
    """A TracedRun has the spans of a run in the order of each rank, and the ranks' positions."""

    places: list[Place]
    spans: list[TracedSpan]


def read_traced(text: str | bytes, file: str = "trace.json") -> TracedRun:
    """Read a Chrome trace as written by a run with `trace: true`. Raises a DataError for any other text."""
    try:
        events = parsed(text)["traceEvents"]
        places: list[Place] = []
        for event in events:
            if event["ph"] == "M":
                match = _PLACE.fullmatch(event["args"]["name"])
                if match is None or int(match[1]) != len(places):
                    raise ValueError(f"no rank's position: {event['args']['name']!r:.60}")
                places.append(Place(*map(int, match.groups()[1:])))
        spans = [
            TracedSpan(e["pid"], parse(e["name"]), e["args"]["step"], float(e["ts"]), float(e["ts"] + e["dur"]))
            for e in events
            if e["ph"] == "X"
        ]
        if not all(type(s.rank) is int and 0 <= s.rank < len(places) and type(s.step) is int for s in spans):
            raise ValueError("a span of no rank, or of no step")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, ScheduleError) as error:
        raise DataError(f"is no trace of a run ({error})", file=file) from None
    return TracedRun(places, spans)
