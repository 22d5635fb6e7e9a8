"""Checkpoints in a folder: writing the next one, finding the one to resume from, and checking that it may be
resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.config.writing import to_plain
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.checkpoint import file_name, latest
from nettorrent_mpi.engine.model_file import Attribute, write_arrays
from nettorrent_mpi.engine.run_files import written
from nettorrent_mpi.plan.errors import ConfigError, OutputError

KEPT = 2  # checkpoints: the newest, and the one before in case the newest cannot be read


def write_checkpoint(
    folder: Path, groups: Mapping[str, Mapping[str, Array]], attributes: Mapping[str, Attribute]
) -> None:
    """Write step-N.h5 and remove all but the newest checkpoints. Raises OutputError."""
    path = folder / file_name(int(attributes["step"]))
    with written(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_arrays(path, groups, attributes)
        for old in sorted(folder.glob("step-*.h5"))[:-KEPT]:
            old.unlink()


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`: that file itself, or the newest one in a run folder or a folder of checkpoints.

    Raises OutputError if there is none.
    """
    if path.is_file():
        return path
    found = latest(path / "checkpoints") or latest(path)
    if found is None:
        raise OutputError(f"{path} holds no checkpoint to resume from; start the run without --resume")
    return found


# The values that decide what a step computes: a resumed run must have the same.
DECISIVE = ("seed", "dtype", "data", "model", "train.batch_size", "train.optimizer")


def must_match(before: dict[str, Any], config: Config, path: Path) -> None:
    """Raise ConfigError if a decisive value differs from the one in the checkpoint's configuration `before`."""
    now = to_plain(config)
    for key in DECISIVE:
        values = []
        for config_of in (before, now):
            value: Any = config_of
            for part in key.split("."):
                value = value[part]
            values.append({k: v for k, v in value.items() if k != "root"} if key == "data" else value)
        if values[0] != values[1]:
            raise ConfigError(
                f"{json.dumps(values[1])[:80]} is not what the checkpoint {path} was made with "
                f"({json.dumps(values[0])[:80]}); resume with the same, or start anew without --resume",
                key=key,
            )
