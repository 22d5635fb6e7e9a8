"""Each rank counts the seconds that it spends on compute, on communication and on waiting, between two reports.

    compute         loading, passes, gradients in parts, update (L, F, B, I, W, M, U), without what they wait
    communication   all the rest of a step without what it waits: packing, sending, merging, copying
    waiting         in calls that return when others have sent, received or come, wherever these stand: inside layers,
                    too. A message's own travel is part of it; only a trace (`speedup/shares.py`) can tell them apart

A rank for which the others wait is the one that waits least. On a GPU the host does not know these times: it goes on
while a recorded run computes, reduces and waits by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nettorrent_mpi.plan.actions import PASSES
from nettorrent_mpi.plan.topology import Topology

PARTS = ("compute", "communication", "waiting")
COMPUTE, WAITING = PARTS.index("compute"), PARTS.index("waiting")
COMPUTING = frozenset({"L", *PASSES, "M", "U"})  # kinds of actions
MOST_RANKS = 256  # that are told one by one


class Spent:
    """A Spent has the time of one rank since it was last taken, in nanoseconds."""

    def __init__(self) -> None:
        self._whole = self._compute = self._waiting = 0

    def add(self, whole: int, compute: int, waiting: int) -> None:
        """Add the nanoseconds of a step, and those of compute and of waiting among them."""
        self._whole += whole
        self._compute += compute
        self._waiting += waiting

    def take(self) -> list[float]:
        """Return the seconds, in the order of PARTS, and begin anew."""
        parts = self._compute, self._whole - self._compute - self._waiting, self._waiting
        self._whole = self._compute = self._waiting = 0
        return [each / 1e9 for each in parts]


def line(seconds: np.ndarray, topology: Topology) -> dict[str, Any] | None:
    """Return what metrics.jsonl tells of the seconds, an array (ranks, PARTS); None if nothing is known.

    `slowest` is the rank with most seconds of compute and communication. Up to MOST_RANKS ranks each of PARTS has a
    list of all ranks' seconds; of more there is a list `swarms`, in which each of PARTS has min, mean and max.
    """
    if not seconds.any():
        return None
    told: dict[str, Any] = {"slowest": int(seconds[:, :WAITING].sum(axis=1).argmax())}
    if len(seconds) <= MOST_RANKS:
        return told | {name: [_rounded(each) for each in seconds[:, part]] for part, name in enumerate(PARTS)}
    swarms = []
    for stage in range(len(topology.stages)):
        own = seconds[topology.swarm(stage)]
        low, mean, high = own.min(axis=0), own.mean(axis=0), own.max(axis=0)
        swarms.append({name: [_rounded(each[part]) for each in (low, mean, high)] for part, name in enumerate(PARTS)})
    return told | {"swarms": swarms}


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
