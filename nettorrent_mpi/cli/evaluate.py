"""The command `nettorrent evaluate`, for a finished run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nettorrent_mpi.api import Trainer
from nettorrent_mpi.cli.arguments import parse
from nettorrent_mpi.cli.confusion import Confusion
from nettorrent_mpi.cli.ranks import Ranks
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.data.storage import check_folder
from nettorrent_mpi.engine.answers import Answers
from nettorrent_mpi.engine.checkpoint import network_of
from nettorrent_mpi.engine.devices import choose_device
from nettorrent_mpi.engine.evaluation import Part
from nettorrent_mpi.engine.run_files import run_of
from nettorrent_mpi.engine.setup import Setup, set_up
from nettorrent_mpi.engine.trained_on import TrainedOn
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.errors import DataError, UserError, warn
from nettorrent_mpi.plan.specs import Constant
from nettorrent_mpi.planning import PlannedRun, load_config, placed


def evaluate(arguments: Sequence[str], chosen: str) -> int:
    """Print loss and accuracy of RUN's network on its test set (and validation rows), on any number of ranks."""
    with Ranks() as ranks:
        world = ranks.world
        with world.agreement():
            args = parse(arguments)
            if args.output is not None and not args.confusion:
                raise UserError("--output is the folder for the files of --confusion, which is not given")
        file, network = world.once(lambda: _parts(Path(args.run)))
        if args.confusion:
            world.once(lambda: check_folder(Path(args.output or file.parent)))
        config = world.once(lambda: _any_ranks(load_config(file, *args.changes), args.changes))
        device = choose_device(world, config.device).kind
        if device == "cpu" and config.dtype in ("tf32", "bfloat16"):  # the weights are float32
            config = replace(config, dtype="float32")
        with world.agreement():
            try:
                setup = set_up(config, world.size, device=device)
            except UserError as error:
                raise placed(error, file, *args.changes) from None
            planned = PlannedRun(setup, has_length=True)  # its warnings are about a training
            for note in planned.setup.dataset.notes:
                warn(note)
            if args.confusion and not _answers(planned.setup).classes:
                raise UserError("--confusion: the targets of this run are numbers, not classes: there is none")
            if planned.setup.dataset.test is None and not len(planned.setup.sampler.validation_rows):
                raise DataError(
                    "has no test set (x_test, y_test), and the run held back no validation rows: there is nothing to "
                    "evaluate the network on; add a test set",
                    file=config.data.root or config.data.name,
                )
        trainer = Trainer(planned, comm=world)
        ranks.owns(trainer.close, trainer.abandon)
        trainer.load(network)
        found = trainer.evaluate()
        for name, scores in (("validation", found.validation), ("test", found.test)):
            if scores is not None and world.rank == 0:
                accuracy = "" if scores.accuracy is None else f", accuracy {100 * scores.accuracy:.2f} %"
                sys.stdout.write(f"{name}: loss {scores.loss:.4f}{accuracy}\n")
        if args.confusion:
            sys.stdout.write(_confusion(trainer, world, file.parent, args.output))
    return ranks.code


def _answers(setup: Setup) -> Answers:
    return Answers(TrainedOn.of(setup), setup.config.model.loss, setup.network.output_shape[-1])


def _confusion(trainer: Trainer, world: World, run: Path, output: str | None) -> str:
    """Write the files about what is taken for what, on rank 0; return what it tells, elsewhere nothing. All ranks
    call."""
    setup, folder = trainer.setup, run if output is None else Path(output)
    part: Part = "validation" if setup.dataset.test is None else "test"
    outputs = trainer.outputs(part)

    def report() -> str:
        split = setup.dataset.test or setup.dataset.train
        rows = np.arange(split.rows) if part == "test" else setup.sampler.validation_rows
        found = Confusion(_answers(setup), rows, split.targets()[rows], outputs)
        right, count = int(found.counts.trace()), len(rows)
        title = f"{run.absolute().name}, {part} rows: {right:,} of {count:,} right"
        names = found.write(folder, split, title)
        return f"\n{found.text()}\nwritten to {folder}: {', '.join(names)}\n"

    told = world.once(report)
    return told if world.rank == 0 else ""


def _parts(run: Path) -> tuple[Path, Path]:
    """Return where the configuration and the network of a run are: of a run folder, of its folder of checkpoints, or of
    one of these."""
    network, folder = network_of(run), run_of(run)
    if folder is None or not (folder / "config.yaml").is_file():
        text = "lies in no run whose config.yaml tells the data: name the folder of a run of `nettorrent train`"
        raise DataError(text, file=str(run))
    return folder / "config.yaml", network


def _any_ranks(config: Config, changes: Sequence[str]) -> Config:
    """Make a configuration of one network, with a layout that is possible on any number of ranks, and no demand on a
    training. What was trained on a GPU is evaluated where there is none, too, unless `changes` ask for one."""
    asked = any(change.replace(" ", "").startswith("device=") for change in changes)
    device = config.device if asked or config.device == "cpu" else "auto"
    layout = config.layout if isinstance(config.layout, str) else "layers"
    train = replace(config.train, stop_at=None, schedule=Constant())
    return replace(
        config, exchange=choices.Allreduce(), pipeline=choices.OneFOneB(), layout=layout, train=train, device=device
    )
