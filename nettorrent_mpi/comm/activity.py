"""An activity tells what this process does at present: the thread that trains writes it, the watchdog's reads it once a
second.

Writing is two assignments for each action of a schedule; nothing waits and nothing is sent.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nettorrent_mpi.comm.processes import this_process
from nettorrent_mpi.plan.actions import Action

STARTING, TRAINING, OUTSIDE = "start-up", "training", "the script's own code"
FIRST_STEP = "first step"


class Waiting:
    """A Waiting counts the `nanoseconds` spent in calls that return when others have sent, received or come: it is a
    context manager around each. Entering it makes no object."""

    def __init__(self) -> None:
        self.nanoseconds = 0

    def __enter__(self) -> None:
        self.nanoseconds -= time.perf_counter_ns()

    def __exit__(self, *error: object) -> None:
        self.nanoseconds += time.perf_counter_ns()


class Activity:
    """An Activity has the phase of the run, and the latest action of a schedule with its step (from 1). `count` grows
    whenever something begins: as long as it grows, this rank advances."""

    def __init__(self) -> None:
        self.phase = STARTING
        self.step = 0
        self.action: Action | None = None
        self.count = 0
        self.thread = threading.main_thread().ident  # the one that trains
        self.waiting = Waiting()

    def enter(self, phase: str) -> None:
        """Begin another phase."""
        self.phase, self.count = phase, self.count + 1
        self.thread = threading.get_ident()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Be in another phase inside the `with` block."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)


class StartUp:
    """A StartUp has the `seconds` of this process's start by phase, in order, up to the end of the first step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter() - _age()

    def begin(self, phase: str) -> None:
        """End the phase before a trainer is made: `phase` for the first one of this process. Another one starts
        anew."""
        if FIRST_STEP in self.seconds:
            self.seconds, self._since = {}, time.perf_counter()
        else:
            self.reached(phase)

    def reached(self, phase: str) -> None:
        """End a phase, unless the first step is over."""
        if FIRST_STEP not in self.seconds:
            now = time.perf_counter()
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + now - self._since, 3)
            self._since = now


def _age() -> float:
    """Return the seconds since this process was started; 0 if unknown."""
    started = this_process().started
    if not started:
        return 0.0
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK"), 0.0)


NOW, START = Activity(), StartUp()
