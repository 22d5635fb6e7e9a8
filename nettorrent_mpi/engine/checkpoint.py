"""Checkpoints hold the whole training state in global coordinates, so that any layout and rank count can resume from
it.

Random numbers are functions of the step, so only the step number is saved for them. Replicas that differ are all saved,
besides their average, from which a run with another number of replicas starts. No message between replicas is in flight
when a checkpoint is made; the estimates of compressed messages restart from the average.

A file is one side of the operation that moves blocks between ranks (engine/resharding.py): to write it, rank 0 takes
every array whole; to read it, each rank takes its own boxes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.config.writing import to_plain
from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.model_file import (
    Attribute,
    check_shape,
    opened,
    read_attributes,
    read_box,
    verify,
    write_arrays,
)
from nettorrent_mpi.engine.rank_numbers import NUMBERS
from nettorrent_mpi.engine.resharding import REPLICAS, move
from nettorrent_mpi.engine.run_files import written
from nettorrent_mpi.engine.state import OPTIMIZER, PARAMETERS
from nettorrent_mpi.plan.errors import ConfigError, DataError, OutputError, warn
from nettorrent_mpi.plan.moves import Holding, whole

if TYPE_CHECKING:
    import h5py

Groups = dict[str, dict[str, Array]]
TRAINING = {"step", "samples", "time", "config"}  # attributes of a checkpoint that model.h5 lacks
# The values that decide what a step computes: a resumed run must have the same.
DECISIVE = ("seed", "dtype", "data", "model", "train.batch_size", "train.optimizer")


def collect(engine: Engine) -> Groups:
    """Return on rank 0 all arrays whole, as `model_file.write_arrays` takes them; elsewhere nothing. Collective over
    all ranks, at rest."""
    held, group = engine.blocks(), engine.wiring.everyone
    names: dict[str, str] = {}
    shapes: dict[str, Shape] = {}
    for each in group.gather_objects([(holding, array.dtype.str) for holding, array in held.items()]):
        for (name, box), dtype in each:
            names.setdefault(name, dtype)
            before = shapes.get(name, (0,) * len(box))
            shapes[name] = tuple(max(a, b.stop) for a, b in zip(before, box, strict=True))
    groups: Groups = {}
    wanted: dict[Holding, Array] = {}
    if group.index == 0:
        for name, dtype in names.items():
            folder, key = _folder(name)
            array = groups.setdefault(folder, {})[key] = np.empty(shapes[name], dtype)
            wanted[Holding(name, whole(array.shape))] = array
    move(group, held, wanted)
    return groups


def _folder(name: str) -> tuple[str, str]:
    """Split an array's name: "replicas/1/optimizer/m/linear1/weight" -> ("replicas/1/optimizer/m",
    "linear1/weight")."""
    parts = name.split("/")
    at = 2 if parts[0] == REPLICAS else 0
    at += 1 if parts[at] in (PARAMETERS, NUMBERS) else 2
    return "/".join(parts[:at]), "/".join(parts[at:])


def restore_parameters(engine: Engine, path: Path, accept: Callable[[Mapping[str, Attribute]], None]) -> None:
    """Load every rank's blocks of the parameters from model.h5 or a checkpoint. `accept` sees the file's attributes
    before anything changes. Raises DataError, or what `accept` raises, on all ranks."""
    engine.world.once(lambda: verify(path))
    with engine.world.agreement(), opened(path) as file:
        accept(read_attributes(file))
        _check_network(file, engine)
    shapes = engine.shapes()

    def read(wanted: Mapping[Holding, Array]) -> None:
        with engine.world.agreement():
            _read(path, shapes, "", wanted)

    engine.load(read)


def _check_network(file: h5py.File, engine: Engine) -> None:
    """Raise DataError unless the file holds all parameters of the engine's network, before anything changes."""
    for key, shape in engine.shapes().items():
        check_shape(file, f"{PARAMETERS}/{key}", shape)


