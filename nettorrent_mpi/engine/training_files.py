"""The files of a training: its checkpoints, and its network as one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nettorrent_mpi.config.writing import model_json, to_plain
from nettorrent_mpi.engine import checkpoint
from nettorrent_mpi.engine.blame import check_finite
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.model_file import PARAMETERS, Attribute, write_arrays
from nettorrent_mpi.engine.run_files import written
from nettorrent_mpi.engine.run_lock import RunLock
from nettorrent_mpi.engine.saving import Saving
from nettorrent_mpi.engine.setup import Setup
from nettorrent_mpi.engine.trained_on import ATTRIBUTE, TrainedOn, fit
from nettorrent_mpi.engine.trainer import TrainingLoop
from nettorrent_mpi.plan.errors import OutputError, warn


class TrainingFiles:
    """TrainingFiles write a training's state and its network, and read them. All ranks make them and call the same
    methods, at rest; rank 0 writes.

    `setup` is that of the training; its classes are numbered as in the file that was read last. `output` is the folder
    that gets `checkpoints/`; None: there are no checkpoints.
    """

    def __init__(self, engine: Engine, loop: TrainingLoop, saving: Saving, setup: Setup, output: Path | None):
        self._world, self._engine, self._loop = engine.world, engine, loop
        self.setup = setup
        self._checkpoints: Path | None = None  # their folder
        self._continues = False  # what is in it
        self._lock: RunLock | None = None
        if output is not None:
            with self._world.agreement():
                if self._world.rank == 0:
                    self._lock = RunLock(output)
            self._checkpoints = output / "checkpoints"
            saving.write = self._write_checkpoint

    def close(self) -> None:
        """Let other runs use the folder."""
        if self._lock is not None:
            self._lock.release()

    def check_folder(self) -> None:
        """Raise an OutputError if the folder has another run's checkpoints, which this training's would replace."""
        folder = self._checkpoints
        with self._world.agreement():
            if self._world.rank == 0 and folder and not self._continues and checkpoint.checkpoints_in(folder):
                raise OutputError(
                    f"{folder} holds another run's checkpoints: resume from them, remove them, or choose another output"
                )
        self._continues = True

    def write_network(self, path: Path) -> None:
        """Write the whole network as one file. Raises OutputError."""
        with self._loop.evaluator.network():
            arrays = self._engine.parameters()
        with self._world.agreement():
            if self._world.rank == 0:
                with written(path):
                    write_arrays(path, {PARAMETERS: arrays}, self._about())

    def read_network(self, path: Path) -> Setup:
        """Load the network from a file, and take its numbers of the classes. Returns the new setup; raises DataError
        and ConfigError."""
        fitted: list[tuple[Setup, str | None]] = []
        checkpoint.restore_parameters(
            self._engine, path, lambda attributes: fitted.append(fit(self.setup, attributes, path))
        )
        return self._take(*fitted[0])

    def read_checkpoint(self, path: Path) -> Setup:
        """Continue from a checkpoint, or from a folder's newest undamaged one. Returns and raises as `read_network`."""
        found = self._world.once(lambda: checkpoint.find_checkpoint(path))
        fitted: list[tuple[Setup, str | None]] = []

        def accept(attributes: Mapping[str, Any]) -> None:
            checkpoint.must_match(json.loads(str(attributes["config"])), self.setup.config, found)
            fitted.append(fit(self.setup, attributes, found, resumed=True))

        attributes = checkpoint.restore(self._engine, found, accept)
        setup = self._take(*fitted[0])
        if self._checkpoints is not None and checkpoint.lies_in(found, self._checkpoints):
            self._continues = True
        step, samples, seconds = int(attributes["step"]), int(attributes["samples"]), float(attributes["time"])
        loss, accuracy = (float(attributes[name]) if name in attributes else None for name in ("loss", "accuracy"))
        self._loop.resume(step, samples, seconds, loss, accuracy)
        return setup

    def _take(self, setup: Setup, warning: str | None) -> Setup:
        """Take the same data set with its classes numbered as in `setup`."""
        if warning is not None and self._world.rank == 0:
            warn(warning)
        before, self.setup = self.setup.dataset, setup
        if setup.dataset is not before:
            with self._world.agreement():
                self._engine.read_targets(setup.dataset)
        return setup

    def _about(self) -> dict[str, str]:
        """Return the attributes of a file of this network."""
        return {"model": model_json(self.setup.config), ATTRIBUTE: TrainedOn.of(self.setup).text()}

    def _write_checkpoint(self, needed: bool) -> None:
        """Write checkpoints/step-N.h5, never with weights that are not finite, and remove all but the newest ones. If
        that fails and the training goes on or has other results (not `needed`), it is a warning."""
        loop, config = self._loop, self.setup.config
        assert self._checkpoints is not None
        check_finite(self._engine)
        groups = checkpoint.collect(self._engine)
        with self._world.agreement():
            if self._world.rank == 0:
                figures = {"time": loop.time, "loss": loop.loss, "accuracy": loop.accuracy}
                attributes: dict[str, Attribute] = {
                    **self._about(),
                    "config": json.dumps(to_plain(config)),
                    "step": loop.step,
                    "samples": loop.samples,
                    **{name: figure for name, figure in figures.items() if figure is not None},
                }
                try:
                    checkpoint.write_checkpoint(self._checkpoints, groups, attributes, config.checkpoint.keep)
                except OutputError as error:
                    if needed:
                        raise
                    warn(f"there is no checkpoint of step {loop.step}: {error}", alone=True)
