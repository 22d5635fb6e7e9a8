"""Checkpoints hold the whole training state in global coordinates, so that any layout and rank count can resume from
it.

Random numbers are functions of the step, so only the step number is saved for them. Replicas that differ are all saved,
besides their average, from which a run with another number of replicas starts. No message between replicas is in flight
when a checkpoint is made; the estimates of compressed messages restart from the average.

A file is one side of the operation that moves blocks between ranks (engine/resharding.py): to write it, rank 0 takes
every array whole; to read it, each rank takes its own boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.model_file import Attribute, opened, read_box
from nettorrent_mpi.engine.resharding import REPLICAS, move
from nettorrent_mpi.engine.state import OPTIMIZER, PARAMETERS
from nettorrent_mpi.plan.errors import DataError
from nettorrent_mpi.plan.moves import Holding, whole

Groups = dict[str, dict[str, Array]]


def collect(engine: Engine) -> Groups:
    """Return on rank 0 all arrays whole, as `model_file.write_arrays` takes them; elsewhere nothing. Collective over
    all ranks, at rest."""
    held, group = engine.blocks(), engine.wiring.everyone
    names: dict[str, None] = {}
    for each in group.gather_objects([holding.name for holding in held]):
        names |= dict.fromkeys(each)
    groups: Groups = {}
    wanted: dict[Holding, Array] = {}
    if group.index == 0:
        shapes = engine.shapes()
        for name in names:
            folder, key = _folder(name)
            array = groups.setdefault(folder, {})[key] = np.empty(shapes[key], engine.state.dtype)
            wanted[Holding(name, whole(array.shape))] = array
    move(group, held, wanted)
    return groups


def _folder(name: str) -> tuple[str, str]:
    """Split an array's name: "replicas/1/optimizer/m/linear1/weight" -> ("replicas/1/optimizer/m",
    "linear1/weight")."""
    parts = name.split("/")
    at = 2 if parts[0] == REPLICAS else 0
    at += 1 if parts[at] == PARAMETERS else 2
    return "/".join(parts[:at]), "/".join(parts[at:])


def restore_parameters(engine: Engine, path: Path) -> None:
    """Load every rank's blocks of the parameters from model.h5 or a checkpoint. Raises DataError on all ranks."""
    with engine.world.agreement():
        _read(path, engine.shapes(), "", engine.state.blocks())
    engine.state.fence()


def restore(engine: Engine, path: Path, accept: Callable[[Mapping[str, Attribute]], None]) -> dict[str, Attribute]:
    """Load the training state from a checkpoint made with any layout on any number of ranks; return its attributes.

    `accept` sees the attributes before anything changes. Raises DataError, or what `accept` raises, on all ranks.
    """
    with engine.world.agreement(), opened(path) as file:
        attributes: dict[str, Attribute] = dict(file.attrs)
        accept(attributes)
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
                read_box(file, prefix + name, shapes[_folder(name)[1]], box, array)


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder: the one with the highest step in its name."""
    found = sorted(folder.glob("step-*.h5"))
    return found[-1] if found else None


def file_name(step: int) -> str:
    """Return the name of the checkpoint after this many steps."""
    return f"step-{step:010d}.h5"
