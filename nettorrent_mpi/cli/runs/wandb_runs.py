"""The metrics of a run as an offline run of Weights & Biases, which `wandb sync` uploads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import wandb

from nettorrent_mpi.cli.runs.run_data import RunData
from nettorrent_mpi.cli.runs.tagged_figures import beginning, tagged

NAME = "wandb"


def write_events(run: RunData, folder: Path) -> Path:
    """Write an offline run into `folder`/wandb, and return its folder. The same run has the same id each time, so that
    a later upload takes the place of an earlier one. Raises OSErrors."""
    folder.mkdir(parents=True, exist_ok=True)
    path, zero = run.path.resolve(), beginning(run)
    quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    made = wandb.init(
        mode="offline", dir=str(folder), project="nettorrent", name=path.name, settings=quiet, save_code=False,
        id=hashlib.sha256(str(path).encode()).hexdigest()[:12], config=dict(run.settings),
    )  # fmt: skip
    for point in run.points:
        when = zero + point.figures.get("time", 0.0)
        made.log({**dict(tagged(run, point)), "_timestamp": when}, step=point.step)
    made.finish()
    return folder / NAME
