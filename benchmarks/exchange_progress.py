"""Progress of gossip's messages while a step computes: by the rank itself between actions, or by a thread.

    mpirun ... python -m benchmarks.exchange_progress WHO CONFIG [--set ...]

trains like `python -m nettorrent_mpi.train CONFIG ...`, with WHO (see PROGRESS) instead of the built-in progress. MPI
moves large messages only inside its calls, so someone has to call it.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from functools import partial
from statistics import median
from typing import Any

from benchmarks.exchange_network import ROWS, WIDE, WIDE_LAYERS, settings_of
from benchmarks.exchange_runs import Hosts, in_turns, train
from benchmarks.exchange_text import paragraph, percent, table
from nettorrent_mpi import env
from nettorrent_mpi.__main__ import main as train_command
from nettorrent_mpi.engine.usage import WARM_UP

PROGRESS = {
    "between": "between actions and layers (built in)",
    "boundary": "at the end of a step only",
    "thread": "by a thread",
    "between-crowded": "between actions and layers, ranks on one core",
    "thread-crowded": "by a thread on the other core, ranks on one core",
}
HOSTS = 2
PART = 1 / 16  # of 2.9 million weights: at 200 Mbit/s a message travels for most of a step
PAUSE = 0.0005  # seconds between the thread's calls: without, it takes the interpreter from the rank
STEPS = 200


def main() -> int:
    """Run one rank of a training."""
    who, arguments = sys.argv[1], sys.argv[2:]
    env.prepare()  # before NumPy and MPI are loaded
    from nettorrent_mpi.exchange.gossip import GossipExchange

    if who.endswith("-crowded"):
        os.sched_setaffinity(0, {0})
    if not who.startswith("between"):
        GossipExchange._progress = lambda self: None  # type: ignore[method-assign]
    if who.startswith("thread"):
        _start_thread(1 if who.endswith("-crowded") else None)
    return train_command(["train", *arguments])


def _start_thread(core: int | None) -> None:
    """Start a thread that calls MPI until the process ends."""
    from mpi4py import MPI

    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        raise SystemExit("this MPI lets only one thread call it")
    nobodys = MPI.COMM_WORLD.Dup()
    over = threading.Event()

    def call() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread
        while not over.wait(PAUSE):
            nobodys.Iprobe()

    def end() -> None:
        over.set()
        thread.join()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    atexit.register(end)  # before MPI is finalized


def measure(rate: str, repeats: int, factor: float, mpirun: str) -> dict[str, Any]:
    """Measure the step rates with each of PROGRESS, in turns."""
    steps = max(5, round(STEPS * factor))
    settings = settings_of("gossip", HOSTS, WIDE_LAYERS, steps + WARM_UP) | {"exchange.gossip.part": str(PART)}
    told: dict[str, list[dict[str, Any]]] = {who: [] for who in PROGRESS}

    def once(who: str) -> float:
        done = train(WIDE, settings, HOSTS, Hosts(mpirun, rate), ("benchmarks.exchange_progress", who))
        told[who].append(done.summary["exchange"])
        return float(done.summary["samples_per_second"]) / (ROWS * HOSTS)

    figures = in_turns({who: partial(once, who) for who in PROGRESS}, repeats, "steps/s")
    for who, runs in told.items():
        for key in ("merged", "late", "waited_seconds"):
            figures[who][key] = median(run[key] for run in runs)
    return {"rate": rate, "hosts": HOSTS, "part": PART, "steps": steps, "repeats": repeats, "sides": figures}


def to_markdown(section: dict[str, Any]) -> list[str]:
    text = (
        f"Who calls MPI while a step computes, so that messages move: {section['hosts']} hosts of one rank each, links "
        f"of {section['rate']}, the same network, a part of 1/{round(1 / section['part'])} in each of "
        f"{section['steps']} rounds. This machine's two cores compute for one rank each, or, in the last two rows, one "
        f"for both ranks. Medians of {section['repeats']} alternating runs."
    )
    cells = []
    for who, side in section["sides"].items():
        in_time = side["merged"] / max(side["merged"] + side["late"], 1)
        waited = 1000 * side["waited_seconds"] / section["steps"]
        cells.append(
            [PROGRESS[who], f"{side['median']:,.2f}", f"{side['spread']:.0%}", percent(in_time), f"{waited:.1f}"]
        )
    head = ["messages move", "steps/s", "spread", "merged in time", "waited, ms a step"]
    return [*paragraph(text), "", *table(head, cells)]


if __name__ == "__main__":
    sys.exit(main())
