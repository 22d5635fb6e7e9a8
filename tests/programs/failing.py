"""failing.py PHASE RANK [ARGUMENTS...]: `nettorrent train ARGUMENTS` in which RANK raises in PHASE, telling when."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from nettorrent_mpi import env

env.prepare()

from mpi4py import MPI  # noqa: E402

from nettorrent_mpi.__main__ import main  # noqa: E402
from nettorrent_mpi.app import run, setup  # noqa: E402
from nettorrent_mpi.engine.engine import Engine  # noqa: E402
from nettorrent_mpi.engine.exchange import Exchange  # noqa: E402
from nettorrent_mpi.engine.pipeline import Pipeline  # noqa: E402
from nettorrent_mpi.engine.reports import Reports  # noqa: E402

PHASES: dict[str, tuple[Any, str, int]] = {  # what fails at which of its calls
    "setup": (run, "set_up", 1),
    "wiring": (Engine, "__init__", 1),
    "data": (Engine, "open_data", 1),
    "forward": (Pipeline, "_forward", 9),
    "backward": (Pipeline, "_backward", 9),
    "reduce": (Exchange, "reduce", 3),
    "update": (Exchange, "update", 3),
    "report": (Reports, "start", 2),
    "evaluate": (Engine, "evaluate_test", 1),
    "save": (Engine, "parameters", 1),
    "close": (Engine, "close", 1),
}
assert setup is not None


def fail_in(phase: str) -> None:
    holder, name, turn = PHASES[phase]
    original = getattr(holder, name)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn:
            os.write(2, f"FAILED AT {time.time()}\n".encode())
            raise RuntimeError(f"made to fail in {phase}")
        return original(*args, **kwargs)

    setattr(holder, name, failing)


phase, rank = sys.argv[1], int(sys.argv[2])
if rank == MPI.COMM_WORLD.rank:
    fail_in(phase)
sys.exit(main(["train", *sys.argv[3:]]))