def restore(engine: Engine, path: Path, accept: Callable[[Mapping[str, Attribute]], None]) -> dict[str, Attribute]:
    """Load the training state from a checkpoint made with any layout on any number of ranks; return its attributes.

    `accept` sees the attributes before anything changes. Raises DataError, or what `accept` raises, on all ranks.
    """
    with engine.world.agreement(), opened(path) as file:
        attributes = read_attributes(file)
        accept(attributes)
        _check_network(file, engine)
        for name in engine.optimizer.states:
            if f"{OPTIMIZER}/{name}" not in file:
                raise DataError(
                    f"holds no state {name!r} of the optimizer; resume with the optimizer it was made with",
                    file=str(path),
                )
        replicas = len(file[REPLICAS]) if REPLICAS in file else 1

    shapes = engine.shapes()

    def read(prefix: str, wanted: Mapping[Holding, Array]) -> None:
        with engine.world.agreement():
            _read(path, shapes, prefix, wanted)

    engine.restore(read, int(attributes["step"]), replicas)
    return attributes


def _read(path: Path, shapes: Mapping[str, Shape], prefix: str, wanted: Mapping[Holding, Array]) -> None:
    """Fill the wanted arrays with their parts of the file's arrays of that name after `prefix`. Arrays other than
    parameters stay unchanged if the file lacks them."""
    with opened(path) as file:
        for (name, box), array in wanted.items():
            if prefix + name in file or name.startswith(PARAMETERS):
                if not name.startswith(NUMBERS):
                    check_shape(file, prefix + name, shapes[_folder(name)[1]])
                read_box(file, prefix + name, box, array)


def write_checkpoint(
    folder: Path, groups: Mapping[str, Mapping[str, Array]], attributes: Mapping[str, Attribute], keep: int
) -> None:
    """Write step-N.h5 and remove all but the `keep` newest checkpoints up to it. Raises OutputError.

    Checkpoints of later steps were left behind by a run that was resumed from an earlier one.
    """
    path = folder / f"step-{int(attributes['step']):010d}.h5"
    with written(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_arrays(path, groups, attributes)
    with suppress(OSError):
        found = checkpoints_in(folder)
        now = found.index(path) + 1
        for old in (*found[: max(now - keep, 0)], *found[now:], *folder.glob("step-*.h5.part")):
            old.unlink()


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`: that file itself, or the newest undamaged one in a run folder or a folder of
    checkpoints, with a warning of damaged ones. The file has been read whole, so this is for one rank.

    Raises OutputError if there is none, DataError if all are damaged or the file holds no training state.
    """
    if path.is_file():
        _verify(path)
        return path
    found = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
    if not found:
        raise OutputError(f"{path} holds no checkpoint to resume from; start the run without --resume")
    damaged: list[DataError] = []
    for each in reversed(found):
        try:
            _verify(each)
        except DataError as error:
            damaged.append(error)
            continue
        for problem in damaged:
            warn(f"{problem}; resuming from {each.name} instead", alone=True)
        return each
    raise DataError("; ".join(f"{error}" for error in damaged))


def _verify(path: Path) -> None:
    """Raise DataError unless the file is a whole checkpoint."""
    missing = TRAINING - verify(path).keys()
    if missing:
        text = "holds no training state; resume from a run folder, or from a file in its folder checkpoints"
        raise DataError(text, file=str(path))


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the one with the highest step last. Raises OutputError."""
    try:
        return sorted(path for path in folder.iterdir() if path.match("step-*.h5"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise OutputError(f"{folder} cannot be read: {error.strerror or error}") from error


def lies_in(path: Path, folder: Path) -> bool:
    """Whether the checkpoint at `path` is one of those in `folder`."""
    return path.resolve().parent == folder.resolve()


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
        # Weights are of float32 with all of these: a run on a GPU is resumed where there is none.
        if key == "dtype" and all(value in ("float32", "tf32", "bfloat16") for value in values):
            continue
        if values[0] != values[1]:
            raise ConfigError(
                f"{json.dumps(values[1])[:80]} is not what the checkpoint {path} was made with "
                f"({json.dumps(values[0])[:80]}); resume with the same, or start anew without --resume",
                key=key,
            )
