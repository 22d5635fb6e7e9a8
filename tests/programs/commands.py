"""commands.py FILE: runs many commands `nettorrent ARGUMENTS` in one process, which saves starting Python for each.

FILE holds a JSON list of lists of arguments. Beside it, FILE.done gets a list of [exit code, what was written].
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from pathlib import Path

from nettorrent_mpi.__main__ import main


def run(arguments: list[str]) -> tuple[int, str]:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            code = main(arguments)
        except SystemExit as end:  # argparse, after the help
            code = int(end.code or 0)
        except Exception:
            code = 1
            traceback.print_exc()
    return code, told.getvalue()


if __name__ == "__main__":
    file = Path(sys.argv[1])
    done = [run(arguments) for arguments in json.loads(file.read_text())]
    file.with_name(file.name + ".done").write_text(json.dumps(done))
