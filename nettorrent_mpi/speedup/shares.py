"""What each rank did with its time, from the trace of a run.

    compute         loading, forward, backward and update (L, F, B, U), without what ranks do together inside them; and
                    what in R is not together: gradients that are computed in parts, from everybody's rows
    communication   sending; receiving and summing once everybody needed was there; the collective operations inside
                    layers (cols, batch norm) and updates (sharing new weights), and waiting for gossip's deadline
    waiting         in a sum of gradients (R) or a norm (N) for the last rank to come: ranks were not equally fast
    bubble          in a receive (RA, RG) for a message that its sender had not begun to send: the pipeline was empty
    other           between the actions: Python, reports

Together they are the whole time, evaluations left out. Ranks that wait for each other inside layers and updates cannot
be told from those that communicate there. Ranks of different hosts have different clocks: shares hold for one host.
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
SKIPPED = 5  # steps at the beginning, in which buffers are touched for the first time
_PLACE = re.compile(r"rank \d+: replica (\d+), stage (\d+) \(.*\), row (\d+), col (\d+)")


class Span(NamedTuple):
    """What a rank did from begin to end, in microseconds, within a step. `together` of them went by in what it did
    with others inside the action."""

    rank: int
    action: Action
    step: int
    begin: float
    end: float
    together: float


@dataclass(frozen=True)
class Trace:
    """The spans of a run in the order of each rank, and where the ranks stand."""

    places: list[Place]
    spans: list[Span]


def read(text: str) -> Trace:
    """A Chrome trace as a run with `trace: true` writes it."""
    events = json.loads(text)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    places = []
    for rank in range(len(names)):
        match = _PLACE.fullmatch(names[rank])
        assert match, names[rank]
        places.append(Place(*map(int, match.groups())))
    spans = [
        Span(
            e["pid"], parse(e["name"]), e["args"]["step"], e["ts"], e["ts"] + e["dur"], e["args"]["together"]
        )
        for e in events
        if e["ph"] == "X"
    ]  # fmt: skip
    return Trace(places, spans)


def shares(trace: Trace, steps: int, micro_batches: int) -> list[dict[str, float]]:
    """For each rank the part of its time that each of PARTS took, from its step SKIPPED (or the first, where there are
    no more) to the last update of training step steps - 1, each step of so many micro-batches."""
    first = SKIPPED if steps > SKIPPED else 0
    chosen = [span for span in trace.spans if first <= span.step < steps]
    known = _Known(trace.places, chosen, micro_batches)
    by_rank = ([span for span in chosen if span.rank == rank] for rank in range(len(trace.places)))
    return [_of_one(*_training(own), known) for own in by_rank]


def _of_one(own: Sequence[Span], whole: float, known: _Known) -> dict[str, float]:
    told = dict.fromkeys(PARTS, 0.0)
    if not own:
        return told
    for span in own:
        length = span.end - span.begin
        kind = span.action.kind
        if kind in ("L", "F", "B", "U"):
            inside = min(span.together, length)
            told["compute"] += length - inside
            told["communication"] += inside
            continue
        idle = min(length, max(0.0, known.ready(span) - span.begin))
        told["bubble" if kind in ("RA", "RG") else "waiting"] += idle
        alone = length - min(length, max(idle, span.together)) if kind == "R" else 0.0
        told["compute"] += alone
        told["communication"] += length - idle - alone
    told["other"] = max(0.0, whole - sum(told.values()))
    return {name: value / whole for name, value in told.items()}


def _training(spans: Sequence[Span]) -> tuple[list[Span], float]:
    """(a rank's spans that are training, the microseconds from the first to the last without the others).

    A step's list ends with U. What is counted as the same step and comes after it is an evaluation, or a judging of
    replicas, which training waits for; of the last U's too.
    """
    last = {span.step: index for index, span in enumerate(spans) if span.action.kind == "U"}
    own: list[Span] = []
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

    def __init__(self, places: Sequence[Place], spans: Iterable[Span], micro_batches: int):
        self._places, self._micro_batches = places, micro_batches
        self._sent: dict[tuple[int, int, str, int], list[tuple[Place, float]]] = defaultdict(list)
        self._came: dict[tuple[int, int, str, int], float] = {}
        for span in spans:
            place, kind = places[span.rank], span.action.kind
            if kind in ("SA", "SG"):
                self._sent[place.replica, place.stage, kind, self._number(span)].append((place, span.begin))
            elif kind in ("R", "N"):
                for group in self._group(place, kind):
                    at = (*group, kind, span.step)
                    self._came[at] = max(self._came.get(at, 0.0), span.begin)
        self._rows: dict[int, int] = {}
        for place in places:
            self._rows[place.stage] = max(self._rows.get(place.stage, 0), place.row + 1)

    def ready(self, span: Span) -> float:
        """The moment from which nobody else was to be waited for, in microseconds; 0 where nobody was."""
        place, action = self._places[span.rank], span.action
        if action.kind in ("RA", "RG"):
            stage = place.stage + (-1 if action.kind == "RA" else 1)
            sent = "SA" if action.kind == "RA" else "SG"
            senders = self._sent.get((place.replica, stage, sent, self._number(span)), [])
            return max((begin for other, begin in senders if self._share_rows(place, other)), default=0.0)
        if action.kind in ("R", "N"):
            return max(
                self._came.get((*group, action.kind, span.step), 0.0) for group in self._group(place, action.kind)
            )
        return 0.0

    def _number(self, span: Span) -> int:
        """The micro-batch, counted through all steps: without flush a stage has some of the next step in its step."""
        return span.step * self._micro_batches + (span.action.micro_batch or 0)

    def _share_rows(self, a: Place, b: Place) -> bool:
        """Do ranks of neighbouring teams have rows of a micro-batch in common? As if rows were divided evenly."""
        of_a, of_b = self._rows[a.stage], self._rows[b.stage]
        return a.row * of_b < (b.row + 1) * of_a and b.row * of_a < (a.row + 1) * of_b

    @staticmethod
    def _group(place: Place, kind: str) -> list[tuple[int, int]]:
        """Whom a rank sums with, as (stage, col): the same neurons, whatever row and replica; N: everybody."""
        return [(place.stage, place.col)] if kind == "R" else [(-1, -1)]
