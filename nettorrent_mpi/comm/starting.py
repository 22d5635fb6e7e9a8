"""A StartWatch looks after the ranks while MPI starts, where the launcher lets other ranks live when one dies (`mpirun
--with-ft ulfm`).

MPI tells of dead ranks only once it has started: until then the others would wait for one for ever, inside MPI_Init,
which keeps Python's lock. So a process of its own watches, for each rank, and ends the run.
"""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from typing import NoReturn

from nettorrent_mpi.comm.launcher import LAUNCHER, is_rank, tolerant
from nettorrent_mpi.comm.processes import GONE, Process, this_process

LIMIT = "NETTORRENT_START_SECONDS"  # a variable with another limit for the start of MPI
SECOND = 1.0  # between two looks
MISSING = 3  # looks in which a rank of this machine has to be missing
_QUIET = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # they are the rank's business


class StartWatch:
    """A StartWatch looks after the ranks of this machine, by their launcher's child processes, until `stop`; what
    happens to those of other machines shows by the limit."""

    def __init__(self) -> None:
        self._process = 0
        self._own = this_process()
        self._ranks: set[Process] = set()
        self._missing = 0
        size, here = (_number(f"OMPI_COMM_WORLD_{name}SIZE") for name in ("", "LOCAL_"))
        self._here, self._limit = here, _number(LIMIT) or 60 + size
        if not tolerant() or size < 2:
            return
        until, self._line = os.pipe()
        self._process = os.fork()
        if not self._process:
            self._run(until)
        os.close(until)

    def stop(self) -> None:
        """Stop watching: MPI has started."""
        if self._process:
            os.close(self._line)
            with suppress(ChildProcessError):
                os.waitpid(self._process, 0)
            self._process = 0

    def _run(self, until: int) -> NoReturn:
        """Watch, in a process of its own, until the rank stops it or ends."""
        try:
            os.close(self._line)
            for each in _QUIET:
                signal.signal(each, signal.SIG_DFL)
            began = time.monotonic()
            while not select.select([until], [], [], SECOND)[0]:
                if self._has_lost():
                    self._end("a rank of this machine has ended")
                if time.monotonic() - began > self._limit:
                    self._end(f"it has taken {self._limit} s ({LIMIT}), perhaps because a rank elsewhere has ended")
        finally:
            os._exit(0)

    def _has_lost(self) -> bool:
        """Whether ranks of this machine are missing: one that was seen, or too many processes for all to live."""
        alive = {each for each in LAUNCHER.started() if each.state != GONE}
        self._ranks |= {each for each in alive - self._ranks if is_rank(each)}
        missing = not self._ranks <= alive or 0 < len(alive) < self._here
        self._missing = self._missing + 1 if missing else 0
        return self._missing >= MISSING

    def _end(self, why: str) -> None:
        """End all ranks of this machine, and, where the launcher is on it, those of the others."""
        alive = [each for each in LAUNCHER.started() if each in self._ranks and each.state != GONE]
        if self._own in alive and self._own != min(alive, key=lambda each: each.pid):
            time.sleep(2 * SECOND)  # the first one does it
        else:
            with suppress(OSError):
                os.write(2, f"nettorrent: error: the run ends, because MPI does not start: {why}\n".encode())
            time.sleep(SECOND / 5)  # mpirun drops output that it has not forwarded
        if LAUNCHER.head is not None:
            LAUNCHER.head.end(signal.SIGTERM)
            time.sleep(SECOND)
        for each in alive:
            each.end(signal.SIGKILL)
        self._own.end(signal.SIGKILL)
        os._exit(1)


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
