"""The command `nettorrent report`: a run as one HTML file."""

from __future__ import annotations

import sys
from pathlib import Path

from nettorrent_mpi.cli.runs.page import page
from nettorrent_mpi.cli.runs.run_data import read_run
from nettorrent_mpi.data.storage import check_file
from nettorrent_mpi.engine.run_files import write_whole, written
from nettorrent_mpi.plan.errors import warn


def report(place: str, output: str | None, *, overwrite: bool) -> int:
    """Write the page of the run at `place`, whole or not at all. Raises UserErrors."""
    if output is not None:
        check_file(Path(output), overwrite=overwrite)
    run = read_run(Path(place))
    for line in run.damage:
        warn(line, alone=True)
    path = run.path / "report.html" if output is None else Path(output)
    with written(path, "--output FILE"):
        write_whole(path, page(run))
    sys.stdout.write(f"{path}: open it in a browser\n")
    return 0
