"""Checkpoints: all that a run needs to go on, in global coordinates, so that it goes on with any layout and rank count.

Random numbers are functions of the step, so the step's number stands for all of them. Replicas that differ are all
saved, besides their average, which is what another number of replicas begins with. Nothing is under way between
replicas when a checkpoint is made; estimates of compressed messages begin anew from the average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nettorrent_mpi.device.arrays import Array, aligned
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.gathering import gather
from nettorrent_mpi.engine.model_file import OPTIMIZER, PARAMETERS, REPLICAS, Attribute, opened, read_block
from nettorrent_mpi.plan.errors import DataError

if TYPE_CHECKING:
    import h5py

Groups = dict[str, dict[str, Array]]


def collect(engine: Engine) -> Groups:
    """On rank 0: everything, as `model_file.write_arrays` takes it; elsewhere empty. Collective over all ranks."""
    count = engine.replicas.count
    groups: Groups = {}
    with engine.replicas.shown():  # the average of replicas that differ
        groups[PARAMETERS] = _gather(engine, 0, engine.state.params)
    if count > 1:
        for r in range(count):
            groups[f"{REPLICAS}/{r}/{PARAMETERS}"] = _gather(engine, r, engine.state.params)
    for name, shards in _memories(engine).items():
        found = _gather_memory(engine, shards)
        if count > 1:
            groups |= {f"{REPLICAS}/{r}/{name}": whole for r, whole in enumerate(found)}
        groups[name] = _mean(found)
    return groups


def _mean(found: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Array by array. In memory for one of them only: what is gathered is often what a rank has room for at most."""
    if len(found) == 1:
        return found[0]
    means: dict[str, Array] = {}
    for key, first in found[0].items():
        means[key] = first.copy()
        for other in found[1:]:
            np.add(means[key], other[key], out=means[key])
        np.divide(means[key], len(found), out=means[key])
    return means


def _gather_memory(engine: Engine, shards: Sequence[Array]) -> list[dict[str, Array]]:
    """One thing that is remembered of every parameter: of each replica."""
    blocks = _blocks(engine, shards)
    return [_gather(engine, r, blocks, trainable=True) for r in range(engine.replicas.count)]


def _gather(engine: Engine, replica: int, blocks: Mapping[str, Array], *, trainable: bool = False) -> dict[str, Array]:
    return gather(engine.world, engine.topology, engine.network, blocks, trainable=trainable, replica=replica)


def _memories(engine: Engine) -> dict[str, list[Array]]:
    """What is remembered of every parameter, by name: the shards of each segment."""
    segments = engine.state.segments
    found = {f"{OPTIMIZER}/{name}": [s.optimizer[name] for s in segments] for name in engine.optimizer.states}
    return found | {f"exchange/{name}": shards for name, shards in engine.exchange.memories().items()}


def _blocks(engine: Engine, shards: Sequence[Array]) -> dict[str, Array]:
    """This rank's blocks, from all holders' shards."""
    blocks: dict[str, Array] = {}
    for segment, shard in zip(engine.state.segments, shards, strict=True):
        whole = aligned(segment.size, engine.state.dtype)
        segment.group.allgather(shard, whole, segment.counts)
        blocks |= segment.blocks(engine.state.parameters, whole)
    return blocks


def restore_parameters(engine: Engine, path: Path, group: str = PARAMETERS) -> None:
    """Let this rank take its blocks of the parameters from model.h5 or a checkpoint. Raises DataError.

    Every rank calls. Holders of the same block write the same values, and have to `State.meet` afterwards.
    """
    with opened(path) as file:
        for key, parameter in engine.state.parameters.items():
            read_block(file, group, key, parameter, engine.state.params[key])


def restore(engine: Engine, path: Path) -> dict[str, Attribute]:
    """`restore_parameters`, and this rank's part of the optimizer's state; gives the file's attributes."""
    restore_parameters(engine, path)
    with opened(path) as file:
        for name in engine.optimizer.states:
            if f"{OPTIMIZER}/{name}" not in file:
                raise DataError(
                    f"holds no state {name!r} of the optimizer; resume with the optimizer it was made with",
                    file=str(path),
                )
        _restore_memories(engine, file, "")
        return dict(file.attrs)


def restore_replica(engine: Engine, path: Path) -> None:
    """Where the checkpoint holds as many replicas as there are, let each take its own; otherwise they go on from the
    average, which `restore` gave them. Called as `restore_parameters`."""
    count, own = engine.replicas.count, f"{REPLICAS}/{engine.place.replica}/"
    with opened(path) as file:
        step = int(file.attrs["step"])
        as_many = count > 1 and REPLICAS in file and len(file[REPLICAS]) == count
        if as_many:
            _restore_memories(engine, file, own)
    if as_many:
        restore_parameters(engine, path, own + PARAMETERS)
    engine.exchange.recall(step)


def _restore_memories(engine: Engine, file: h5py.File, prefix: str) -> None:
    """What the file does not hold stays as it is."""
    state = engine.state
    for name, shards in _memories(engine).items():
        if prefix + name not in file:
            continue
        for segment, shard in zip(state.segments, shards, strict=True):
            whole = np.zeros(segment.size, state.dtype)
            for key, block in segment.blocks(state.parameters, whole).items():
                read_block(file, prefix + name, key, state.parameters[key], block)
            shard[...] = whole[segment.shard]


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder: the one with the highest step in its name."""
    found = sorted(folder.glob("step-*.h5"))
    return found[-1] if found else None


def file_name(step: int) -> str:
    """The name of the checkpoint after so many steps."""
    return f"step-{step:010d}.h5"
