"""Where a run goes on from, and whether it may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nettorrent_mpi.cli.run_folder import RunFolder
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.config.writing import to_plain
from nettorrent_mpi.engine.checkpoint import latest
from nettorrent_mpi.plan.errors import ConfigError, OutputError


def find_checkpoint(folder: RunFolder, given: str) -> Path:
    """The checkpoint to go on from: the file `given`, or the newest in that run folder, or ("") in the output folder.

    Raises OutputError where there is none.
    """
    path = Path(given) if given else folder.path
    if path.is_file():
        return path
    found = latest(path / "checkpoints") or latest(path)
    if found is None:
        raise OutputError(f"{path} holds no checkpoint to resume from; start the run without --resume")
    return found


# Whatever decides what a step computes: a run can only go on with the same.
DECISIVE = ("seed", "dtype", "data", "model", "train.batch_size", "train.optimizer")


def must_match(before: Config, now: Config, path: Path) -> None:
    """ConfigError where a decisive value is another one than in the checkpoint's configuration."""
    for key in DECISIVE:
        values = []
        for config in (before, now):
            value: Any = to_plain(config)
            for part in key.split("."):
                value = value[part]
            values.append({k: v for k, v in value.items() if k != "root"} if key == "data" else value)
        if values[0] != values[1]:
            raise ConfigError(
                f"{json.dumps(values[1])[:80]} is not what the checkpoint {path} was made with "
                f"({json.dumps(values[0])[:80]}); resume with the same, or start anew without --resume",
                key=key,
            )
