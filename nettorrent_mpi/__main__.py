"""The entry point `nettorrent COMMAND`, the same as `python -m nettorrent_mpi COMMAND`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nettorrent_mpi import env
from nettorrent_mpi.plan.errors import NetTorrentError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code. The environment of BLAS and MPI is set before either loads."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    chosen = env.prepare()
    from nettorrent_mpi.cli.commands import find, launched_first, warnings_shown

    try:
        with warnings_shown():
            return find(arguments)(arguments, chosen)
    except NetTorrentError as error:  # of what runs without ranks, or before they have met
        if launched_first():
            sys.stderr.write(f"nettorrent: error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
