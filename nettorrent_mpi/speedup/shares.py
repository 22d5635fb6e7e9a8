"""The shares of each rank's time, computed from the actions in the trace of a run.

    compute         loading, passes, gradients in parts, update (L, F, B, I, W, M, U). Collective operations inside
                    layers (cols, batch norm) count here, since they are no actions of their own
    communication   posting receives, sending, waiting for a buffer to be sent; receiving, reducing and gathering (RA,
                    RG, R, N, G) once all required ranks were there; exchanging with peers (X, Y), deadlines included
    waiting         in R, N or G for the last rank to arrive: ranks were not equally fast
    bubble          in a receive (RA, RG) for a message that its sender had not begun to send: the pipeline was empty
    other           between the actions: Python, reports

Their sum is the whole time without evaluations. Clocks of different hosts differ: shares are valid for one host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from nettorrent_mpi.engine.rank_seconds import COMPUTING
from nettorrent_mpi.engine.traced_run import TracedRun, TracedSpan
from nettorrent_mpi.plan.topology import Place

PARTS = ("compute", "communication", "waiting", "bubble", "other")
MET = ("R", "N", "G")  # actions that ranks do at the same time
SKIPPED = 5  # first steps, in which buffers are touched for the first time


def shares(trace: TracedRun, steps: int, micro_batches: int) -> list[dict[str, float]]:
    """Return for each rank the fraction of its time on each of PARTS, from its step SKIPPED (or the first, if there are
    no more) to the last update of training step steps - 1, each step with `micro_batches` micro-batches."""
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
        if kind in COMPUTING:
            told["compute"] += length
            continue
        idle = min(length, max(0.0, known.ready(span) - span.begin))
        told["bubble" if kind in ("RA", "RG") else "waiting"] += idle
        told["communication"] += length - idle
    told["other"] = max(0.0, whole - sum(told.values()))
    return {name: value / whole for name, value in told.items()}


def _training(spans: Sequence[TracedSpan]) -> tuple[list[TracedSpan], float]:
    """Return (a rank's spans that are training, the microseconds from the first to the last without the others).

    A step's list ends with G. Spans of the same step number after it belong to an evaluation, or a comparison of
    replicas, which training waits for; so do those after the last G.
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
    """The times at which the messages and ranks that actions wait for were there."""

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
        """Return the time in microseconds at which the last other rank was ready; 0 if none is involved."""
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
        """Return the micro-batch's number over all steps: without flush a stage has some of the next step in its
        step."""
        return span.step * self._micro_batches + (span.action.micro_batch or 0)

    def _share_rows(self, a: Place, b: Place) -> bool:
        """Whether ranks of neighbouring teams have rows of a micro-batch in common, as if rows were divided evenly."""
        of_a, of_b = self._rows[a.stage], self._rows[b.stage]
        return a.row * of_b < (b.row + 1) * of_a and b.row * of_a < (a.row + 1) * of_b

    @staticmethod
    def _group(place: Place, kind: str) -> tuple[int, int]:
        """Return the group that a rank reduces and gathers with, as (stage, col): the holders of the same neurons, over
        rows and replicas; for N all ranks."""
        return (-1, -1) if kind == "N" else (place.stage, place.col)
