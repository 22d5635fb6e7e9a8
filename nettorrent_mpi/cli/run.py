"""A training run, from the configuration to the summary."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from nettorrent_mpi import __version__
from nettorrent_mpi.cli.progress import Reporter, open_reporter
from nettorrent_mpi.cli.run_folder import RunFolder, commit, model_json
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.config.writing import to_yaml
from nettorrent_mpi.device.cpu import choice as kernels
from nettorrent_mpi.engine.checkpoint import collect, restore, restore_replica
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.evaluation import Judge
from nettorrent_mpi.engine.memory_estimate import Libraries, estimate
from nettorrent_mpi.engine.reports import Report, Reports
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.setup import Setup, set_up
from nettorrent_mpi.engine.stopping import Stop
from nettorrent_mpi.engine.usage import Clock, peak_memory
from nettorrent_mpi.nn.rates import make_rate
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.scores import Scores

STOPPED = "signal"
SIGNALLED = 75  # exit code: stopped by a signal, a checkpoint is written (EX_TEMPFAIL of sysexits.h)


def train(world: World, args: argparse.Namespace, chosen: str) -> int:
    """`nettorrent train`. Every rank calls; gives the exit code."""
    world.same("command line", " ".join(args.command_line))
    world.same("version of nettorrent_mpi", __version__)
    before = peak_memory()
    config = world.once(lambda: read(args))
    checker = peak_memory() - before  # loaded on rank 0, to read the configuration
    with world.together():
        setup = set_up(config, args.ranks or world.size)
    own = peak_memory()
    libraries = Libraries(own, own - checker)
    if args.dry_run:
        from nettorrent_mpi.cli.dry_run import dry_run

        hosts = world.comm.gather(world.host)
        if world.rank == 0:
            sys.stdout.write(dry_run(setup, estimate(setup, libraries), hosts if args.ranks is None else None))
        return 0
    folder = RunFolder(config.output or "runs/run")
    checkpoint = None
    with world.together():
        if args.resume is not None:
            from nettorrent_mpi.cli.resume import find_checkpoint

            checkpoint = find_checkpoint(folder, args.resume)
        elif world.rank == 0:
            folder.check(args.overwrite)
    engine = Engine(world, Plan(setup.network, setup.topology, setup.options))
    with world.together():
        engine.open_data(setup.dataset, setup.sampler)
    run = Run(world, setup, engine, folder, chosen, libraries)
    if checkpoint is not None:
        run.resume(checkpoint)
    return run.run()


def read(args: argparse.Namespace) -> Config:
    """The configuration that was asked for. Where this is called pydantic is loaded, and nowhere else in a new run."""
    from nettorrent_mpi.config import reading as configuration

    config = configuration.load(args.config, args.changes)
    if args.ranks is not None and not args.dry_run:
        raise ConfigError("--ranks is for --dry-run; a real run has the ranks that mpirun -n started")
    if args.ranks is not None and args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks}: 1 is the least")
    return config if args.output is None else replace(config, output=args.output)


class Run:
    """The run loop. Rank 0 tells and writes; all ranks train alike."""

    def __init__(
        self, world: World, setup: Setup, engine: Engine, folder: RunFolder, chosen: str, libraries: Libraries
    ):
        self._world, self._setup, self._engine, self._folder = world, setup, engine, folder
        self._libraries = libraries
        train = setup.config.train
        self._epoch_steps = setup.sampler.steps_per_epoch
        self._steps = train.steps if train.steps is not None else (train.epochs or 1) * self._epoch_steps
        self._schedule = make_rate(train.schedule, train.optimizer.options()["lr"], self._steps, self._epoch_steps)
        self._clock = Clock()
        self._stop = Stop(world, engine.bound)
        self._reports: Reports[dict[str, Any] | None] = Reports(engine)
        self._judge = Judge(engine)
        self._loss: float | None = None
        self._losses: list[float] = []
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

    def _yaml(self) -> str:
        """The configuration, complete. For rank 0, which has loaded what writes it."""
        return to_yaml(self._setup.config)

    def run(self) -> int:
        """Train, evaluate, save, summarise; gives the exit code."""
        with self._world.together():
            if self._told:
                resumed = self._steps_done if self._resumed else None
                self._folder.create(self._yaml(), resumed)
        self._reporter = self._open_reporter()
        stopped_by, loss, figures = self._train()
        if stopped_by == STOPPED:
            self._say(f"stopped by a signal after step {self._steps_done}; go on with --resume")
        else:
            self._finish(stopped_by, loss, figures)
        self._stop.close()
        self._reports.close()
        self._engine.close()
        if self._reporter is not None:
            self._reporter.close()
        return SIGNALLED if stopped_by == STOPPED else 0

    def _finish(self, stopped_by: str, loss: float | None, figures: dict[str, Any]) -> None:
        """model.h5, trace.json, summary.json."""
        figures = {"test_accuracy": None, "test_loss": None, **figures, **self._judge.end(self._losses)}
        exchange = self._engine.exchange_figures()
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
                predicted = max(each.total for each in estimate(self._setup, self._libraries))
                self._folder.summary(
                    {
                        "world_size": self._world.size,
                        "layout": self._setup.layout_line,
                        "steps": self._steps_done,
                        "train_seconds": round(self._clock.seconds, 3),
                        "samples_per_second": self._clock.samples_per_second,
                        **{name: figures.pop(name) for name in ("test_accuracy", "test_loss")},
                        "final_loss": loss,
                        "stopped_by": stopped_by,
                        **{name: figures[name] for name in ("average", "best_replica") if name in figures},
                        "exchange": exchange,
                        "peak_memory_mb": round(peak / 1e6, 1),
                        "memory_estimate_mb": round(predicted / 1e6, 1),
                        "kernels": kernels.names(),
                        "mpi": self._world.library,
                        "mpi_threads": self._world.threads,
                        "host": self._world.host,
                        "commit": commit(),
                        "version": __version__,
                    }
                )

    def _train(self) -> tuple[str, float | None, dict[str, Any]]:
        """(what ended the training, last training loss, figures of the last evaluation).

        Ranks train on without waiting for each other until they come to rest: where something is evaluated, saved or
        decided. Reports in between are sums that nobody waits for.
        """
        train, engine = self._setup.config.train, self._engine
        figures: dict[str, Any] = {}
        stop: int | None = None
        reported = False
        while self._steps_done < self._steps:
            self._clock.go_on()
            n = self._steps_done
            rest = self._rest(n) if stop is None else stop
            rows = engine.step(n, self._rate(n), rest - n)
            done = self._steps_done = n + 1
            self._samples += rows
            self._clock.step(rows)
            epochs = done // self._epoch_steps if done % self._epoch_steps == 0 else 0
            ask = reported and done < rest  # one step after a report has begun it may have arrived
            reported = done == rest or bool(epochs) or done % train.report_every == 0
            if reported:
                self._reports.start(self._record(n), self._stop.told)
            elif self._stop.due(done):
                self._reports.start(None, self._stop.told, figures=False)
                reported = True
            if done == 2:
                self._stop.pace(self._clock.seconds_per_step)
            self._take_reports(wait=done == rest, to_flag=True)
            know = self._stop.all_know(ask=ask) or (done == rest and self._stop.heard)
            if know and stop is None:  # others may be before this one's rest, and wait there
                stop = min(rest, self._stop.last_step(done + 1 + engine.ahead))
            if done < rest:
                continue
            last = done == self._steps
            self._take_reports(wait=True)
            self._clock.stop()
            report = self._reports.ready(wait=True)[-1]
            asked = self._stop.heard or report.flag
            record, reached = self._filled(report), self._reached(self._at_rest(done, report))
            if last or reached or (epochs and epochs % train.evaluate_every == 0):
                figures, scores = self._judge.now(self._losses)
                record |= figures
                reached = reached or self._reached(scores)
            if last or reached or epochs or done % train.report_every == 0:
                self._tell(record)
            if asked or last or reached or (epochs and epochs % train.checkpoint_every == 0):
                self._checkpoint()
            if asked and not last:
                return STOPPED, self._loss, figures
            if reached:
                return "accuracy", self._loss, figures
            self._stop.pace(self._clock.seconds_per_step)
        return "steps" if train.steps is not None else "epochs", self._loss, figures

    def _rate(self, n: int) -> float:
        """The learning rate of step n."""
        rate, train = self._schedule(n), self._setup.config.train
        warm = n >= train.schedule.options()["warmup_steps"]
        decay = rate / train.optimizer.options()["lr"] if warm and rate else 1.0
        return rate * self._engine.exchange.rate_scale(n / self._steps, decay)

    def _rest(self, n: int) -> int:
        """After how many steps in all the ranks come to rest next, step n being the next one."""
        train, due = self._setup.config.train, self._engine.exchange.next_rest(n)
        epochs = (train.evaluate_every, train.checkpoint_every)
        found = [self._steps, *(_next(n, every * self._epoch_steps) for every in epochs)]
        return min(found if due is None else [*found, due])

    def _at_rest(self, done: int, report: Report[Any]) -> Scores | None:
        """What replicas that differ do at rest, if it is time; the best one's scores if they were compared."""
        return self._engine.exchange.at_rest(done, self._engine.compare_replicas, report.distance)

    def _take_reports(self, *, wait: bool, to_flag: bool = False) -> None:
        """Tell what the ranks have reported. `wait`: for all reports but the last, which is told together with what
        happens at rest; `to_flag`: but not beyond one that says that some rank was told to stop, because ranks that
        have heard of it may start no more before all know."""
        for report in self._reports.ready(wait=wait, but=1, to_flag=to_flag):
            if report.tag is not None:
                self._tell(self._filled(report))
            self._stop.hear(report.flag)

    def _filled(self, report: Report[dict[str, Any] | None]) -> dict[str, Any]:
        """The line of metrics.jsonl that a report completes."""
        self._loss = report.training.loss
        self._losses = report.replicas
        assert report.tag is not None
        record = {**report.tag, "train_loss": self._loss}
        if report.distance is not None:
            record["consensus_distance"] = report.distance
        return record

    def _checkpoint(self) -> None:
        """Collective over all ranks."""
        groups = collect(self._engine)
        with self._world.together():
            if self._told:
                self._folder.checkpoint(
                    groups,
                    {
                        "model": model_json(self._setup.config),
                        "config": self._yaml(),
                        "step": self._steps_done,
                        "samples": self._samples,
                        "time": time.perf_counter() - self._began,
                    },
                )

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint, made with any layout on any number of ranks. Collective over all ranks."""
        from nettorrent_mpi.cli.resume import must_match
        from nettorrent_mpi.config import reading as configuration

        with self._world.together():
            attributes = restore(self._engine, path)
            must_match(configuration.loads(str(attributes["config"]), str(path)), self._setup.config, path)
        self._engine.state.meet()
        self._engine.exchange.averaged()
        with self._world.together():
            restore_replica(self._engine, path)
        self._engine.state.meet()
        self._resumed = True
        self._steps_done = int(attributes["step"])
        self._samples = int(attributes["samples"])
        self._began -= float(attributes["time"])

    def _reached(self, scores: Scores | None) -> bool:
        stop = self._setup.config.train.stop_at
        return stop is not None and scores is not None and (scores.accuracy or 0.0) >= stop.accuracy

    def _record(self, n: int) -> dict[str, Any]:
        return {
            "step": n + 1,
            "epoch": round((n + 1) / self._epoch_steps, 4),
            "samples": self._samples,
            "time": round(time.perf_counter() - self._began, 3),
            "train_loss": None,
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


def _next(n: int, every: int) -> int:
    """The first multiple of `every` after n."""
    return (n // every + 1) * every
