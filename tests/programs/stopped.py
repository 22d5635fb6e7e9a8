"""stopped.py FOLDER PAUSE [ARGUMENTS...]: `nettorrent train ARGUMENTS` whose steps are timed, and which may be stopped.

Each rank writes its process id to FOLDER/pid.RANK, and the time (time.monotonic, as float64) after every step to
FOLDER/steps.RANK. A step takes PAUSE seconds longer than it would: so the cores are not busy, and no rank becomes
faster because another one stands still. A rank that was stopped for seconds works without pauses until it has made up
for the steps it missed, so that the others need not wait for it so long in the end.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from pathlib import Path

from nettorrent_mpi import env

env.prepare()

from mpi4py import MPI  # noqa: E402

from nettorrent_mpi.__main__ import main  # noqa: E402
from nettorrent_mpi.engine.pipeline import Pipeline, Work  # noqa: E402

folder, pause = Path(sys.argv[1]), float(sys.argv[2])
rank = MPI.COMM_WORLD.rank
log = os.open(folder / f"steps.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
original = Pipeline.run
first = last = 0.0
done = missed = 0


def run(self: Pipeline, work: Work) -> None:
    global first, last, done, missed
    original(self, work)
    if not work.training:
        return
    if missed:
        missed -= 1
    else:
        time.sleep(pause)
    now = time.monotonic()
    if last and now - last > 2:
        missed = int((now - last) / (last - first) * done)
    done, last, first = done + 1, now, first or now
    os.write(log, struct.pack("d", now))


Pipeline.run = run  # type: ignore[method-assign]
(folder / f"pid.{rank}.part").write_text(str(os.getpid()))
(folder / f"pid.{rank}.part").rename(folder / f"pid.{rank}")
sys.exit(main(["train", *sys.argv[3:]]))
