"""Runs `nettorrent speedup` with these arguments on the host device: `python -m tests.gpu.programs.speedup ...`."""

from __future__ import annotations

import sys

from nettorrent_mpi import env

env.prepare()

from nettorrent_mpi.cli.arguments import parse  # noqa: E402
from nettorrent_mpi.speedup.command import speedup  # noqa: E402
from tests.gpu.host.main import install  # noqa: E402

if __name__ == "__main__":
    install(0)
    args = parse(["speedup", *sys.argv[1:]])
    args.command_line = ["speedup", *sys.argv[1:]]
    speedup(args, program=[sys.executable, "-m", "tests.gpu.host.main"])
