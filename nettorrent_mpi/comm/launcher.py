"""A rank ends when its launcher is gone, because nobody else would end it.

Launchers end their ranks, but not if they are killed themselves (kill -9, a machine out of memory): under MPICH, ranks
whose hydra_pmi_proxy was killed wait for each other for ever, and under Open MPI so do those of a daemon whose launcher
was killed. Each rank therefore knows which of its ancestors belong to its launcher, and looks after them from before
MPI starts until the process ends. What MPI has left in /dev/shm and in the launcher's folder in /tmp is removed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from nettorrent_mpi import env
from nettorrent_mpi.comm.processes import GONE, Process, ancestors, children
from nettorrent_mpi.comm.ticking import TICKING

# Names as /proc tells them, of 15 letters at most.
_HEADS = {"mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "prun", "srun", "slurmstepd", "palsd", "jsrun"}
_DAEMONS = {
    "prted",
    "orted",
    "prte",
    "hydra_pmi_proxy",
    "hydra_bstrap_pr",
}  # started by a head, by an agent such as ssh
# What MPI libraries and this package have in /dev/shm; other mapped files there may be somebody's data.
_IN_MEMORY = re.compile(r"(sm_segment|vader_segment|open_mpi|mpich_shm|mpich_shar|ucx_shm|psm\d|nettorrent_mpi-)")
_SESSION = re.compile(r"(ompi|prte|prted|pmix)\.")
BACKING = "/dev/shm"
TOLERANT = "OMPI_MCA_mpi_ft_enable"  # set for the ranks by mpirun --with-ft ulfm
GRACE = 2  # ticks in which other ranks of this machine may clean up before they are killed


class LauncherWatch:
    """A LauncherWatch looks after this rank's launcher. `siblings` are the processes of the other ranks on this
    machine, as far as known: those that cannot end themselves, because they are stopped, are killed by those that do.
    `tells` is called with what has gone, so that ranks end whose own launchers notice nothing, as those of other nodes
    under srun."""

    def __init__(self, line: Iterable[Process]):
        self.processes = belonging(list(line))
        self.siblings: list[Process] = []
        self.tells: Callable[[str], None] = lambda gone: None
        self._watched = False
        self._left: int | None = None  # ticks until the end, once it is gone
        self._parent = os.getppid()

    @property
    def head(self) -> Process | None:
        """Return the launcher itself, where it runs on this machine."""
        return next((each for each in reversed(self.processes) if each.name in _HEADS), None)

    def started(self) -> list[Process]:
        """Return what the launcher, or its daemon here, has started on this machine: ranks, and agents such as ssh."""
        near = next((each for each in self.processes if each.name in _HEADS | _DAEMONS), None)
        return [] if near is None else children(near.pid)

    def watch(self) -> None:
        """Look after the launcher from now on. A second call does nothing."""
        if self._watched or not self.processes:
            return
        self._watched = True
        for each in self.processes:
            with suppress(OSError, AttributeError):  # an old kernel: ticks find out
                TICKING.when(os.pidfd_open(each.pid), self._look)
        TICKING.each(self._look)

    @property
    def gone(self) -> bool:
        """Whether the launcher is gone, so that this rank ends."""
        return self._left is not None

    def _look(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self._end()
            return
        gone = next((each for each in self.processes if each.state == GONE), None)
        if gone is None and os.getppid() == self._parent:
            return
        tidy()
        self._left = GRACE
        name = f"{gone.name}, process {gone.pid}" if gone is not None else f"process {self._parent}"
        with suppress(OSError):
            os.write(2, f"nettorrent: process {os.getpid()} ends, because its launcher ({name}) is gone\n".encode())
        with suppress(Exception):  # this rank ends all the same
            self.tells(name)

    def _end(self) -> None:
        for each in self.siblings:
            each.end(signal.SIGKILL)
        depart(1)


def tolerant() -> bool:
    """Whether the launcher lets the other ranks live when one dies: Open MPI's `mpirun --with-ft ulfm`."""
    return os.environ.get(TOLERANT, "").lower() in ("1", "true")


def is_rank(process: Process) -> bool:
    """Whether this process, of this user, was started as a rank of this run: by Open MPI's launcher."""
    run = f"PMIX_NAMESPACE={os.environ.get('PMIX_NAMESPACE')}"
    try:
        return run in Path(f"/proc/{process.pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return False


def belonging(line: list[Process]) -> list[Process]:
    """Return which ancestors, the nearest first, belong to the launcher: those up to the farthest launcher, and what
    has started a daemon; the parent alone where no launcher is known."""
    farthest = max((i for i, each in enumerate(line) if each.name in _HEADS | _DAEMONS), default=None)
    if farthest is None:
        return line[:1]
    return line[: farthest + 1 + (line[farthest].name in _DAEMONS)]


def tidy() -> None:
    """Remove what MPI has left in memory and in its session's folder, where this process used it."""
    for path in shared_files():
        with suppress(OSError):
            os.unlink(path)
    folder = Path(os.environ.get("PMIX_SERVER_TMPDIR", ""))
    with suppress(OSError):
        if _SESSION.match(folder.name) and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)


def flush() -> None:
    """Write out what standard output and standard error still hold, as far as they take it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def depart(code: int, *, others_go_on: bool = False) -> NoReturn:
    """End this process at once with this code, without MPI's own end, and leave nothing of it behind, unless others
    need it."""
    if not others_go_on:
        tidy()
    os._exit(code)


def unname(everyone: Iterable[list[str]]) -> None:
    """Take the names from MPI's files in memory that all ranks of this machine have mapped: then nothing stays, however
    they end. `everyone`: the files of each of these ranks."""
    for path in set.intersection(*map(set, everyone)):
        with suppress(OSError):
            os.unlink(path)


def shared_files() -> list[str]:
    """Return the files in BACKING that MPI or this package has made and this process has mapped, and which still have a
    name."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    mapped = {line.split(maxsplit=5)[5] for line in lines if f" {BACKING}/" in line}
    named = [each for each in sorted(mapped) if not each.endswith("(deleted)")]
    return [each for each in named if _IN_MEMORY.match(os.path.basename(each))]


LAUNCHER = LauncherWatch(ancestors() if env.launched(os.environ) else [])
