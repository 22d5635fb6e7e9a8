"""stopped.py FOLDER PAUSE [ARGUMENTS...]: `nettorrent train ARGUMENTS` whose steps are timed, and which may be stopped.

See standstill.TimedSteps.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nettorrent_mpi import env

env.prepare()

from mpi4py import MPI  # noqa: E402

from nettorrent_mpi.__main__ import main  # noqa: E402
from nettorrent_mpi.engine.pipeline import Pipeline  # noqa: E402
from nettorrent_mpi.engine.work import Work  # noqa: E402
from tests.standstill import TimedSteps  # noqa: E402

folder, pause = Path(sys.argv[1]), float(sys.argv[2])
timed, original = TimedSteps(folder, MPI.COMM_WORLD.rank, pause), Pipeline.run


def run(self: Pipeline, work: Work) -> None:
    original(self, work)
    if work.training:
        timed.done()


Pipeline.run = run  # type: ignore[method-assign]
sys.exit(main(["train", *sys.argv[3:]]))
