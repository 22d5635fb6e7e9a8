"""The entry point `nettorrent COMMAND`, the same as `python -m nettorrent_mpi COMMAND`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nettorrent_mpi import env
from nettorrent_mpi.plan.errors import INTERRUPTED, UserError, in_one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code. The environment of BLAS and MPI is set before either loads."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    chosen = env.prepare()
    from nettorrent_mpi.cli.commands import find, tells_results, warnings_shown
    from nettorrent_mpi.cli.first import is_first
    from nettorrent_mpi.cli.streams import safe_streams

    with safe_streams() as output:
        try:
            with warnings_shown():
                code = find(arguments)(arguments, chosen)
        except KeyboardInterrupt:
            sys.stderr.write("nettorrent: interrupted\n")
            code = INTERRUPTED
        except Exception as error:  # of what runs without ranks, or before they have met
            told = in_one_line(error)
            if told is None:
                raise
            if is_first():
                sys.stderr.write(f"nettorrent: error: {told}\n")
            code = told.exit_code
    code = code or (UserError.exit_code if output.error and tells_results(arguments) else 0)
    if "nettorrent_mpi.comm.library" in sys.modules:
        sys.modules["nettorrent_mpi.comm.library"].leave_early(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
