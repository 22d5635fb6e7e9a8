"""The emergency checkpoint of a training that stands still is made without MPI, from the live arrays.

Ranks that wait for a rank that hangs stand in a later step and have not updated anything in it, so their arrays are the
state after the last whole step; only forward passes have changed the running statistics and the metrics, which were
kept when the step began. That makes a checkpoint if all ranks that answer are after the same step, and if what the
silent ones own is held by others, too: where all replicas are equal, all rows of a stage hold the same parameters, but
each alone has its part of the optimizer's state.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from nettorrent_mpi.engine.checkpoint import check_network, read_manifest
from nettorrent_mpi.engine.checkpoint_folder import complete, name_of, newest, write_blocks
from nettorrent_mpi.engine.checkpoint_writer import CheckpointWriter
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.model_file import Attribute
from nettorrent_mpi.engine.state import PARAMETERS
from nettorrent_mpi.plan.errors import DataError, NetTorrentError, OutputError, listed
from nettorrent_mpi.plan.moves import Box


class EmergencyCheckpoint:
    """An EmergencyCheckpoint is one rank's part in such a checkpoint, in `folder`. Its methods are called by threads
    besides the one that trains; each rank calls them for itself.

    `writer` writes the training's other checkpoints there. `attributes` gives those of the checkpoint of a step.
    """

    def __init__(
        self,
        engine: Engine,
        writer: CheckpointWriter,
        folder: Path,
        attributes: Callable[[int], Mapping[str, Attribute]],
    ):
        self._engine, self._writer, self._folder, self._attributes = engine, writer, folder, attributes

    def whole(self) -> int | None:
        """Return the step after which this rank's state is whole; None in the middle of an update."""
        return self._engine.update.whole

    def obstacle(self, wholes: Mapping[int, int | None]) -> str | None:
        """Return why the ranks that answer, which are after these steps, can make no checkpoint; "" if there is nothing
        to be saved; None if they can."""
        engine = self._engine
        if engine.device.kind != "cpu":
            return "the state lies on GPUs, which may be what hangs"
        if not engine.plan.exact:
            return f"replicas differ (exchange {engine.options.exchange.kind}), and are after steps of their own"
        if engine.schedule.asynchronous:
            return "with pipeline async the stages are after different steps"
        steps = {step: rank for rank, step in wholes.items()}
        if None in steps:
            return f"rank {steps[None]} is in the middle of an update, or reads a state"
        (first, rank), *others = sorted((step, rank) for step, rank in steps.items() if step is not None)
        if others:
            step, other = others[-1]
            return f"rank {rank} is after step {first}, and rank {other} after step {step} already"
        there = newest(self._folder.parent)
        if first in (0, self._writer.in_flight) or (there is not None and there.name.startswith(name_of(first))):
            return ""
        return self._missing([rank for rank in range(engine.topology.size) if rank not in wholes])

    def _missing(self, silent: Sequence[int]) -> str | None:
        """Return which silent rank holds something alone, and what; None if none does."""
        topology, network = self._engine.topology, self._engine.network
        for rank in silent:
            place = topology.place(rank)
            stage = topology.stages[place.stage]
            parameters = network.stage(stage.first, stage.stop, stage.cols, place.col).parameters
            what = listed([f"{key}{_in_words(parameter.box)}" for key, parameter in parameters])
            if all(holder in silent for holder in topology.exact_group(place.stage, place.col)):
                return f"rank {rank}, which holds {what} alone, does not answer"
            if states := self._engine.optimizer.states:
                return (
                    f"rank {rank}, which alone has its part of the optimizer's state ({', '.join(states)}) of {what}, "
                    "does not answer"
                )
        return None

    def write(self, step: int, silent: Sequence[int]) -> None:
        """Write this rank's part of the checkpoint of this step, and of what silent ranks own. Raises an OutputError,
        and a NetTorrentError if the state is no more, or never was, that of a good training after this step."""
        engine = self._engine
        self._writer.stand_still()
        begun = engine.update.begun
        self._check(step, begun)
        blocks = engine.state.blocks_left(silent, begun=begun)
        for (name, _), block in blocks.items():
            if name.startswith(PARAMETERS) and not np.isfinite(block).all():
                raise NetTorrentError(f"{name} has values that are not finite")
        if begun and not silent:  # otherwise sums begin anew
            blocks |= engine.numbers.kept()
        write_blocks(self._part(step), engine.world.rank, blocks, lambda: self._check(step, begun))
        self._check(step, begun)

    def complete(self, step: int, ranks: Sequence[int]) -> Path:
        """Complete the checkpoint that these ranks have written, and return where it is. Older ones stay. Raises an
        OutputError, and a DataError if a part of the state is missing."""
        complete(self._part(step), ranks, self._attributes(step), sys.maxsize)
        made = self._folder / name_of(step)
        try:
            check_network(read_manifest(made), made, self._engine)
        except DataError:
            shutil.rmtree(made, ignore_errors=True)
            raise
        return made

    def _part(self, step: int) -> Path:
        return self._folder / f"{name_of(step)}.tmp"

    def _check(self, step: int, begun: bool) -> None:
        """Raise an OutputError unless this rank still stands where it stood: the step is its last whole one, and a
        further one has begun, or not."""
        if self.whole() != step or self._engine.update.begun != begun:
            raise OutputError("the training went on while it was written")


def _in_words(box: Box) -> str:
    """Write a box as it would be written in Python."""
    return f"[{', '.join(f'{span.start}:{span.stop}' for span in box)}]" if box else ""
