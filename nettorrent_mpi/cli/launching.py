"""Runs that a command starts under mpirun while it is no rank of them itself: the launcher, the ranks, and the end."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nettorrent_mpi.comm.processes import ending_with_this
from nettorrent_mpi.env import given
from nettorrent_mpi.plan.errors import LaunchError

TOLERANT = ("--with-ft", "ulfm")  # options of Open MPI's mpirun by which a run survives the loss of ranks
MARK = "NETTORRENT_STARTED_RUN"  # a variable of all processes of a StartedRun
RANK = "OMPI_COMM_WORLD_RANK"
PATIENCE = 5.0  # seconds that the processes of a run have to end after their launcher


def as_root() -> dict[str, str]:
    """Return the variables that let Open MPI run as root, which it refuses by default; nothing for other users."""
    return dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1") if os.geteuid() == 0 else {}


def find_mpirun() -> str:
    """Return the mpirun of this Python's environment, or else the first on PATH. Raises LaunchError if there is
    none."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise LaunchError("there is no mpirun beside this Python or on PATH: install an MPI (pip install '.[mpi]')")
    return found


def version_of(mpirun: str) -> str:
    """Return what this mpirun says of its version; nothing if it says nothing."""
    try:
        done = subprocess.run(
            [mpirun, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def is_open_mpi(mpirun: str) -> bool:
    """Whether this mpirun belongs to Open MPI."""
    told = version_of(mpirun)
    return any(name in told for name in ("Open MPI", "OpenRTE", "PRRTE"))


def tolerant_mpirun() -> list[str]:
    """Return the mpirun, with the options, whose ranks may die while the others go on. Raises LaunchError where there
    is none."""
    mpirun = find_mpirun()
    told = version_of(mpirun)
    found = re.search(r"\(Open MPI\) (\d+)", told)
    if found is None or int(found[1]) < 5:
        what = told.strip().partition("\n")[0] or "a program that tells no version"
        raise LaunchError(
            f"{mpirun} is {what}: only Open MPI 5 and newer let ranks die while the others go on (pip install '.[mpi]')"
        )
    return [mpirun, *TOLERANT, "--oversubscribe"]


class StartedRun:
    """A StartedRun is a program on some ranks of this node, whose output goes to a file. It is a context manager that
    ends all its processes; they are known by a variable of their environment."""

    def __init__(self, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None):
        self._mark = secrets.token_hex(8)
        environment = given(os.environ) | as_root() | dict(variables or {}) | {MARK: self._mark}
        self.began = time.monotonic()
        self.left = 0  # processes that did not end with the run
        with log.open("wb") as output:
            self._launcher = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=ending_with_this(),  # noqa: PLW1509 (it takes no lock)
            )  # fmt: skip

    def __enter__(self) -> StartedRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def code(self) -> int | None:
        """The launcher's exit code; None while it runs."""
        return self._launcher.poll()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def ranks(self) -> dict[int, int]:
        """Return the ranks that live: their number at the start -> their process."""
        found = {process: (own, environment) for process, own, environment in self._processes()}
        ranks = {}
        for process, (parent, environment) in found.items():
            above = found.get(parent, (0, {}))[1]  # a rank's own children have its environment
            if RANK in environment and RANK not in above:
                ranks[int(environment[RANK])] = process
        return ranks

    def end(self) -> None:
        """Kill what is left of the run; after the launcher's end its processes have some seconds to end, too."""
        until = time.monotonic() + (PATIENCE if self.code is not None else 0.0)
        while self._processes() and time.monotonic() < until:
            time.sleep(0.05)
        left = [process for process, _, _ in self._processes()]
        self.left = len(left)
        while left:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)
            left = [process for process, _, _ in self._processes()]
        self._launcher.wait()

    def _processes(self) -> list[tuple[int, int, dict[str, str]]]:
        """Return (process, its parent, its environment) of all that live."""
        mark, found = f"{MARK}={self._mark}", []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                parent = int((path / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            except (OSError, IndexError):  # it has just ended, or is another user's
                continue
            if mark in words:
                found.append((int(path.name), parent, dict(word.partition("=")[::2] for word in words)))
        return found


@contextlib.contextmanager
def stopped_like_interrupted() -> Iterator[None]:
    """Let SIGTERM, which batch systems send, end the started programs as Ctrl-C does."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
