"""failing.py PHASE[:HOW] RANK [ARGUMENTS...]: `nettorrent train ARGUMENTS` in which RANK fails in PHASE, telling when.

HOW is what happens there: `raise` (the default), `exit` (sys.exit), `interrupt` (KeyboardInterrupt), `kill` (SIGKILL),
`stop` (SIGSTOP), `sleep` or `spin` (both for ever), `slow` (six calls take seconds), or `term` (SIGTERM, after
which it goes on). In the phase `none` nothing fails, steps take longer, and all tell their process ids. At its end
every rank tells how many steps it has done. The watchdog's seconds take SECOND (of the environment) each.
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
from nettorrent_mpi.comm import ticking  # noqa: E402
from nettorrent_mpi.data.rows import Inputs  # noqa: E402
from nettorrent_mpi.engine.engine import Engine  # noqa: E402
from nettorrent_mpi.engine.evaluation import Evaluator  # noqa: E402
from nettorrent_mpi.engine.pipeline import Pipeline  # noqa: E402
from nettorrent_mpi.engine.reports import Reports  # noqa: E402
from nettorrent_mpi.engine.state_copy import StateCopy  # noqa: E402
from nettorrent_mpi.engine.update import Update  # noqa: E402
from nettorrent_mpi.engine.work import Work  # noqa: E402
from nettorrent_mpi.exchange import gossip  # noqa: E402
from nettorrent_mpi.exchange.elite import EliteExchange  # noqa: E402
from nettorrent_mpi.exchange.gossip import GossipExchange  # noqa: E402
from nettorrent_mpi.exchange.mixer import Mixer  # noqa: E402
from nettorrent_mpi.exchange.replicas import Replicas  # noqa: E402
from nettorrent_mpi.exchange.rounds import Rounds  # noqa: E402

PHASES: dict[str, tuple[Any, str, int]] = {  # what fails at which of its calls
    "setup": (planning, "set_up", 1),
    "wiring": (Engine, "__init__", 1),
    "data": (Engine, "open_data", 1),
    "step": (Engine, "prepare", 4),
    "rows": (Inputs, "batch", 9),
    "forward": (Pipeline, "_forward", 9),
    "backward": (Pipeline, "_backward", 9),
    "reduce": (Update, "reduce", 3),
    "update": (Update, "update", 3),
    "report": (Reports, "start", 2),
    "reports": (Reports, "ready", 2),
    "evaluate": (Evaluator, "test", 1),
    "save": (Engine, "parameters", 1),
    "close": (Engine, "close", 1),
    # of replicas that differ
    "after_update": (GossipExchange, "after_update", 3),
    "open": (Rounds, "open", 3),
    "merge": (Mixer, "merge", 3),
    "finish": (Rounds, "_finish", 3),
    "divide": (gossip, "parts_that_hide", 1),
    "settle": (GossipExchange, "settle", 2),
    "average": (GossipExchange, "average", 2),
    "compare": (EliteExchange, "at_rest", 1),
    "shown": (Replicas, "shown", 2),
    "become": (Replicas, "become", 1),
    "adopt": (Replicas, "adopt", 1),
    "collect": (StateCopy, "take", 1),
}
assert all(hasattr(holder, name) for holder, name, _ in PHASES.values()), "a phase is named after nothing that exists"
ticking.SECOND = float(os.environ.get("SECOND", "1"))
steps = 0
original_prepare = Engine.prepare


def fail_in(phase: str, how: str) -> None:
    holder, name, turn = PHASES[phase]
    original = getattr(holder, name)
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == turn or (how == "slow" and calls <= 6):
            os.write(2, f"FAILED AT {time.time()}\n".encode())
            fail(phase, how)
        return original(*args, **kwargs)

    setattr(holder, name, failing)


def fail(phase: str, how: str) -> None:
    if how == "slow":
        time.sleep(8 * ticking.SECOND)
        return
    if how == "raise":
        raise RuntimeError(f"made to fail in {phase}")
    if how == "exit":
        sys.exit(3)
    if how == "interrupt":
        raise KeyboardInterrupt
    while how == "spin":
        pass
    while how == "sleep":
        time.sleep(1)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        return
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)


def prepare(self: Engine, *args: Any, **kwargs: Any) -> Work:
    global steps
    steps += 1
    if phase == "none":
        time.sleep(0.05)
    return original_prepare(self, *args, **kwargs)


Engine.prepare = prepare  # type: ignore[method-assign]
phase, _, how = sys.argv[1].partition(":")
rank = int(sys.argv[2])
if phase == "none":
    os.write(2, f"PID {os.getpid()}\n".encode())
elif rank == MPI.COMM_WORLD.rank:
    fail_in(phase, how or "raise")
code = main(["train", *sys.argv[3:]])
os.write(2, f"STEPS {steps}\n".encode())
sys.exit(code)
