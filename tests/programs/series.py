"""series.py FILE [on]: runs many commands `nettorrent ARGUMENTS` one after another on the same ranks, started once.

FILE holds a JSON list of lists of arguments. Rank 0 writes a list of [exit code, what it told, what the others told] to
FILE.done. A command that fails ends the series, unless it is to go `on`: where all ranks agree on what went wrong, they
do. Ranks whose exit codes differ end it, too.
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


def run(arguments: list[str]) -> tuple[int, str]:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse, after the help
            code = int(end.code or 0)
    return code, told.getvalue()


file, on = Path(sys.argv[1]), sys.argv[2:] == ["on"]
done = []
for arguments in json.loads(file.read_text()):
    codes, texts = zip(*MPI.COMM_WORLD.allgather(run(arguments)), strict=True)
    done.append((codes[0], texts[0], "".join(texts[1:])))
    if len(set(codes)) > 1:
        done[-1] = (-1, f"exit codes {codes}\n{texts[0]}", done[-1][2])
    if done[-1][0] == -1 or (done[-1][0] and not on):
        break
if MPI.COMM_WORLD.rank == 0:
    file.with_name(file.name + ".done").write_text(json.dumps(done))
