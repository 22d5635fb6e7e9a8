"""The figures of a comparison, computed from results.json: medians, spreads, speedups, and losses of efficiency."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean, median
from typing import Any

from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.speedup.modes import GPU, SERIAL
from nettorrent_mpi.speedup.shares import PARTS
from nettorrent_mpi.speedup.sides import OURS, names

Results = Mapping[str, Any]
WIDE = 0.15  # a spread above it is warned of: differences between modes are often smaller
UNITS = {"cpu": "core", "gpu": "GPU"}
MANY = 8  # ranks of a side whose shares are shown one by one


@dataclass(frozen=True)
class Figure:
    """The figures of a side. `speedup` is relative to one rank of ours; `efficiency` is that divided by the number of
    cores, or of GPUs. `of_gpu` and `of_torch` are relative to one GPU, and to PyTorch's best on it, where there is such
    a baseline."""

    side: Mapping[str, Any]
    median: float  # samples per second
    spread: float  # (largest - smallest) / median
    speedup: float
    efficiency: float
    of_gpu: float | None = None
    of_torch: float | None = None

    @property
    def device(self) -> str:
        return str(self.side["device"])

    @property
    def mode(self) -> str:
        return str(self.side["mode"])

    @property
    def modes(self) -> tuple[str, ...]:
        """All modes that this side stands for."""
        return (self.mode, *self.side["also"])

    @property
    def name(self) -> str:
        """Its modes for a text in Markdown."""
        return names(self.side, "`")

    @property
    def turns(self) -> int:
        return len(self.side["samples_per_second"])

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
    base, gpu, torch = median(serial), None, None
    if results["baseline"] == "gpu":
        speeds = {side["name"]: median(side["samples_per_second"]) for side in _on_gpu(results)}
        gpu = next((speeds[side["name"]] for side in _on_gpu(results) if side["mode"] in (SERIAL, GPU)), None)
        torch = max((speeds[side["name"]] for side in _on_gpu(results) if side["kind"] != OURS), default=None)
    found = []
    for side in results["sides"]:
        told = side["samples_per_second"]
        if told:
            middle = median(told)
            speedup = middle / base
            more = (middle / gpu if gpu else None, middle / torch if torch else None)
            spread = (max(told) - min(told)) / middle
            found.append(Figure(side, middle, spread, speedup, speedup / side["cpus"], *more))
    return found


def _on_gpu(results: Results) -> list[Mapping[str, Any]]:
    """Return the measured sides on GPUs."""
    return [side for side in results["sides"] if side["device"] == "gpu" and side["samples_per_second"]]


def modes_device(results: Results) -> str:
    """Return what the modes compute on, and the one rank that they are compared with: cpu or gpu."""
    return next((str(side["device"]) for side in results["sides"] if side["mode"] == SERIAL), "cpu")


def limit(results: Results, device: str) -> int:
    """Return the number of this machine's cores, or of its GPUs."""
    return len(results["host"]["gpus"]) if device == "gpu" else int(results["host"]["cores"])


def ranked(found: list[Figure], cpus: int, *, ours: bool, device: str) -> list[Figure]:
    """Return all sides of ours, or of PyTorch's, on this number of cores or GPUs, the fastest first."""
    there = (f for f in found if f.cpus == cpus and f.ours == ours and f.device == device)
    return sorted(there, key=lambda f: -f.median)


def best(found: list[Figure], cpus: int, *, ours: bool, device: str = "cpu") -> list[Figure]:
    """Return the first of `ranked`, and those that cannot be distinguished from it: their largest figure is not below
    its smallest. Empty if nothing was measured."""
    there = ranked(found, cpus, ours=ours, device=device)
    return [f for f in there if max(f.side["samples_per_second"]) >= min(there[0].side["samples_per_second"])]


def losses(results: Results, name: str) -> tuple[Figure, dict[str, float]] | None:
    """Return (figure, losses of efficiency) of the traced run of the side `name`.

    ranks x time = time of one rank + losses. Each loss is a part of ranks x time: the time of the side's ranks on each
    of PARTS beyond that of one rank. So efficiency + all losses = 1; a negative loss is a gain, as from parts that fit
    into caches. None without the traces of the side and of one rank, and for one rank itself.
    """
    traces = {trace["side"]: trace["shares"] for trace in results["traces"]}
    found = {figure.side["name"]: figure for figure in figures(results)}
    alone = next((name for name, figure in found.items() if figure.mode == SERIAL), None)
    if alone not in traces or name == alone or name not in traces or name not in found:
        return None
    figure = found[name]
    told = {
        part: mean(share[part] for share in traces[name]) - figure.efficiency * traces[alone][0][part] for part in PARTS
    }
    return figure, told


def shown_shares(trace: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """Return (whose, shares) of a traced run, as tables and pictures show them: of every rank, or of many ranks the
    mean, the one that computed most, and the one that computed least."""
    told: list[dict[str, float]] = trace["shares"]
    if len(told) <= MANY:
        return [(f"rank {rank}", share) for rank, share in enumerate(told)]
    order = sorted(range(len(told)), key=lambda rank: told[rank]["compute"])
    whole = {part: mean(share[part] for share in told) for part in PARTS}
    most, least = order[-1], order[0]
    return [
        (f"mean of {len(told)} ranks", whole),
        (f"rank {most}, which computed most", told[most]),
        (f"rank {least}, which computed least", told[least]),
    ]
