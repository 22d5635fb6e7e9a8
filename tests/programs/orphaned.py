"""orphaned.py FOLDER HOW: ranks that write their process ids to FOLDER/pid.RANK and then never end by themselves.

HOW is what they do: `wait` in MPI for a rank that does not come (rank 0, which sleeps), `spin` in a loop of Python's,
or `stop` (rank 0 stops itself by SIGSTOP, the others wait).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from nettorrent_mpi import env

env.prepare()

from nettorrent_mpi.comm.world import World  # noqa: E402
from nettorrent_mpi.engine.signals import Signals  # noqa: E402

folder, how = Path(sys.argv[1]), sys.argv[2]
Signals().listen(tells=False)  # as in a training, which these signals do not end
world = World()
world.watch()
world.barrier()
(folder / f"pid.{world.rank}.part").write_text(str(os.getpid()))
(folder / f"pid.{world.rank}.part").rename(folder / f"pid.{world.rank}")
if how == "stop" and world.rank == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
while how == "spin":
    pass
while world.rank == 0:
    time.sleep(1000)
world.barrier()
