"""An attempt trains one trial on all ranks of a group, in a run folder like that of `nettorrent train`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from nettorrent_mpi.api import Trainer
from nettorrent_mpi.cli.run import Run
from nettorrent_mpi.cli.run_folder import RunFolder
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.engine.checkpoint_folder import checkpoints_in
from nettorrent_mpi.engine.devices import choose_device
from nettorrent_mpi.engine.failure import agreed
from nettorrent_mpi.engine.record import Record
from nettorrent_mpi.engine.signals import Signals
from nettorrent_mpi.engine.trainer import SIGNAL
from nettorrent_mpi.plan.errors import (
    ConfigError,
    DeviceMemoryError,
    LayoutError,
    NonFiniteError,
    ShapeError,
    SizeError,
    UserError,
)
from nettorrent_mpi.planning import plan_run
from nettorrent_mpi.tune.trials import COMPLETE, DIVERGED, FAILED, PRUNED, RUNNING, Accuracies

# What is wrong about one trial; any other error ends the job: a full disk, say, would be wrong about all.
OF_TRIAL = (ConfigError, LayoutError, ShapeError, SizeError, DeviceMemoryError)


@dataclass
class Attempt:
    """An Attempt trains a trial. All ranks of its `world` make one and call `train`.

    `ends_early` is asked on rank 0, after each evaluation but the last, whether the accuracies so far are to be the
    last. Afterwards `state` tells what came of it; RUNNING: a signal has stopped it, and a checkpoint is written.
    """

    world: World
    folder: Path
    signals: Signals
    ends_early: Callable[[Accuracies], bool]
    arguments: Sequence[str]  # the command line
    state: str = RUNNING
    reason: str | None = None
    accuracy: float | None = None  # of the network in model.h5, on the validation rows
    test_accuracy: float | None = None
    epochs: float = 0.0

    def __post_init__(self) -> None:
        self.accuracies: list[tuple[float, float]] = []
        self._trainer: Trainer | None = None

    def train(self, config: Config) -> None:
        """Train to the end, or from the checkpoint of an earlier attempt on. Raises the errors that are not this
        trial's own."""
        try:
            self.state = self._trained(config)
        except (NonFiniteError, *OF_TRIAL) as error:
            if not agreed(error, self.world):
                raise
            self.state, self.reason = DIVERGED if isinstance(error, NonFiniteError) else FAILED, in_words(error)
        self.close()

    def close(self) -> None:
        """Free what MPI holds. All ranks call."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.close()

    def abandon(self) -> None:
        """Forget the training, after an error of this rank alone."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            trainer.abandon()

    def _trained(self, config: Config) -> str:
        world = self.world
        device = choose_device(world, config.device)
        with world.agreement():
            planned = plan_run(config, world.size, device.kind, data_needed=True)
        folder = RunFolder(str(self.folder))
        self._trainer = trainer = Trainer(planned, comm=world, output=folder.path, stop_on_signals=self.signals)
        if world.once(lambda: bool(checkpoints_in(self.folder / "checkpoints"))):
            trainer.resume(self.folder)
        run = Run(world, planned, trainer, folder, trainer.resumed_from, self.arguments, quiet=True)
        try:
            while True:
                try:
                    run.begin()
                    if self._follow(run, planned.setup.steps):
                        return PRUNED
                    run.end()
                    break
                except Exception as error:
                    run.go_on_or_fail(error)
        finally:
            folder.close()
        if trainer.stopped_by == SIGNAL:
            return RUNNING
        summary = world.once(lambda: parsed((self.folder / "summary.json").read_bytes()))
        self.test_accuracy = summary["test_accuracy"]
        if "best_step" in summary:  # the network of model.h5, in a training with patience
            epoch = round(summary["best_step"] / planned.setup.sampler.steps_per_epoch, 4)
            self.accuracy = dict(self.accuracies).get(epoch)
        elif self.accuracies:
            self.accuracy = self.accuracies[-1][1]
        if trainer.diverged:
            self.reason = "the loss has grown without bounds"
        return DIVERGED if trainer.diverged else COMPLETE

    def _follow(self, run: Run, steps: int) -> bool:
        """Train; return whether the trial was ended early."""
        world = self.world
        self.accuracies = world.once(lambda: _told(self.folder / "metrics.jsonl"))
        self.epochs = self.accuracies[-1][0] if self.accuracies else 0.0
        records = cast("Generator[Record]", run.trainer.train())
        for record in records:
            run.tell(record)
            self.epochs = record.epoch
            if not record.evaluated or record.validation_accuracy is None:
                continue
            before = [each for each in self.accuracies if each[0] < record.epoch]  # after a loss steps come again
            self.accuracies = [*before, (record.epoch, record.validation_accuracy)]
            if record.step < steps and world.once(lambda: self.ends_early(self.accuracies)):
                records.close()  # as any caller of train() leaves it: all ranks stay at rest after this step
                return True
        return False


def in_words(error: Exception) -> str:
    """Return an error in one line, with the key of the configuration if it is known."""
    text = " ".join(str(error).split())
    key = error.key if isinstance(error, UserError) else None
    return text if key is None or key in text else f"{key}: {text}"


def _told(metrics: Path) -> list[tuple[float, float]]:
    """Return (epoch, validation accuracy) of each evaluation that a run's metrics.jsonl tells of."""
    lines: list[dict[str, Any]] = [parsed(line) for line in metrics.read_bytes().splitlines()]
    told = [(line["epoch"], line.get("validation_accuracy")) for line in lines]
    return [(epoch, accuracy) for epoch, accuracy in told if accuracy is not None]
