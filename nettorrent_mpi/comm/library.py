"""The MPI library loads when it is first used, so that a process that is alone needs none."""

from __future__ import annotations

import atexit
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nettorrent_mpi import env
from nettorrent_mpi.comm.launcher import LAUNCHER, depart, flush, tolerant
from nettorrent_mpi.comm.processes import late_timers
from nettorrent_mpi.plan.errors import INTERRUPTED, SIGNALLED, LaunchError

# Seconds that MPI may take to start, and to end after all ranks have met. It keeps Python's lock meanwhile, so only a
# timer that needs no lock can end what hangs there.
STARTING, ENDING = 600.0, 60.0
# A rank that waits for others while Open MPI starts looks every tenth of a millisecond. Where ranks outnumber cores it
# takes the cores from those that it waits for, unless it sleeps longer, by so many seconds: 64 ranks on 2 cores had
# started MPI after 2.2 s instead of 2.8 s, and in a training, to which ranks come less evenly, 2.2 s instead of 2.7 s
# (5.0.11).
LATE = 0.005
WITHOUT_LOST = 5  # seconds that its end may take where it may wait for lost ranks, for ever (seen, 5.0.11)

__all__ = ["MPI", "loaded"]


def loaded() -> bool:
    """Whether MPI has been loaded, by this package or by a script."""
    return "mpi4py.MPI" in sys.modules


def leave_early(code: int) -> None:
    """End this process with this code, without MPI's own end, where that may wait for lost ranks, and without Python's,
    where a signal has ended the work of a process that is alone: a second Ctrl-C may have hit what the end waits for.
    Its work is done."""
    if tolerant() if loaded() else code in (SIGNALLED, INTERRUPTED):
        flush()
        depart(code)


def _load() -> Any:
    LAUNCHER.watch()
    if loaded():  # by a script, which also ends it
        return import_module("mpi4py.MPI")
    try:
        import_module("mpi4py").rc.thread_level = "multiple"
        with _limited(STARTING), late_timers(LATE) if env.outnumber_cores(os.environ) else nullcontext():
            module = import_module("mpi4py.MPI")
        atexit.register(_end)
        return module
    except (ImportError, RuntimeError) as error:
        told = str(error).splitlines()  # mpi4py names every file that it has tried
        reason = ": ".join(told) if len(told) < 3 else told[0]
        raise LaunchError(
            f"MPI cannot be loaded ({reason}): load your site's MPI module, or install one with pip install '.[mpi]'"
        ) from error


def _end() -> None:
    """End MPI while the launcher is still looked after, unless an error has ended the script: then all ranks are
    ended."""
    if getattr(sys, "last_type", None) is None and MPI.Is_initialized() and not MPI.Is_finalized():
        if tolerant():  # the exit code is not known here: the signal ends the process where MPI does not
            with suppress(MPI.Exception):
                MPI.COMM_WORLD.Agree(1)  # others may come much later
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(WITHOUT_LOST)
        with _limited(ENDING):
            MPI.Finalize()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """End the process, showing where it is, if the `with` block takes longer."""
    streams = [stream for stream in (sys.__stderr__,) if stream is not None and not stream.closed]
    if streams:
        faulthandler.dump_traceback_later(seconds, exit=True, file=streams[0])
    try:
        yield
    finally:
        if streams:
            faulthandler.cancel_dump_traceback_later()


class _Library:
    """A _Library stands for the module mpi4py.MPI and loads it when a name in it is first used."""

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__[name] = getattr(_load(), name)
        return value


if TYPE_CHECKING:
    from mpi4py import MPI
else:
    MPI = _Library()
