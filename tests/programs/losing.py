"""losing.py DEATHS [ARGUMENTS...]: `nettorrent train ARGUMENTS` in which ranks die by SIGKILL.

DEATHS are words RANK:PHASE:CALL with commas between: RANK, numbered as at the start, dies in its call number CALL
(from 1) of what PHASE names.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from nettorrent_mpi import env

env.prepare()

from mpi4py import MPI  # noqa: E402

from nettorrent_mpi import planning  # noqa: E402
from nettorrent_mpi.__main__ import main  # noqa: E402
from nettorrent_mpi.api import Trainer  # noqa: E402
from nettorrent_mpi.cli.run import Run  # noqa: E402
from nettorrent_mpi.comm.world import World  # noqa: E402
from nettorrent_mpi.engine.engine import Engine  # noqa: E402
from nettorrent_mpi.engine.evaluation import Evaluator  # noqa: E402
from nettorrent_mpi.engine.failover import Recovery  # noqa: E402
from nettorrent_mpi.engine.pipeline import Pipeline  # noqa: E402
from nettorrent_mpi.engine.redundancy import Redundancy  # noqa: E402
from nettorrent_mpi.engine.reports import Reports  # noqa: E402
from nettorrent_mpi.engine.resharding import Blocks  # noqa: E402
from nettorrent_mpi.engine.state import State  # noqa: E402
from nettorrent_mpi.engine.training_files import TrainingFiles  # noqa: E402
from nettorrent_mpi.engine.update import Update  # noqa: E402
from nettorrent_mpi.exchange.elite import EliteExchange  # noqa: E402
from nettorrent_mpi.exchange.gossip import GossipExchange  # noqa: E402
from nettorrent_mpi.exchange.mixer import Mixer  # noqa: E402
from nettorrent_mpi.exchange.replicas import Replicas  # noqa: E402

PHASES: dict[str, tuple[Any, str]] = {
    "setup": (planning, "set_up"),
    "wiring": (Engine, "attach"),
    "data": (Engine, "open_data"),
    "begin": (Run, "begin"),
    "step": (Engine, "prepare"),
    "forward": (Pipeline, "_forward"),
    "backward": (Pipeline, "_backward"),
    "inputs": (Pipeline, "_backward_inputs"),
    "weights": (Pipeline, "_backward_weights"),
    "reduce": (Update, "reduce"),
    "update": (Update, "update"),
    "gather": (State, "gather"),
    "report": (Reports, "start"),
    "copy": (Redundancy, "_begin"),
    "finish": (Redundancy, "_finish"),
    "evaluate": (Evaluator, "test"),
    "exchange": (GossipExchange, "after_update"),
    "merge": (Mixer, "merge"),
    "settle": (GossipExchange, "settle"),
    "average": (GossipExchange, "average"),
    "calibrate": (GossipExchange, "_calibrate"),
    "compare": (EliteExchange, "at_rest"),
    "adopt": (Replicas, "adopt"),
    "become": (Replicas, "become"),
    "checkpoint": (TrainingFiles, "write"),
    "summary": (Trainer, "summary"),
    "save": (Engine, "parameters"),
    "close": (Engine, "close"),
    "free": (World, "free"),
    "shrink": (World, "shrink"),  # what a recovery does
    "restore": (Recovery, "_restore"),
    "take": (Engine, "restore"),
    "give": (Blocks, "give"),  # by a rank that has no place
    "refresh": (Redundancy, "refresh"),
}
assert all(hasattr(holder, name) for holder, name in PHASES.values()), "a phase is named after nothing that exists"


def die_in(phase: str, turn: int) -> None:
    holder, name = PHASES[phase]
    original, calls = getattr(holder, name), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn:
            os.write(2, f"DEAD AT {time.time()}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(holder, name, dying)


for death in filter(None, sys.argv[1].split(",")):
    rank, phase, turn = death.split(":")
    if int(rank) == MPI.COMM_WORLD.rank:
        die_in(phase, int(turn))
sys.exit(main(["train", *sys.argv[2:]]))
