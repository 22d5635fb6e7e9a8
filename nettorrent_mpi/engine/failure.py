"""An error that one rank raises alone ends the others, too; one that all raise alike ends their present operation."""

from __future__ import annotations

import sys
import time
import traceback

from nettorrent_mpi.comm.script_errors import line_of
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.plan.errors import INTERRUPTED, NetTorrentError, RemoteError, UserError, in_one_line

PATIENCE = 1.5  # seconds in which a failed rank reports its own error and ends all; later another rank does it


def agreed(error: BaseException, world: World) -> bool:
    """Whether all ranks of the world raise this error alike: then it ends their present operation and nothing else."""
    return isinstance(error, NetTorrentError) and world.members <= error.agreed


def end_all(world: World, error: BaseException, *, in_script: bool = True) -> int:
    """Print an error that this rank raised alone, and end all ranks of the program, which would wait for this one
    forever.

    Returns the exit code. With `in_script` a user's mistake is told with its place in the script, and an error that is
    not the package's has a traceback.
    """
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) and error.code else 1
        text = f": {error.code}" if isinstance(error.code, str) else ""
        sys.stderr.write(f"rank {world.rank} of {world.size} left by sys.exit, which ends all ranks{text}\n")
    elif isinstance(error, KeyboardInterrupt):
        code = INTERRUPTED
        if world.rank == 0:
            sys.stderr.write("nettorrent: interrupted\n")
    elif isinstance(error, RemoteError):
        time.sleep(PATIENCE)
        code = error.exit_code
        sys.stderr.write(f"rank {world.rank} of {world.size} ends, because another one failed: {error}\n")
    elif in_script and isinstance(error, UserError):
        code = error.exit_code
        sys.stderr.write(line_of(error, error.__traceback__))
    elif not in_script and isinstance(error, Exception) and (told := in_one_line(error)) is not None:
        code = told.exit_code
        sys.stderr.write(f"nettorrent: error: {told}\n")
    else:
        code = getattr(error, "exit_code", 1)
        text = "".join(traceback.format_exception(error))
        sys.stderr.write(f"rank {world.rank} of {world.size} on {world.host} failed:\n{text}")
    world.abort(code)
    return code
