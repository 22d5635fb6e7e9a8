"""The memory that a dry run predicts is what the run then takes: of synthetic data, in real runs."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

Mpirun = Callable[..., "subprocess.CompletedProcess[str]"]

ROWS = "{name: synthetic, rows: 60000, test_rows: 5000, shape: [28, 28, 1]}"  # 51 MB
IMAGES = "{name: synthetic, rows: 8000, test_rows: 100, shape: [32, 32, 3]}"  # 25 MB
WIDE = "[flatten, {linear: {units: 1500, activation: relu}}, {linear: {units: 1500, activation: relu}}, {linear: 10}]"
COMPRESSED = "{name: hdf5, root: FILE}"  # 50 MB
CONVOLUTIONS = (
    "[{conv2d: {filters: 32, padding: same, activation: relu}}, {conv2d: {filters: 32, activation: relu}}, "
    "{max_pool2d: 2}, {conv2d: {filters: 32, activation: relu}}, flatten, {linear: 10}]"
)
# data, layers, rows of a mini-batch, ranks, how they are used
CASES = {
    "parameters": (ROWS, WIDE, 128, 1, []),
    "rows": (ROWS, WIDE, 128, 2, ["layout={swarms: [{layers: 3, rows: 2}]}"]),
    "cols": (ROWS, WIDE, 128, 2, ["layout={swarms: [{layers: 3, cols: 2}]}"]),
    "stages": (IMAGES, CONVOLUTIONS, 512, 4, []),
    "compressed": (COMPRESSED, WIDE, 128, 2, ["layout={swarms: [{layers: 3, rows: 2}]}"]),
    "gossip": (ROWS, WIDE, 128, 2, ["layout={replicas: 2}", "exchange={gossip: {part: 1.0}}"]),
    "elite": (
        ROWS,
        WIDE,
        128,
        2,
        ["layout={replicas: 2}", "exchange={elite: 768}", "data.validation=0.01"],
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "rows" else pytest.mark.slow) for case in CASES]
)
def test_a_run_takes_what_was_predicted(mpirun: Mpirun, tmp_path: Path, case: str) -> None:
    data, layers, batch_size, ranks, more = CASES[case]
    if data == COMPRESSED:
        data = data.replace("FILE", str(tmp_path / "set.h5"))
        with h5py.File(tmp_path / "set.h5", "w") as file:
            x = np.random.default_rng(0).integers(0, 2, (64000, 784), np.uint8)
            file.create_dataset("x", data=x, chunks=(1000, 784), compression="lzf")
            file["y"] = np.arange(64000) % 10
    sets = [f"data={data}", f"model.layers={layers}", f"train.batch_size={batch_size}", "train.steps=12", *more]
    train = ["-m", "nettorrent_mpi.train", *(word for change in sets for word in ("--set", change))]
    done = mpirun(ranks, [*train, "--output", tmp_path / "run"], timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["memory_estimate_mb"] == pytest.approx(summary["peak_memory_mb"], rel=0.15)
    # A prediction of nothing but the libraries would not do.
    told = mpirun(ranks, [*train, "--dry-run"], timeout=120).stdout
    totals, libraries = columns(told, "total"), columns(told, "libraries")
    largest = totals.index(max(totals))
    assert totals[largest] == pytest.approx(summary["peak_memory_mb"], rel=0.15)
    own = summary["peak_memory_mb"] - libraries[largest]
    assert own > 40
    assert totals[largest] - libraries[largest] == pytest.approx(own, rel=0.15)


def columns(text: str, name: str) -> list[float]:
    """A column of the table of memory in a dry run's text: a number for each stage."""
    lines = text.split("\nMEMORY")[1].partition("\n\n")[0].splitlines()[1:]
    place = lines[0].split().index(name)
    stages = [line.split() for line in lines[1:] if re.match(r" *\d+  ", line)]
    return [float(stage[place].replace(",", "")) for stage in stages]
