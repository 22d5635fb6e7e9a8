"""Bars show where each rank's time went, and which rank the others wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nettorrent_mpi.cli.runs.run_data import RankSeconds, RunData
from nettorrent_mpi.engine.rank_seconds import PARTS, WAITING

MOST_RANKS = 64  # that are shown one by one
ALIKE = 0.1  # of a rank's time: it is not much busier than the others


def rows_of(run: RunData, seconds: RankSeconds, most: int = MOST_RANKS) -> list[tuple[str, np.ndarray, int | None]]:
    """Return (name, seconds of PARTS, rank) of every row to be shown: each rank or, of more than `most`, the mean of
    each swarm, and the slowest rank where its seconds are known."""
    if seconds.each is not None and len(seconds.each) <= most:
        return [(_name(run, rank), own, rank) for rank, own in enumerate(seconds.each)]
    if seconds.swarms is not None:
        return [(f"{_stage(run, n)}, mean", swarm[:, 1], None) for n, swarm in enumerate(seconds.swarms)]
    assert seconds.each is not None
    topology, each = run.topology, seconds.each
    if topology is None or topology.size != len(each):
        swarms = [("all ranks", each)]
    else:
        swarms = [(_stage(run, n), each[topology.swarm(n)]) for n in range(len(topology.stages))]
    found: list[tuple[str, np.ndarray, int | None]] = [
        (f"{name}, mean", own.mean(axis=0), None) for name, own in swarms
    ]
    return [*found, (_name(run, seconds.slowest), each[seconds.slowest], seconds.slowest)]


def verdict(run: RunData, seconds: RankSeconds) -> str:
    """Name the slowest rank in a sentence, and say how busy it is beside the others."""
    told = f"Slowest: {run.place(seconds.slowest)}"
    if seconds.each is None:
        return f"{told}."
    busy, whole = seconds.each[:, :WAITING].sum(axis=1), seconds.each.sum(axis=1)
    share = np.divide(busy, whole, out=np.zeros_like(busy), where=whole > 0)
    if len(busy) == 1:
        return f"{told}, the only one."
    others = np.delete(share, seconds.slowest).mean()
    mine = share[seconds.slowest]
    if mine - others < ALIKE:
        told = f"No rank stands out; s{told[1:]}"
    return f"{told}: busy for {100 * mine:.0f} % of its time, the others for {100 * others:.0f} % on average."


def share(parts: Sequence[float]) -> str:
    """Write seconds of PARTS as percentages."""
    whole = sum(parts) or 1.0
    return ", ".join(f"{name} {100 * part / whole:.0f} %" for name, part in zip(PARTS, parts, strict=True))


def _name(run: RunData, rank: int) -> str:
    topology = run.topology
    stage = f", {_stage(run, topology.place(rank).stage)}" if topology is not None and rank < topology.size else ""
    return f"rank {rank}{stage}"


def _stage(run: RunData, number: int) -> str:
    name = run.stage_names[number] if run.topology is not None and number < len(run.stage_names) else f"stage {number}"
    return name if len(name) <= 24 else f"{name[:21]}..."
