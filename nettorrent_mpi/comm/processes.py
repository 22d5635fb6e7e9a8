"""Linux tells of the processes of this machine in /proc. A process is known by its number and the time of its start,
because numbers are used again."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

GONE = "gone"
_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK, _PR_GET_TIMERSLACK = 1, 29, 30


class Process(NamedTuple):
    """A Process is told by its number, when it started (ticks since the machine did), and its program's name."""

    pid: int
    started: str
    name: str = ""

    @property
    def state(self) -> str:
        """Return the letter of its state (R runs, S sleeps, D waits for a disk, T is stopped), GONE if it has ended."""
        found = _stat(self.pid)
        if found is None or found.started != self.started or found.state in "ZX":
            return GONE
        return found.state

    def end(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.state != GONE:
            with suppress(OSError):
                os.kill(self.pid, number)


class _Stat(NamedTuple):
    name: str
    state: str
    parent: int
    started: str


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head, _, rest = text.rpartition(")")
    fields = rest.split()
    return _Stat(head.partition("(")[2], fields[0], int(fields[1]), fields[19])


def process(pid: int) -> Process | None:
    """Return the process of this number; None if there is none, or nothing is told of it."""
    found = _stat(pid)
    return None if found is None else Process(pid, found.started, found.name)


def this_process() -> Process:
    """Return the process that calls."""
    return process(os.getpid()) or Process(os.getpid(), "")


def children(pid: int) -> list[Process]:
    """Return the processes that this one has started, as far as the kernel tells."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [process(int(word)) for word in path.read_text().split()]
    return [each for each in found if each is not None]


def ancestors() -> list[Process]:
    """Return this process's parent, that one's parent and so on, but the first process of the machine."""
    line: list[Process] = []
    pid = os.getppid()
    while pid > 1:
        found = _stat(pid)
        if found is None:
            break
        line.append(Process(pid, found.started, found.name))
        pid = found.parent
    return line


def ending_with_this() -> Callable[[], None]:
    """Return what a child process has to call before it becomes another program (`preexec_fn`), so that it gets SIGTERM
    when the thread that starts it ends, even by kill -9."""
    control, parent = ctypes.CDLL(None).prctl, os.getpid()

    def prepare() -> None:
        control(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has ended meanwhile
            os.kill(os.getpid(), signal.SIGTERM)

    return prepare


@contextmanager
def late_timers(seconds: float) -> Iterator[None]:
    """Let this thread's sleeps end up to so many seconds late in the `with` block: Linux's timer slack."""
    control = getattr(ctypes.CDLL(None), "prctl", None)
    if control is None:  # not Linux
        yield
        return
    before = control(_PR_GET_TIMERSLACK)
    control(_PR_SET_TIMERSLACK, ctypes.c_ulong(int(seconds * 1e9)))
    try:
        yield
    finally:
        control(_PR_SET_TIMERSLACK, ctypes.c_ulong(before))
