"""`nettorrent evaluate` and `nettorrent export`: what can be done with a finished run."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.engine.checkpoint import restore_parameters
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.model_file import read_arrays
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.setup import set_up
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.errors import DataError, OutputError


def evaluate(world: World, args: argparse.Namespace) -> int:
    """Loss and accuracy of RUN's network on its test set (and validation rows), on any number of ranks."""
    folder = Path(args.run)
    config = world.once(lambda: _any_ranks(configuration.load(str(folder / "config.yaml"), args.changes)))
    with world.together():
        setup = set_up(config, world.size)
        if setup.dataset.test is None and not len(setup.sampler.validation_rows):
            raise DataError(
                "has no test set (x_test, y_test), and the run held back no validation rows: there is nothing to "
                "evaluate the network on; add a test set",
                file=config.data.root or config.data.name,
            )
    engine = Engine(world, Plan(setup.network, setup.topology, setup.options))
    with world.together():
        restore_parameters(engine, folder / "model.h5")
    with world.together():
        engine.open_data(setup.dataset, setup.sampler)
    engine.state.meet()
    for name, scores in (("validation", engine.evaluate_validation()), ("test", engine.evaluate_test())):
        if scores is not None and world.rank == 0:
            accuracy = "" if scores.accuracy is None else f", accuracy {100 * scores.accuracy:.2f} %"
            sys.stdout.write(f"{name}: loss {scores.loss:.4f}{accuracy}\n")
    engine.close()
    return 0


def _any_ranks(config: Config) -> Config:
    """The configuration of one network, with a layout that every number of ranks can have."""
    layout = config.layout if isinstance(config.layout, str) else "layers"
    return replace(config, exchange=choices.Allreduce(), pipeline=choices.OneFOneB(), layout=layout)


def export(run: str, target: str) -> None:
    """Write RUN's arrays into a new .npz file, one array "<layer>/<name>" each."""
    if not target.endswith(".npz"):
        raise OutputError(f"{target}: the file's name must end in .npz")
    arrays = read_arrays(Path(run) / "model.h5")
    if not arrays:
        raise DataError("holds no arrays; train again", file=str(Path(run) / "model.h5"))
    path, part = Path(target), Path(target + ".part")
    if path.exists():
        raise OutputError(f"{target} exists; choose another name or remove it")
    try:
        with part.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{target} could not be written: {error.strerror or error}") from error
