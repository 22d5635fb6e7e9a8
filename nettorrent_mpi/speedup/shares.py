"""What each rank did with its time, from the actions in the trace of a run.

    compute         loading, forward, backward, gradients in parts, update (L, F, B, M, U). Collective operations inside
                    layers (cols, batch norm) count here: they are no actions of their own
    communication   posting receives, sending, waiting for a buffer to be sent; receiving, reducing and gathering (RA,
                    RG, R, N, G) once everybody needed was there; exchanging with peers (X, Y), deadlines included
    waiting         in R, N or G for the last rank to come: ranks were not equally fast
    bubble          in a receive (RA, RG) for a message that its sender had not begun to send: the pipeline was empty
    other           between the actions: Python, reports

Added up they are the whole time, evaluations left out. Ranks of different hosts have different clocks: shares hold for
one host.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nettorrent_mpi.plan.actions import Action, parse
from nettorrent_mpi.plan.topology import Place

PARTS = ("compute", "communication", "waiting", "bubble", "other")
MET = ("R", "N", "G")  # what ranks do at the same time
SKIPPED = 5  # steps at the beginning, in which buffers are touched for the first time
_PLACE = re.compile(r"rank \d+: replica (\d+), stage (\d+) \(.*\), row (\d+), col (\d+)")


class TracedSpan(NamedTuple):
    """What a rank did from begin to end, in microseconds, within a step."""

    rank: int
    action: Action
    step: int
    begin: float
    end: float


@dataclass(frozen=True)
class TracedRun:
    """The spans of a run in the order of each rank, and where the ranks stand."""

    places: list[Place]
    spans: list[TracedSpan]


def read(text: str) -> TracedRun:
    """A Chrome trace as a run with `trace: true` writes it."""
    events = json.loads(text)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    places = []
    for rank in range(len(names)):
        match = _PLACE.fullmatch(names[rank])
        assert match, names[rank]
        places.append(Place(*map(int, match.groups())))
    spans = [
        TracedSpan(e["pid"], parse(e["name"]), e["args"]["step"], e["ts"], e["ts"] + e["dur"])
        for e in events
        if e["ph"] == "X"
    ]
    return TracedRun(places, spans)


def shares(trace: TracedRun, steps: int, micro_batches: int) -> list[dict[str, float]]:
    """For each rank the part of its time that each of PARTS took, from its step SKIPPED (or the first, where there are
    no more) to the last update of training step steps - 1, each step of so many micro-batches."""
    first = SKIPPED if steps > SKIPPED else 0
    chosen = [span for span in trace.spans if first <= span.step < steps]
    known = _Known(trace.places, chosen, micro_batches)
    by_rank = ([span for span in chosen if span.rank == rank] for rank in range(len(trace.places)))
    return [_of_one(*_training(own), known) for own in by_rank]


def _of_one(own: Sequence[TracedSpan], whole: float, known: _Known) -> dict[str, float]:
    told = dict.fromkeys(PARTS, 0.0)
    if not own:
        return told
    for span in own:
        length = span.end - span.begin
        kind = span.action.kind
        if kind in ("L", "F", "B", "M", "U"):
            told["compute"] += length
            continue
        idle = min(length, max(0.0, known.ready(span) - span.begin))
        told["bubble" if kind in ("RA", "RG") else "waiting"] += idle
        told["communication"] += length - idle
    told["other"] = max(0.0, whole - sum(told.values()))
    return {name: value / whole for name, value in told.items()}


def _training(spans: Sequence[TracedSpan]) -> tuple[list[TracedSpan], float]:
    """(a rank's spans that are training, the microseconds from the first to the last without the others).

    A step's list ends with G. What is counted as the same step and comes after it is an evaluation, or a comparison of
    replicas, which training waits for; of the last G's too.
    """
    last = {span.step: index for index, span in enumerate(spans) if span.action.kind == "G"}
    own: list[TracedSpan] = []
    away, left = 0.0, False
    for index, span in enumerate(spans):
        if index > last.get(span.step, len(spans)):
            left = True
            continue
        if left:
            away += span.begin - own[-1].end
            left = False
        own.append(span)
    return own, max(own[-1].end - own[0].begin - away, 1e-9) if own else 0.0


class _Known:
    """When what an action waits for was there."""

    def __init__(self, places: Sequence[Place], spans: Iterable[TracedSpan], micro_batches: int):
        self._places, self._micro_batches = places, micro_batches
        self._sent: dict[tuple[int, int, str, int], list[tuple[Place, float]]] = defaultdict(list)
        self._came: dict[tuple[int, int, str, int], float] = {}
        for span in spans:
            place, kind = places[span.rank], span.action.kind
            if kind in ("SA", "SG"):
                self._sent[place.replica, place.stage, kind, self._number(span)].append((place, span.begin))
            elif kind in MET:
                at = (*self._group(place, kind), kind, span.step)
                self._came[at] = max(self._came.get(at, 0.0), span.begin)
        self._rows: dict[int, int] = {}
        for place in places:
            self._rows[place.stage] = max(self._rows.get(place.stage, 0), place.row + 1)

    def ready(self, span: TracedSpan) -> float:
        """The moment from which nobody else was to be waited for, in microseconds; 0 where nobody was."""
        place, action = self._places[span.rank], span.action
        if action.kind in ("RA", "RG"):
            stage = place.stage + (-1 if action.kind == "RA" else 1)
            sent = "SA" if action.kind == "RA" else "SG"
            senders = self._sent.get((place.replica, stage, sent, self._number(span)), [])
            return max((begin for other, begin in senders if self._share_rows(place, other)), default=0.0)
        if action.kind in MET:
            return self._came.get((*self._group(place, action.kind), action.kind, span.step), 0.0)
        return 0.0

    def _number(self, span: TracedSpan) -> int:
        """The micro-batch, counted through all steps: without flush a stage has some of the next step in its step."""
        return span.step * self._micro_batches + (span.action.micro_batch or 0)

    def _share_rows(self, a: Place, b: Place) -> bool:
        """Do ranks of neighbouring teams have rows of a micro-batch in common? As if rows were divided evenly."""
        of_a, of_b = self._rows[a.stage], self._rows[b.stage]
        return a.row * of_b < (b.row + 1) * of_a and b.row * of_a < (a.row + 1) * of_b

    @staticmethod
    def _group(place: Place, kind: str) -> tuple[int, int]:
        """Whom a rank reduces and gathers with, as (stage, col): the holders of the same neurons, whatever row and
        replica; N: everybody."""
        return (-1, -1) if kind == "N" else (place.stage, place.col)
