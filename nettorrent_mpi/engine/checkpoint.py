"""Checkpoints: all that a run needs to go on, in global coordinates, so that it goes on with any layout and rank count.

Random numbers are functions of the step, so the step's number stands for all of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nettorrent_mpi.engine.blocks import gather
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.model_file import OPTIMIZER, PARAMETERS, Attribute, opened, read_block
from nettorrent_mpi.nn.backend import Array, aligned
from nettorrent_mpi.plan.errors import DataError

Groups = dict[str, dict[str, Array]]


def collect(engine: Engine) -> Groups:
    """On rank 0: everything, as `model_file.write_arrays` takes it; elsewhere empty. Collective over all ranks."""
    world, topology, network, state = engine.world, engine.topology, engine.network, engine.state
    groups: Groups = {PARAMETERS: gather(world, topology, network, state.params)}
    for name in engine.optimizer.states:
        blocks: dict[str, Array] = {}
        for segment in state.segments:
            whole = aligned(sum(segment.counts), state.dtype)
            segment.group.allgather(segment.optimizer[name], whole, segment.counts)
            for key, place in segment.places.items():
                blocks[key] = whole[place].reshape(state.params[key].shape)
        groups[f"{OPTIMIZER}/{name}"] = gather(world, topology, network, blocks, trainable=True)
    return groups


def restore_parameters(engine: Engine, path: Path) -> None:
    """Let this rank take its blocks of the parameters from model.h5 or a checkpoint. Raises DataError.

    Every rank calls. Holders of the same block write the same values, and have to `State.meet` afterwards.
    """
    with opened(path) as file:
        for key, parameter in engine.state.parameters.items():
            read_block(file, PARAMETERS, key, parameter, engine.state.params[key])


def restore(engine: Engine, path: Path) -> dict[str, Attribute]:
    """`restore_parameters`, and this rank's part of the optimizer's state; gives the file's attributes."""
    restore_parameters(engine, path)
    state = engine.state
    with opened(path) as file:
        for name in engine.optimizer.states:
            if f"{OPTIMIZER}/{name}" not in file:
                raise DataError(
                    f"holds no state {name!r} of the optimizer; resume with the optimizer it was made with",
                    file=str(path),
                )
            for segment in state.segments:
                whole = np.zeros(sum(segment.counts), state.dtype)
                for key, place in segment.places.items():
                    block = whole[place].reshape(state.params[key].shape)
                    read_block(file, f"{OPTIMIZER}/{name}", key, state.parameters[key], block)
                segment.optimizer[name][...] = whole[segment.shard]
        return dict(file.attrs)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder: the one with the highest step in its name."""
    found = sorted(folder.glob("step-*.h5"))
    return found[-1] if found else None


def file_name(step: int) -> str:
    """The name of the checkpoint after so many steps."""
    return f"step-{step:010d}.h5"
