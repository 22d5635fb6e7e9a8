"""This module estimates the time that is left of a training from its records."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

LATEST = 256  # records that are kept
FIRST = 5  # steps that are slow: libraries load, kernels are compiled


class _Mark(NamedTuple):
    """A record: its step, its time, and whether the network was evaluated then, after that time."""

    step: int
    seconds: float
    evaluated: bool


class _Span(NamedTuple):
    """The time between two records: whether it is one of the latest, and whether an evaluation is part of it."""

    late: bool
    evaluated: bool
    steps: int
    seconds: float


class TimeLeft:
    """A TimeLeft estimates the seconds until the last of `steps`, of a training that goes on after step `after`.

    The pace is that of the latest half of the records, without the start and the first steps, in which libraries load
    and kernels are compiled. Evaluations count for themselves: as many as there will be, every `evaluate_every`
    steps and at the end, each as long as they took so far.
    """

    def __init__(self, steps: int, evaluate_every: int | None, *, after: int = 0):
        self._steps, self._every, self._after = steps, evaluate_every, after
        self._seen = deque[_Mark](maxlen=LATEST)
        self._first: float | None = None  # seconds per step, as long as there are no two records to compare

    def see(self, step: int, record: Mapping[str, Any], *, evaluated: bool) -> None:
        """Take note of a record, a line of metrics.jsonl."""
        if self._seen and step <= self._seen[-1].step:  # ranks were lost, and steps come again
            self._seen.clear()
            self._after = step - 1
        if step - self._after > 2 * FIRST and record.get("samples_per_second") and record.get("samples"):
            self._first = record["samples"] / step / record["samples_per_second"]
        if step - self._after >= FIRST:
            self._seen.append(_Mark(step, record["time"], evaluated))

    @property
    def seconds(self) -> float | None:
        """The seconds from the latest record, and the evaluation after it, until the end; None if they are not known
        yet."""
        if not self._seen:
            return None
        seen = list(self._seen)
        now, middle = seen[-1].step, (seen[0].step + seen[-1].step) / 2
        spans = [
            _Span(a.step >= middle, a.evaluated, b.step - a.step, b.seconds - a.seconds)
            for a, b in itertools.pairwise(seen)
        ]
        plain = [span for span in spans if not span.evaluated]
        counted = plain or spans  # if each record has an evaluation, they are part of the pace
        latest = [span for span in counted if span.late] or counted[-1:]
        pace = sum(span.seconds for span in latest) / sum(span.steps for span in latest) if latest else self._first
        if pace is None:
            return None
        left = pace * max(self._steps - now, 0)
        longer = [span.seconds - pace * span.steps for span in spans if span.evaluated] if plain else []
        if longer and self._every and now < self._steps:
            left += median(longer) * ((self._steps - 1) // self._every - now // self._every + 1)
        return max(left, 0.0)
