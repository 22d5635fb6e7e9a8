"""saving.py [ARGUMENTS...]: `nettorrent train ARGUMENTS`, which tells each time when a checkpoint is begun."""

from __future__ import annotations

import os
import sys

from nettorrent_mpi import env

env.prepare()

from nettorrent_mpi.__main__ import main  # noqa: E402
from nettorrent_mpi.engine.checkpoint_writer import CheckpointWriter  # noqa: E402

original = CheckpointWriter.begin


def begin(self: CheckpointWriter, *given: object) -> None:
    original(self, *given)  # type: ignore[arg-type]
    os.write(1, f"BEGUN {given[0]} {os.getpid()}\n".encode())


CheckpointWriter.begin = begin  # type: ignore[method-assign, assignment]
sys.exit(main(["train", *sys.argv[1:]]))
