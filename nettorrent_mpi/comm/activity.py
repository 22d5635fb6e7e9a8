"""An activity tells what this process does at present: the thread that trains writes it, the watchdog's reads it once a
second.

Writing is two assignments for each action of a schedule; nothing waits and nothing is sent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nettorrent_mpi.plan.actions import Action

STARTING, TRAINING, OUTSIDE = "start-up", "training", "the script's own code"


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


NOW = Activity()
