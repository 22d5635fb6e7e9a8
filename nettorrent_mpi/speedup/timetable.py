"""The timetable of a comparison: its runs in order, and how long those that are left will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from statistics import mean
from typing import Literal

# isort: split
from nettorrent_mpi.cli.progress import clock
from nettorrent_mpi.plan.records import dataclass

Kind = Literal["turn", "trace", "training"]


@dataclass(frozen=True)
class Job:
    """A Job is one run of a side. `run` returns a line about it, or None if the side turned out to be impossible."""

    kind: Kind
    side: str
    run: Callable[[], str | None]


@dataclass
class Timetable:
    """A Timetable expects a run to take as long as the last turn of its side did.

    `turn` is a guess of the seconds of a turn for as long as none is known; `longest` returns the most seconds that a
    side's training to an accuracy takes, once the side's speed is known.
    """

    longest: Callable[[str], float | None]
    turn: float | None = None
    _took: dict[str, float] = field(default_factory=dict)  # seconds of each side's last turn

    def took(self, job: Job, seconds: float) -> None:
        """Note how long a run took."""
        if job.kind == "turn":
            self._took[job.side] = seconds

    def left(self, jobs: Sequence[Job]) -> str:
        """Tell how long these runs will take, as "12 runs, about 3:20 left"; empty if there are none."""
        if not jobs:
            return ""
        runs = f"{len(jobs)} run{'s' if len(jobs) > 1 else ''}"
        known = [*self._took.values(), *([self.turn] if self.turn is not None else [])]
        if not known:
            return f"{runs} left"
        seconds = 0.0
        for job in jobs:
            turn = self._took.get(job.side, mean(known))
            seconds += turn if job.kind != "training" else max(turn, self.longest(job.side) or 0.0)
        most = "up to about" if any(job.kind == "training" for job in jobs) else "about"
        return f"{runs}, {most} {clock(seconds)} left"
