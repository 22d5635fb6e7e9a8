"""The entry point `nettorrent COMMAND`, the same as `python -m nettorrent_mpi COMMAND`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nettorrent_mpi import env


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code. The environment of BLAS and MPI is set before either loads."""
    chosen = env.prepare()
    from nettorrent_mpi.cli.commands import run

    return run(list(sys.argv[1:] if arguments is None else arguments), chosen)


if __name__ == "__main__":
    sys.exit(main())
