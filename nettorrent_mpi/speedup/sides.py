"""The sides of a comparison: this package's modes on each number of ranks, and PyTorch on as many cores or one GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

# isort: split
from nettorrent_mpi.cores import cores_of_node
from nettorrent_mpi.engine.run_plan import DeviceKind
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.speedup.machine import nodes_of_job
from nettorrent_mpi.speedup.modes import GPU, SERIAL, Candidate

OURS = "ours"
TORCH, CHANNELS_LAST, COMPILE, DDP = "torch", "torch_channels_last", "torch_compile", "ddp"
PEERS = {
    TORCH: "PyTorch",
    CHANNELS_LAST: "PyTorch, channels_last",
    COMPILE: "PyTorch, torch.compile",
    DDP: "PyTorch, DistributedDataParallel (gloo)",
}
ON_GPU = (TORCH, CHANNELS_LAST, COMPILE)  # those that are compared on one GPU
OPTIONS = {TORCH: [], CHANNELS_LAST: ["--channels-last"], COMPILE: ["--compile"], DDP: []}  # options of torch_peer.py


@dataclass(frozen=True)
class Side:
    """A Side is one participant of the comparison. `cpus` is the number of its ranks, processes or threads; with
    `device` gpu each of them computes on a GPU."""

    name: str  # "rows-2"
    mode: str  # a key of modes.MODES, SERIAL, or one of PEERS
    kind: str  # OURS or TORCH
    cpus: int
    layout: str | None = None  # of our modes, in one line
    micro_batches: int | None = None
    also: tuple[str, ...] = ()  # other modes that do the same on this number of ranks
    impossible: str | None = None  # the reason why it is not measured
    device: DeviceKind = "cpu"

    @property
    def options(self) -> list[str]:
        """Return the options for torch_peer.py, except its threads."""
        if self.device == "gpu":
            return [*OPTIONS[self.mode], "--device", "cuda"]
        return [*OPTIONS[self.mode], *(["--processes", str(self.cpus)] if self.mode == DDP else [])]

    @property
    def threads(self) -> int:
        """The threads of each process."""
        return self.cpus if self.kind == TORCH and self.mode != DDP else 1

    def plain(self) -> dict[str, Any]:
        """Return the side's entry in results.json."""
        return asdict(self) | {"samples_per_second": []}


def ours(plans: Sequence[Candidate]) -> list[Side]:
    """Return a side for each candidate, possible or not."""
    return [
        Side(f"{p.mode}-{p.ranks}", p.mode, OURS, p.ranks, p.layout, p.micro_batches, p.also, p.impossible, p.device)
        for p in plans
    ]


def torch_is_there() -> bool:
    """Whether PyTorch can be imported. It is not loaded here."""
    return importlib.util.find_spec("torch") is not None


def peers(names: Sequence[str], ranks: Sequence[int], setup: Setup) -> list[Side]:
    """Return PyTorch's sides on the same numbers of cores, with the reason if one could not do the same as `setup`."""
    found = []
    for name in names:
        for count in ranks:
            if name == DDP and count == 1:
                continue  # the same as plain PyTorch
            why = _unequal(name, count, setup)
            found.append(Side(f"{name}-{count}", name, TORCH, count, impossible=why))
    return found


def peers_on_gpu(names: Sequence[str], setup: Setup) -> list[Side]:
    """Return PyTorch's sides on one GPU. One of them is asked whether it finds a GPU at all."""
    why = None if not names or _torch_finds_gpu() else "this PyTorch finds no GPU: is it one for CPUs only?"
    return [
        Side(f"{name}-gpu", name, TORCH, 1, impossible=why or _unequal(name, 1, setup), device="gpu") for name in names
    ]


def _torch_finds_gpu() -> bool:
    probe = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _unequal(name: str, count: int, setup: Setup) -> str | None:
    if name == CHANNELS_LAST and len(setup.dataset.shape) != 3:
        return "the rows are not images"
    if name == DDP and setup.network.has_batch_norm:
        return "batch norm would see each process's own rows: PyTorch's SyncBatchNorm needs GPUs"
    if name == DDP and count > setup.config.train.batch_size:
        return f"{count} processes for {setup.config.train.batch_size} rows: some would stay idle"
    if nodes_of_job(os.environ) > 1 and count > cores_of_node(os.environ):
        return f"{count} {'processes' if name == DDP else 'threads'} do not fit on one node, where PyTorch is started"
    return None


def names(side: Mapping[str, Any], quote: str = "") -> str:
    """Return the modes of a side: "rows = auto" where both are the same."""
    return " = ".join(f"{quote}{mode}{quote}" for mode in (side["mode"], *side["also"]))


def in_words(side: Mapping[str, Any]) -> str:
    """Describe a side: "rows, 2 ranks"."""
    if side["mode"] in (SERIAL, GPU):
        return "one GPU" if side["device"] == "gpu" else "one rank"
    if side["device"] == "gpu" and side["kind"] != OURS:
        return f"{names(side)}, one GPU"
    unit = "rank" if side["kind"] == OURS else "process" if side["mode"] == DDP else "thread"
    several = {"rank": "ranks", "process": "processes", "thread": "threads"}
    return f"{names(side)}, {side['cpus']} {several[unit] if side['cpus'] > 1 else unit}"
