"""The figures of a comparison, computed from results.json: medians, spreads, speedups, and losses of efficiency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from nettorrent_mpi.speedup.modes import SERIAL
from nettorrent_mpi.speedup.shares import PARTS
from nettorrent_mpi.speedup.sides import OURS

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """The figures of a side. `speedup` is relative to one rank of ours; `efficiency` is that divided by the number of
    cores."""

    side: Mapping[str, Any]
    median: float  # samples per second
    spread: float  # (largest - smallest) / median
    speedup: float
    efficiency: float

    @property
    def mode(self) -> str:
        return str(self.side["mode"])

    @property
    def cpus(self) -> int:
        return int(self.side["cpus"])

    @property
    def ours(self) -> bool:
        return bool(self.side["kind"] == OURS)


def figures(results: Results) -> list[Figure]:
    """Return the figures of every measured side, in the order of the turns; none before one rank was measured."""
    serial: list[float] = next((s["samples_per_second"] for s in results["sides"] if s["mode"] == SERIAL), [])
    if not serial:
        return []
    base = median(serial)
    found = []
    for side in results["sides"]:
        told = side["samples_per_second"]
        if told:
            middle = median(told)
            speedup = middle / base
            found.append(Figure(side, middle, (max(told) - min(told)) / middle, speedup, speedup / side["cpus"]))
    return found


def ranked(found: list[Figure], cpus: int, *, ours: bool) -> list[Figure]:
    """Return all sides of ours, or of PyTorch's, on this number of cores, the fastest first."""
    return sorted((f for f in found if f.cpus == cpus and f.ours == ours), key=lambda f: -f.median)


def best(found: list[Figure], cpus: int, *, ours: bool) -> list[Figure]:
    """Return the first of `ranked`, and those that cannot be distinguished from it: their largest figure is not below
    its smallest. Empty if nothing was measured."""
    there = ranked(found, cpus, ours=ours)
    return [f for f in there if max(f.side["samples_per_second"]) >= min(there[0].side["samples_per_second"])]


def losses(results: Results, mode: str) -> tuple[Figure, dict[str, float]] | None:
    """Return (figure, losses of efficiency) of the traced run of `mode`.

    ranks x time = time of one rank + losses. Each loss is a part of ranks x time: the time of the mode's ranks on each
    of PARTS beyond that of one rank. So efficiency + all losses = 1; a negative loss is a gain, as from parts that fit
    into caches. None without the traces of the mode and of one rank.
    """
    traces = {(trace["mode"], trace["ranks"]): trace["shares"] for trace in results["traces"]}
    found = {(f.mode, f.cpus): f for f in figures(results)}
    ranks = next((r for m, r in traces if m == mode), None)
    if ranks is None or (SERIAL, 1) not in traces or (mode, ranks) not in found:
        return None
    figure = found[mode, ranks]
    told = {
        part: mean(share[part] for share in traces[mode, ranks]) - figure.efficiency * traces[SERIAL, 1][0][part]
        for part in PARTS
    }
    return figure, told
