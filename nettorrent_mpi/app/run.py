"""A training run, from the configuration to the summary."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nettorrent_mpi import __version__
from nettorrent_mpi.app import config as configuration
from nettorrent_mpi.app.clock import Clock, peak_memory
from nettorrent_mpi.app.config import Config
from nettorrent_mpi.app.progress import Reporter, open_reporter
from nettorrent_mpi.app.report import dry_run
from nettorrent_mpi.app.resume import find_checkpoint, must_match
from nettorrent_mpi.app.run_folder import RunFolder
from nettorrent_mpi.app.setup import Setup, set_up
from nettorrent_mpi.app.stop import Stop
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.engine.checkpoint import collect, restore
from nettorrent_mpi.engine.engine import Engine, Scores
from nettorrent_mpi.nn.rates import make_rate
from nettorrent_mpi.nn.specs import to_plain
from nettorrent_mpi.plan.errors import ConfigError

STOPPED = "signal"
SIGNALLED = 75  # exit code: stopped by a signal, a checkpoint is written (EX_TEMPFAIL of sysexits.h)


def train(world: World, args: argparse.Namespace, chosen: str) -> int:
    """`nettorrent train`. Every rank calls; gives the exit code."""
    with world.together():
        config = configuration.load(args.config, args.changes)
        if args.output is not None:
            config = config.model_copy(update={"output": args.output})
        if args.ranks is not None and not args.dry_run:
            raise ConfigError("--ranks is for --dry-run; a real run has the ranks that mpirun -n started")
        if args.ranks is not None and args.ranks < 1:
            raise ConfigError(f"--ranks {args.ranks}: 1 is the least")
    world.same("configuration", configuration.digest(config))
    world.same("version of nettorrent_mpi", __version__)
    with world.together():
        setup = set_up(config, args.ranks or world.size)
    if args.dry_run:
        hosts = world.comm.gather(world.host)
        if world.rank == 0:
            sys.stdout.write(dry_run(setup, hosts if args.ranks is None else None))
        return 0
    folder = RunFolder(config.output or "runs/run")
    with world.together():
        checkpoint = find_checkpoint(folder, args.resume) if args.resume is not None else None
        if world.rank == 0 and checkpoint is None:
            folder.check(args.overwrite)
    engine = Engine(world, setup.network, setup.topology, setup.options)
    with world.together():
        engine.open_data(setup.dataset, setup.sampler)
    run = Run(world, setup, engine, folder, chosen)
    if checkpoint is not None:
        run.resume(checkpoint)
    return run.run()


class Run:
    """The run loop. Rank 0 tells and writes; all ranks train alike."""

    def __init__(self, world: World, setup: Setup, engine: Engine, folder: RunFolder, chosen: str):
        self._world, self._setup, self._engine, self._folder = world, setup, engine, folder
        train = setup.config.train
        self._epoch_steps = setup.sampler.steps_per_epoch
        self._steps = train.steps if train.steps is not None else (train.epochs or 1) * self._epoch_steps
        self._rate = make_rate(train.schedule, train.optimizer.options()["lr"], self._steps, self._epoch_steps)
        self._clock = Clock()
        self._stop = Stop(world)
        self._steps_done = self._samples = 0
        self._resumed = False
        self._began = time.perf_counter()
        self._chosen = chosen
        self._told = world.rank == 0
        self._reporter: Reporter | None = None

    def _open_reporter(self) -> Reporter | None:
        """On rank 0 the one that tells; nobody tells elsewhere."""
        if not self._told:
            return None
        return open_reporter(
            sys.stdout,
            layout=self._setup.layout_line,
            ranks=self._world.size,
            environment=self._chosen,
            output=str(self._folder.path),
            steps=self._steps,
            steps_per_epoch=self._epoch_steps,
        )

    def _say(self, text: str) -> None:
        if self._reporter is not None:
            self._reporter.message(text)

    def run(self) -> int:
        """Train, evaluate, save, summarise; gives the exit code."""
        with self._world.together():
            if self._told:
                resumed = self._steps_done if self._resumed else None
                self._folder.create(configuration.to_yaml(self._setup.config), resumed)
        self._reporter = self._open_reporter()
        stopped_by, loss, scores = self._train()
        if stopped_by == STOPPED:
            self._say(f"stopped by a signal after step {self._steps_done}; go on with --resume")
        else:
            self._finish(stopped_by, loss, scores)
        self._stop.close()
        self._engine.close()
        if self._reporter is not None:
            self._reporter.close()
        return SIGNALLED if stopped_by == STOPPED else 0

    def _finish(self, stopped_by: str, loss: float | None, scores: Scores | None) -> None:
        """model.h5, trace.json, summary.json."""
        arrays = self._engine.parameters()
        with self._world.together():
            if self._told:
                self._folder.model(arrays, model_json(self._setup.config))
        if self._engine.trace is not None:
            places = [self._place(rank) for rank in range(self._world.size)]
            trace = self._engine.trace.gather(self._world, places)
            with self._world.together():
                if trace is not None:
                    self._folder.trace(trace)
        peak = max(self._world.comm.allgather(peak_memory()))
        with self._world.together():
            if self._told:
                self._folder.summary(
                    {
                        "world_size": self._world.size,
                        "layout": self._setup.layout_line,
                        "steps": self._steps_done,
                        "train_seconds": round(self._clock.seconds, 3),
                        "samples_per_second": self._clock.samples_per_second,
                        "test_accuracy": scores.accuracy if scores else None,
                        "test_loss": scores.loss if scores else None,
                        "final_loss": loss,
                        "stopped_by": stopped_by,
                        "peak_memory_mb": round(peak / 1e6, 1),
                        "mpi": self._world.library,
                        "mpi_threads": self._world.threads,
                        "host": self._world.host,
                        "commit": commit(),
                        "version": __version__,
                    }
                )

    def _train(self) -> tuple[str, float | None, Scores | None]:
        """(what ended the training, last training loss, last scores on the test set)."""
        train, engine = self._setup.config.train, self._engine
        loss: float | None = None
        test: Scores | None = None
        told_at = self._steps_done
        self._clock.start()
        for n in range(self._steps_done, self._steps):
            rows = engine.step(n, self._rate(n))
            done = self._steps_done = n + 1
            self._samples += rows
            self._clock.step(rows)
            last, epochs = done == self._steps, done // self._epoch_steps if done % self._epoch_steps == 0 else 0
            due = last or epochs > 0 or done % train.report_every == 0
            asked = self._stop.asked(done, due)
            if not (asked or due):
                continue
            loss = engine.training_loss()
            seconds = self._clock.stop()
            self._stop.pace(seconds / (done - told_at))
            told_at = done
            record = self._record(n, loss)
            reached = False
            if last or (epochs and epochs % train.evaluate_every == 0):
                validation, test = engine.evaluate_validation(), engine.evaluate_test()
                record |= {
                    "test_loss": test.loss if test else None,
                    "test_accuracy": test.accuracy if test else None,
                    "validation_loss": validation.loss if validation else None,
                    "validation_accuracy": validation.accuracy if validation else None,
                }
                reached = self._reached(validation or test)
            self._tell(record)
            if asked or last or reached or (epochs and epochs % train.checkpoint_every == 0):
                self._checkpoint()
            if asked and not last:
                return STOPPED, loss, test
            if reached:
                return "accuracy", loss, test
            self._clock.start()
        return "steps" if train.steps is not None else "epochs", loss, test

    def _checkpoint(self) -> None:
        """Collective over all ranks."""
        groups = collect(self._engine)
        with self._world.together():
            if self._told:
                self._folder.checkpoint(
                    groups,
                    {
                        "model": model_json(self._setup.config),
                        "config": configuration.to_yaml(self._setup.config),
                        "step": self._steps_done,
                        "samples": self._samples,
                        "time": time.perf_counter() - self._began,
                    },
                )

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, made with any layout on any number of ranks. Collective over all ranks."""
        with self._world.together():
            attributes = restore(self._engine, path)
            must_match(configuration.loads(str(attributes["config"]), str(path)), self._setup.config, path)
        self._engine.state.meet()
        self._resumed = True
        self._steps_done = int(attributes["step"])
        self._samples = int(attributes["samples"])
        self._began -= float(attributes["time"])

    def _reached(self, scores: Scores | None) -> bool:
        stop = self._setup.config.train.stop_at
        return stop is not None and scores is not None and (scores.accuracy or 0.0) >= stop.accuracy

    def _record(self, n: int, loss: float) -> dict[str, Any]:
        return {
            "step": n + 1,
            "epoch": round((n + 1) / self._epoch_steps, 4),
            "samples": self._samples,
            "time": round(time.perf_counter() - self._began, 3),
            "train_loss": loss,
            "learning_rate": self._rate(n),
            "samples_per_second": self._clock.samples_per_second,
        }

    def _tell(self, record: dict[str, Any]) -> None:
        if self._reporter is None:
            return
        self._folder.metrics(record)
        if "test_loss" in record:
            self._reporter.epoch(record)
        else:
            self._reporter.report(record)

    def _place(self, rank: int) -> str:
        place = self._setup.topology.place(rank)
        stage = self._setup.topology.stages[place.stage]
        names = [facts.name for facts in self._setup.network.facts[stage.first : stage.stop]]
        return f"replica {place.replica}, stage {place.stage} ({' '.join(names)}), row {place.row}, col {place.col}"


def model_json(config: Config) -> str:
    """The network's configuration as model.h5 carries it."""
    loss = config.model.loss
    model = {"layers": [to_plain(layer) for layer in config.model.layers], "loss": {loss.kind: loss.options()}}
    return json.dumps(model)


def commit() -> str | None:
    """The commit of the checkout that this package runs from; None if it runs from elsewhere."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            check=False,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
