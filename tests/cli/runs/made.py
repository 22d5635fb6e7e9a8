"""Run folders as a run leaves them, made without one: of any size, and with any damage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nettorrent_mpi.engine.rank_seconds import line
from nettorrent_mpi.plan.topology import Stage, Topology

TWO = Topology(1, (Stage(0, 1, 2, 1), Stage(1, 3, 1, 1)))


def about(topology: Topology, **more: Any) -> dict[str, Any]:
    """The content of run.json."""
    return {
        "arguments": ["train", "configs/digits.yaml", "--set", "train.epochs=2"],
        "folder": "/home/somebody",
        "began": "2026-01-01T00:00:00+00:00",
        "ranks": topology.size,
        "layout": topology.describe([f"linear{n + 1}" for n in range(topology.stages[-1].stop)]),
        "replicas": topology.replicas,
        "stages": [
            {"layers": [f"linear{n + 1}" for n in range(s.first, s.stop)], "rows": s.rows, "cols": s.cols}
            for s in topology.stages
        ],
        "hosts": [f"node{rank // 64}" for rank in range(topology.size)],
        "steps": 100,
        "steps_per_epoch": 50,
        "evaluate_every": 20,
        "exchange": "allreduce",
        "version": "0.1.0",
        "traced": True,
    } | more  # fmt: skip


def records(topology: Topology, count: int = 10, steps: int = 100, slowest: int = 1) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl in which one rank waits little and the others wait for it."""
    found = []
    for n in range(1, count + 1):
        step = steps * n // count
        seconds = np.tile([0.4, 0.1, 0.5], (topology.size, 1))
        seconds[slowest] = 0.8, 0.15, 0.05
        record: dict[str, Any] = {
            "step": step, "epoch": step / 50, "samples": 32 * step, "time": float(n), "train_loss": 2 / n,
            "learning_rate": 0.1 * (1 - n / count), "samples_per_second": 1000.0 + n,
        }  # fmt: skip
        if n % 2 == 0:
            record |= {"test_loss": 2.2 / n, "test_accuracy": 1 - 0.5 / n}
        found.append(record | {"ranks": line(seconds, topology)})
    return found


def make(
    folder: Path,
    topology: Topology = TWO,
    *,
    metrics: list[dict[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    ended: str | None = "done",
    **more: Any,
) -> Path:
    """Make the folder of a run. `settings` are config.yaml; without `ended` the run has not come to its end."""
    folder.mkdir(parents=True)
    told = about(topology, **more) | ({"ended": ended} if ended else {})
    (folder / "run.json").write_text(json.dumps(told))
    (folder / "config.yaml").write_text(json.dumps(settings or {"seed": 1, "train": {"batch_size": 32}}))
    lines = records(topology) if metrics is None else metrics
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    if ended in ("done", "diverged"):
        summary = {"world_size": topology.size, "steps": 100, "stopped_by": "epochs", "exchange": {"kind": "allreduce"}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def earlier(first: int, last: int, topology: Topology, **more: Any) -> dict[str, Any]:
    """Return an earlier part with these steps, as run.json has it."""
    told = about(topology, after=first - 1, until=last, seed=7, commit="c0ffee", environment={"OMP_NUM_THREADS": "2"})
    kept = {name: told[name] for name in told if name not in ("stages", "replicas", "traced")}
    return kept | {"config": '{"seed": 7, "train": {"epochs": 2}}'} | more


def trace(topology: Topology, steps: int = 5, scale: float = 1.0) -> str:
    """A trace.json in which every rank goes forward, backward, updates and gathers in each step."""
    events: list[dict[str, object]] = []
    for rank in range(topology.size):
        at = topology.place(rank)
        where = f"replica {at.replica}, stage {at.stage} (linear), row {at.row}, col {at.col}"
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}: {where}"}})
        for step in range(steps):
            for n, kind in enumerate(("F0", "B0", "R", "U", "G")):
                span = {"ph": "X", "pid": rank, "tid": 0, "name": f"{at.stage}{kind}", "args": {"step": step}}
                events.append(span | {"ts": scale * (1000 * step + 150 * n), "dur": scale * 140})
    return json.dumps({"traceEvents": events})
