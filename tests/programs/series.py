"""series.py FILE: runs many commands `nettorrent ARGUMENTS`, one after another, on the same ranks: one start of MPI.

FILE holds a JSON list of lists of arguments. Rank 0 writes a list of [exit code, what it told] to FILE.done. A command
that fails ends the series.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from nettorrent_mpi import env

env.prepare()

from mpi4py import MPI  # noqa: E402

from nettorrent_mpi.__main__ import main  # noqa: E402

file = Path(sys.argv[1])
done = []
for arguments in json.loads(file.read_text()):
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        done.append((main(arguments), told.getvalue()))
    if done[-1][0]:
        break
if MPI.COMM_WORLD.rank == 0:
    file.with_name(file.name + ".done").write_text(json.dumps(done))
