"""The command `nettorrent runs`: the runs below a folder in a table, or several runs side by side."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nettorrent_mpi.cli.progress import clock
from nettorrent_mpi.cli.runs.comparing import Setting, as_written, differ, settings_given
from nettorrent_mpi.cli.runs.run_data import RunData, read_run
from nettorrent_mpi.cli.runs.values import one_line
from nettorrent_mpi.cli.tables import aligned, shortened
from nettorrent_mpi.engine.run_files import is_run, no_run, run_of
from nettorrent_mpi.plan.errors import warn

DEPTH = 4  # folders below the named one that are looked into
BEST_FIRST = ("accuracy", "samples_per_second", "epochs")  # sorted from the largest on


def runs(places: Sequence[str], *, sort: str, as_json: bool) -> int:
    """Show the runs in and below `places`; named runs, two or more and nothing else, side by side. Raises
    DataError where there is none."""
    folders = [Path(place) for place in places or ["runs"]]
    alone = [folder for folder in folders if run_of(folder) is None]
    found = [read_run(run) for folder in folders for run in _below(folder)]
    if not found:
        raise no_run(folders[0])
    for run in found:
        for line in run.damage:
            warn(line, alone=True)
    rows = [(run, _row(run)) for run in found]
    backwards = sort in BEST_FIRST
    known = [pair for pair in rows if pair[1][sort] is not None]
    known.sort(key=lambda pair: pair[1][sort], reverse=backwards)
    rows = known + [pair for pair in rows if pair[1][sort] is None]
    if as_json:
        sys.stdout.write(json.dumps([row | {"settings": dict(run.settings)} for run, row in rows], indent=2) + "\n")
    elif len(rows) > 1 and not alone:
        sys.stdout.write(_side_by_side([run for run, _ in rows]))
    else:
        sys.stdout.write(_table([row for _, row in rows]))
    return 0


def _below(folder: Path) -> Iterator[Path]:
    """Yield the folders of runs in and below a folder, in the order of their names."""
    run = run_of(folder)
    if run is not None:
        yield run
        return
    if not folder.is_dir():
        raise no_run(folder)
    for here, names, _ in os.walk(folder):
        path = Path(here)
        names.sort()
        inner = [name for name in names if not name.startswith(".")]
        yield from (path / name for name in inner if is_run(path / name))
        deep = len(path.relative_to(folder).parts) + 1 >= DEPTH
        names[:] = [] if deep else [name for name in inner if not is_run(path / name)]


def _row(run: RunData) -> dict[str, Any]:
    """Return what the table and --json show of a run: numbers are unrounded, unknown ones None."""
    best, latest = run.best, next((point for point in reversed(run.points) if "train_loss" in point.figures), None)
    shown = latest if best is None else best.point
    figures = {} if shown is None else shown.figures
    return {
        "run": one_line(str(run.path)),
        "state": run.state,
        "layout": run.layout,
        "grid": _grid(run),
        "ranks": run.ranks,
        "exchange": run.exchange,
        "epochs": run.last("epoch"),
        "at_epoch": figures.get("epoch"),
        "accuracy": best and best.accuracy,
        "accuracy_on": best and best.kind,
        "loss": figures.get("train_loss"),
        "seconds": run.last("time"),
        "samples_per_second": run.last("samples_per_second"),
    }


def _grid(run: RunData) -> str:
    """Write a layout in a few characters: 2 x (3x1 1x2)."""
    topology = run.topology
    if topology is None:
        return ""
    grids = " ".join(f"{stage.rows}x{stage.cols}" for stage in topology.stages)
    grids = grids if len(grids) <= 24 else f"{len(topology.stages)} stages"
    return f"{topology.replicas} x ({grids})" if topology.replicas > 1 else grids


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "run": lambda row: str(row["run"]),
    "state": lambda row: str(row["state"]),
    "layout": lambda row: str(row["grid"]),
    "ranks": lambda row: "" if row["ranks"] is None else str(row["ranks"]),
    "exchange": lambda row: str(row["exchange"]),
    "epochs": lambda row: "" if row["epochs"] is None else f"{row['epochs']:.4g}",
    "at epoch": lambda row: "" if row["at_epoch"] is None else f"{row['at_epoch']:.4g}",
    "accuracy": lambda row: _percent(row["accuracy"]),
    "loss": lambda row: "" if row["loss"] is None else f"{row['loss']:.4f}",
    "time": lambda row: "" if row["seconds"] is None else clock(row["seconds"]),
    "samples/s": lambda row: "" if row["samples_per_second"] is None else f"{row['samples_per_second']:,.0f}",
}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [[show(row) for show in _COLUMNS.values()] for row in rows]
    return aligned(tuple(_COLUMNS), cells, ("run", "state", "layout", "exchange")) + "\n"


def _side_by_side(found: Sequence[RunData]) -> str:
    """Write results, and the settings in which the runs differ, one run in each column."""
    rows = [_row(run) for run in found]
    settings = [settings_given(run.config, str(run.path)) or as_written(run.settings) for run in found]
    lines = [[name, *(show(row) for row in rows)] for name, show in _COLUMNS.items() if name != "run"]
    keys = list(dict.fromkeys(key for each in settings for key in each if key != "output"))
    differing = [key for key in keys if differ([each.get(key) for each in settings])]
    cells = [[each.get(key, Setting("-")).text for each in settings] for key in differing]
    lines += [[key, *map(shortened, row)] for key, row in zip(differing, cells, strict=True)]
    header = ["", *(shortened(run.name) for run in found)]
    told = aligned(header, lines, header) + "\n"
    same = len(keys) - len(differing)
    return told + (f"{same} other settings are the same\n" if differing else "all settings are the same\n")
