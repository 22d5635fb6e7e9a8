"""TrainingFiles are a training's checkpoints, and its network as one file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.failures import lost
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.writing import model_json, to_plain
from nettorrent_mpi.data.storage import replacing
from nettorrent_mpi.engine import checkpoint
from nettorrent_mpi.engine.checkpoint_folder import checkpoints_in, newest, tidy
from nettorrent_mpi.engine.checkpoint_writer import CheckpointWriter
from nettorrent_mpi.engine.emergency import EmergencyCheckpoint
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.failure import agreed
from nettorrent_mpi.engine.model_file import PARAMETERS, Attribute, opened, read_attributes, verify, write_arrays
from nettorrent_mpi.engine.run_files import written
from nettorrent_mpi.engine.run_lock import RunLock
from nettorrent_mpi.engine.saving import Saving
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.engine.trained_on import ATTRIBUTE, TrainedOn, fit
from nettorrent_mpi.engine.trainer import TrainingLoop
from nettorrent_mpi.plan.errors import DataError, NetTorrentError, OutputError, warn

BEST = "best.h5"  # of a training with patience: its best network so far, like model.h5
JUDGED = "judged"  # an attribute of checkpoints: what a Patience has seen


class TrainingFiles:
    """TrainingFiles write a training's state and its network, and read them. All ranks make them and call the same
    methods, at rest (`poll` after every step). Each rank writes its part of the state; rank 0 writes the network.

    `setup` is that of the training; its classes are numbered as in the file that was read last. `output` is the folder
    that gets `checkpoints/`; None: there are no checkpoints.
    """

    def __init__(self, engine: Engine, loop: TrainingLoop, saving: Saving, setup: Setup, output: Path | None):
        self._world, self._engine, self._loop = engine.world, engine, loop
        self.setup = setup
        self._checkpoints: Path | None = None  # their folder
        self._continues = False  # what is in it
        self.resumed_from: Path | None = None  # the checkpoint that was read last
        self._lock: RunLock | None = None
        self.emergency: EmergencyCheckpoint | None = None
        if output is not None:
            self._checkpoints = folder = output / "checkpoints"
            self._writer = CheckpointWriter(engine, folder, setup.config.checkpoint.keep)
            self.emergency = EmergencyCheckpoint(engine, self._writer, folder, self._attributes_after)
            saving.files = self
        self.move_to_first_rank()

    def move_to_first_rank(self) -> None:
        """Let rank 0 hold the folder, where the one before it is lost. All ranks call."""
        with self._world.agreement():
            if self._world.rank == 0 and self._lock is None and self._checkpoints is not None:
                self._lock = RunLock(self._checkpoints.parent, self._world.run)
        if self._world.rank == 0 and self._checkpoints is not None:  # no rank writes any more
            tidy(self._checkpoints)

    def abandon(self) -> None:
        """Give up the checkpoint that is being written, because ranks are lost."""
        if self._checkpoints is not None:
            self._writer.abandon()

    def poll(self) -> None:
        """Go on with the checkpoint that is being written, without waiting. Called after every step."""
        try:
            self._writer.poll()
        except Exception as error:
            if self._engine.plan.exact or not lost(error, self._world):
                raise
            self._writer.abandon()  # and this replica's ranks end their step

    def finish(self, error: NetTorrentError | None = None) -> None:
        """Wait for the checkpoint that is being written; not after an error that only some ranks have seen. All ranks
        call, at rest."""
        if self._checkpoints is not None and (error is None or agreed(error, self._world)):
            self._writer.finish()

    def farewell(self) -> str:
        """Return the end of a sentence about a run that ends without results: where it can go on. What lacks only its
        completion is completed."""
        if self._checkpoints is not None:
            with suppress(OutputError):
                self._writer.complete_alone()
        found = [] if self._checkpoints is None else checkpoints_in(self._checkpoints)
        return (
            f"; the latest checkpoint is {found[-1]}: continue with --resume" if found else "; there is no checkpoint"
        )

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check_folder(self) -> None:
        """Raise an OutputError if the folder has another run's checkpoints, which this training's would replace."""
        folder = self._checkpoints
        with self._world.agreement():
            if self._world.rank == 0 and folder and not self._continues and checkpoints_in(folder):
                raise OutputError(
                    f"{folder} holds another run's checkpoints: resume from them, remove them, or choose another output"
                )
        self._continues = True
        if folder:
            self._writer.prepare()

    @NOW.during("writing the network")
    def write_network(self, path: Path) -> None:
        """Write the whole network as one file. Raises OutputError."""
        self._write(path, {})

    def _write(self, path: Path, more: Mapping[str, Attribute]) -> None:
        with self._loop.evaluator.network():
            arrays = self._engine.parameters()
        with self._world.agreement():
            if self._world.rank == 0:
                with written(path):
                    write_arrays(path, {PARAMETERS: arrays}, {**_about(self.setup), **more})

    def keep_best(self, step: int) -> None:
        """Write the network, the best so far, to BEST. Raises OutputError."""
        assert self._checkpoints is not None
        self._write(self._checkpoints.parent / BEST, {"step": step})

    def read_best(self) -> int | None:
        """Load the best network of a training with patience, unless it is the present one; return its step, None where
        there is none. All ranks call, at rest."""
        patience = self._loop.patience
        if self._checkpoints is None or patience is None or patience.step is None:
            return None
        if patience.step != self._loop.step:
            self.read_network(self._checkpoints.parent / BEST)
        return patience.step

    def check_best(self, beside: Path | None = None) -> None:
        """See that BEST is the network that was judged the best when the training was where it goes on; where it is
        not, as when a checkpoint before it is resumed from, the best one is looked for anew. `beside`: the folder
        of another run that is continued, whose file is taken over. All ranks call."""
        patience, world = self._loop.patience, self._world
        if patience is None or patience.step is None or self._checkpoints is None:
            return
        step, own = patience.step, self._checkpoints.parent / BEST

        def fits() -> bool:
            if _step_of(own) != step and beside is not None and _step_of(beside / BEST) == step:
                with written(own), replacing(own) as part:
                    shutil.copyfile(beside / BEST, part)
            return _step_of(own) == step

        if not world.once(fits):
            patience.forget()
            if world.rank == 0:
                warn(f"{own} is not the network after step {step}, which was the best: it is looked for anew")

    @NOW.during("reading the network")
    def read_network(self, path: Path) -> Setup:
        """Load the network from a file, and take its numbers of the classes. Returns the new setup; raises DataError
        and ConfigError."""
        fitted: list[tuple[Setup, str | None]] = []
        checkpoint.restore_parameters(
            self._engine, path, lambda attributes: fitted.append(fit(self.setup, attributes, path))
        )
        return self._take(*fitted[0])

    @NOW.during("reading a checkpoint")
    def read_checkpoint(self, path: Path) -> Setup:
        """Continue from a checkpoint, or from a folder's newest undamaged one. Returns and raises as `read_network`."""
        self.finish()
        found, manifest = checkpoint.find_checkpoint(self._world, path)
        attributes = manifest.attributes
        fitted: list[tuple[Setup, str | None]] = []

        def accept(attributes: Mapping[str, Any]) -> None:
            checkpoint.must_match(str(attributes["config"]), self.setup.config, found)
            fitted.append(fit(self.setup, attributes, found, resumed=True))

        checkpoint.restore(self._engine, found, manifest, accept)
        setup = self._take(*fitted[0])
        if self._checkpoints is not None and checkpoint.lies_in(found, self._checkpoints):
            self._continues = True
        step, samples, seconds = int(attributes["step"]), int(attributes["samples"]), float(attributes["time"])
        loss, accuracy = (float(attributes[name]) if name in attributes else None for name in checkpoint.MEASURED)
        if self._loop.patience is not None:
            try:
                self._loop.patience.read(str(attributes.get(JUDGED, "[]")))
            except ValueError:
                self._loop.patience.forget()
        self._loop.resume(step, samples, seconds, loss, accuracy)
        self.check_best(found.absolute().parent.parent)
        self.resumed_from = found
        return setup

    def read_newest(self) -> Path | None:
        """Continue from this training's newest intact checkpoint and return it; None if there is none."""
        folder, world = self._checkpoints, self._world
        if folder is None or world.once(lambda: newest(folder) if self._continues else None) is None:
            return None
        try:
            self.read_checkpoint(folder)
        except DataError as error:
            if not agreed(error, world):
                raise
            return None
        return self.resumed_from

    def _take(self, setup: Setup, warning: str | None) -> Setup:
        """Take the same data set with its classes numbered as in `setup`."""
        if warning is not None and self._world.rank == 0:
            warn(warning)
        before, self.setup = self.setup.dataset, setup
        if setup.dataset is not before:
            with self._world.agreement():
                self._engine.read_targets(setup.dataset)
        return setup

    def write(self, *, needed: bool) -> None:
        """Begin to write checkpoints/step-N, never with weights that are not finite; the older ones are removed when it
        is there. Training goes on meanwhile, unless the checkpoint is `needed`. If it cannot be written, that is an
        OutputError if it is `needed`, and else a warning."""
        loop = self._loop
        self._writer.begin(loop.step, partial(_attributes, self.setup, self._world, self._figures(loop.step)))
        if needed:
            self._writer.finish(needed=True)

    def _figures(self, step: int) -> dict[str, Attribute]:
        loop = self._loop
        figures = {"time": loop.time, "loss": loop.loss, "accuracy": loop.accuracy}
        told: dict[str, Attribute] = {name: float(each) for name, each in figures.items() if each is not None}
        if loop.patience is not None:
            told[JUDGED] = loop.patience.text()
        return {"step": step, "samples": self._engine.sampler.samples(step), **told}

    def _attributes_after(self, step: int) -> dict[str, Attribute]:
        return _attributes(self.setup, self._world, self._figures(step))


def _step_of(path: Path) -> int | None:
    """Return the step of a BEST; None where there is none that is whole."""
    try:
        verify(path)
        with opened(path) as file:
            step = read_attributes(file).get("step")
        return None if step is None else int(step)
    except (OSError, ValueError, DataError):
        return None


def _about(setup: Setup) -> dict[str, str]:
    """Return the attributes of a file of this network."""
    return {"model": model_json(setup.config), ATTRIBUTE: TrainedOn.of(setup).text()}


def _attributes(setup: Setup, world: World, figures: Mapping[str, Attribute]) -> dict[str, Attribute]:
    """Return the attributes of a checkpoint."""
    return {
        **_about(setup),
        "config": json.dumps(to_plain(setup.config)),
        **figures,
        "ranks": world.size,
        "layout": setup.layout_line,
        "exchange": setup.options.exchange.kind,
        "device": setup.options.device,
        "mpi": world.library,
    }
