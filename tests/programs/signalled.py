"""signalled.py STEP RANK [ARGUMENTS...]: `nettorrent train ARGUMENTS` in which RANK gets SIGUSR2 at its STEPth step."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from nettorrent_mpi import env

env.prepare()

from mpi4py import MPI  # noqa: E402

from nettorrent_mpi.__main__ import main  # noqa: E402
from nettorrent_mpi.engine.engine import Engine  # noqa: E402
from nettorrent_mpi.engine.work import Work  # noqa: E402

at, rank = int(sys.argv[1]), int(sys.argv[2])
original = Engine.prepare


def prepare(self: Engine, n: int, *args: Any) -> Work:
    if n == at and rank == MPI.COMM_WORLD.rank:
        os.kill(os.getpid(), signal.SIGUSR2)
    return original(self, n, *args)


Engine.prepare = prepare  # type: ignore[method-assign]
sys.exit(main(["train", *sys.argv[3:]]))
