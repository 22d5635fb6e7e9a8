"""early.py RANK MOMENT [ARGUMENTS...]: `nettorrent train ARGUMENTS` in which a rank dies at the start, or fails.

MOMENT: `first` (before MPI starts), `late` (it does not come), `init` (after MPI has started), `meet` (when the ranks
tell each other of themselves), `watch` (when the watchdogs are made), `fail` (it raises an error) or `mistake` (one of
the user's).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from nettorrent_mpi.__main__ import main
from nettorrent_mpi.comm import world
from nettorrent_mpi.plan.errors import DataError


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_: Any) -> None:
    raise DataError("a file is torn") if moment == "mistake" else RuntimeError("a bug")


rank, moment = sys.argv[1:3]
if rank in (os.environ.get("OMPI_COMM_WORLD_RANK"), os.environ.get("PMI_RANK")):
    if moment == "first":
        die()
    elif moment == "late":
        time.sleep(100)
    elif moment == "init":
        from mpi4py import MPI

        assert MPI.Is_initialized()
        die()
    elif moment == "meet":
        world.shared_files = die  # type: ignore[assignment]
    elif moment == "watch":
        world.Watchdog = die  # type: ignore[misc,assignment]
    else:
        from nettorrent_mpi.engine.pipeline import Pipeline

        Pipeline._forward = fail  # type: ignore[method-assign,assignment]
sys.exit(main(["train", *sys.argv[3:]]))
