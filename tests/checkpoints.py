"""Functions write, damage and read checkpoints, for tests of several kinds."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from nettorrent_mpi.engine import checkpoint
from nettorrent_mpi.engine.checkpoint_writer import CheckpointWriter
from nettorrent_mpi.engine.engine import Engine


def saved(engine: Engine, folder: Path, step: int) -> Path:
    """Write a checkpoint of an engine at rest, and wait for it. All ranks call."""
    writer = CheckpointWriter(engine, folder, keep=100)
    writer.begin(step, lambda: {"step": step, "samples": 0, "time": 0.0, "config": "{}"})
    writer.finish(needed=True)
    return folder / f"step-{step:010d}"


def restore(engine: Engine, folder: Path) -> None:
    """Load a checkpoint into an engine. All ranks call."""
    checkpoint.restore(engine, *checkpoint.find_checkpoint(engine.world, folder), lambda attributes: None)


def whole(folder: Path) -> dict[str, np.ndarray]:
    """Everything in a checkpoint, as any program reads it."""
    found: dict[str, np.ndarray] = {}

    def visit(key: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found[key] = item[...]

    with h5py.File(folder / "index.h5") as file:
        file.visititems(visit)
    return found
