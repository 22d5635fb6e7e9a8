"""The entry point `nettorrent COMMAND`, the same as `python -m nettorrent_mpi COMMAND`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from nettorrent_mpi import env
from nettorrent_mpi.plan.errors import INTERRUPTED, UserError, in_one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code. The environment of BLAS and MPI is set before either loads."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    chosen = env.prepare()
    with _loading():
        from nettorrent_mpi.cli.commands import find, tells_results, warnings_shown
        from nettorrent_mpi.cli.first import is_first
        from nettorrent_mpi.cli.streams import safe_streams

    with safe_streams() as output, ExitStack() as stack:
        stack.callback(gc.unfreeze)  # what modules hold of a library, such as HDF5, is let go before the library ends
        try:
            with warnings_shown():
                with _loading():
                    carry_out = find(arguments)
                code = carry_out(arguments, chosen)
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


@contextmanager
def _loading() -> Iterator[None]:
    """Load modules in the `with` block without looking for garbage. What they are made of stays: it is never looked
    through later, either, which took a tenth of the time until the first step."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


if __name__ == "__main__":
    sys.exit(main())
