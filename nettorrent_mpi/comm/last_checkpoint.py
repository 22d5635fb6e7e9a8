"""The ranks that answer make the last checkpoint of a run that stands still, before they end, without MPI.

the rank that speaks    sees from all signs whether the state is whole, and orders to save it
each rank that answers  writes its blocks, and tells so in its signs
the rank that speaks    completes the checkpoint, if nobody has gone on meanwhile
"""

from __future__ import annotations

import time

from nettorrent_mpi.comm import ticking
from nettorrent_mpi.comm.watch import HEARING, Emergency, Watch

LIMIT = 120.0  # seconds that ranks have to write
LOOK = 0.1  # seconds between looks whether they have


def last_checkpoint(watch: Watch, emergency: Emergency | None) -> str:
    """Let the ranks that answer make a checkpoint. Returns the next part of a sentence: whether they have, or why not;
    "" if there is nothing to be saved that no checkpoint has."""
    if emergency is None:
        return ""
    wholes = {rank: sign.whole for rank, sign in watch.signs.items() if sign.reports}
    problem = emergency.obstacle(wholes)
    step = wholes[watch.rank]
    if problem is None and step is not None:
        problem = _made(watch, emergency, step, sorted(wholes))
        if problem is None:
            return f"; a checkpoint of step {step}, the last whole one, is made"
    return f"; no checkpoint can be made now: {problem}" if problem else ""


def _made(watch: Watch, emergency: Emergency, step: int, ranks: list[int]) -> str | None:
    """Let these ranks make the checkpoint of this step; return what has gone wrong, if anything."""
    silent = [rank for rank in watch.signs if rank not in ranks]
    watch.save(step, silent)
    until = time.monotonic() + LIMIT
    while any(watch.signs[rank].answer is None for rank in ranks):
        if time.monotonic() >= until:
            late = next(rank for rank in ranks if watch.signs[rank].answer is None)
            return f"rank {late} has not written its part within {LIMIT:.0f} s"
        time.sleep(LOOK)
    for rank in ranks:
        if watch.signs[rank].answer:
            return f"on rank {rank}, {watch.signs[rank].answer}"
    time.sleep((HEARING + 1) * ticking.SECOND)  # whoever has gone on has said so
    for rank, sign in watch.signs.items():
        if sign.whole != step if rank in ranks else sign.reports:
            return f"rank {rank} has gone on while it was written"
    try:
        emergency.complete(step, ranks)
    except Exception as error:  # of any kind: it is told where the run ends
        return str(error) or type(error).__name__
    return None
