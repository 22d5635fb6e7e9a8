"""A script that ends by an error which nobody catches ends all ranks; a user's mistake is told in one line, with its
exit code.

Python's own end would be a traceback and exit code 1 on one rank, and on several MPI would wait for ever in its end for
ranks that wait for this one.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from pathlib import Path
from types import TracebackType

from nettorrent_mpi.comm import library
from nettorrent_mpi.comm.leaving import end_all
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.plan.errors import UserError

PATIENCE = 1.5  # seconds in which the first of the ranks that raise an error alike tells of it, and ends all
_python_hook = sys.excepthook


def look_after_script() -> None:
    """Let errors that nobody catches end this process, and all ranks, as this module says."""
    sys.excepthook = _hook
    atexit.register(abort_after_error)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    interactive = sys.flags.inspect or hasattr(sys, "ps1")
    if interactive or not isinstance(error, UserError):
        _python_hook(kind, error, trace)
        return
    if error.agreed and _place() != min(error.agreed):
        time.sleep(PATIENCE)
    sys.stderr.write(line_of(error, trace))
    raise SystemExit(error.exit_code)  # the one way to another exit code that lets the interpreter end as usual


def line_of(error: UserError, trace: TracebackType | None) -> str:
    """Return the line that tells of a mistake in a script: the place in the script, the error, and the rank where it is
    one rank's alone."""
    import sysconfig  # an error is rare, and these take time on every rank
    import traceback

    folders = (str(Path(__file__).parents[1]), *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")))
    libraries = ("<frozen", *(folder + os.sep for folder in folders))  # what lies there is not the script
    lines = [
        f"{frame.f_code.co_filename}:{line}: "
        for frame, line in traceback.walk_tb(trace)
        if not frame.f_code.co_filename.startswith(libraries)
    ]
    alone = "" if error.agreed or _size() == 1 else f" (on rank {_place()})"
    return f"nettorrent: error: {''.join(lines[-1:])}{error}{alone}\n"


def abort_after_error() -> None:
    """End all ranks if this one's script has failed, when the interpreter exits."""
    failed = getattr(sys, "last_type", None) is not None  # set by an error that nobody caught
    if not failed or _size() == 1:
        return
    if not isinstance(sys.last_value, UserError):
        sys.stderr.write(f"rank {_place()} of {_size()} has failed, which ends all ranks\n")
    end_all(getattr(sys.last_value, "exit_code", 1))


def _size() -> int:
    """Return the number of ranks of the program; 1 where MPI does not run."""
    runs = library.loaded() and MPI.Is_initialized() and not MPI.Is_finalized()
    return MPI.COMM_WORLD.Get_size() if runs else 1


def _place() -> int:
    """Return this rank's number in the program."""
    return MPI.COMM_WORLD.Get_rank() if _size() > 1 else 0
