"""The command `nettorrent train`, from the configuration to the summary."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nettorrent_mpi import __version__
from nettorrent_mpi.api import Trainer
from nettorrent_mpi.cli.ranks import Ranks
from nettorrent_mpi.cli.requested import asked, plan_requested, read
from nettorrent_mpi.cli.run_folder import RunFolder
from nettorrent_mpi.comm.activity import NOW, START
from nettorrent_mpi.comm.failures import survivable
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.config.writing import to_yaml
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.checkpoint_folder import newest
from nettorrent_mpi.engine.copy_interval import copy_interval, members_with_copies, part_of_copies
from nettorrent_mpi.engine.failover import Failure
from nettorrent_mpi.engine.record import Record
from nettorrent_mpi.engine.signals import Signals
from nettorrent_mpi.engine.trainer import ACCURACY, PATIENCE, SIGNAL
from nettorrent_mpi.engine.usage import faster, peak_memory
from nettorrent_mpi.plan.errors import SIGNALLED, NetTorrentError
from nettorrent_mpi.planning import PlannedRun

if TYPE_CHECKING:
    from nettorrent_mpi.cli.progress import Reporter

DIVERGED = 1  # exit code: the training diverged, though all numbers are finite


def train(arguments: Sequence[str], chosen: str, signals: Signals) -> int:
    """Run `nettorrent train` on all ranks; returns the exit code."""
    START.reached("imports")
    with Ranks() as ranks:
        START.reached("MPI")
        run = ranks.complete(lambda: _start(ranks, arguments, chosen, signals))
        while run is not None:
            try:
                run.begin()
                for record in run.trainer.train():
                    run.tell(record)
                ranks.code = run.end()
                break
            except Exception as error:
                run.go_on_or_fail(error)
    return ranks.code


def _start(ranks: Ranks, arguments: Sequence[str], chosen: str, signals: Signals) -> Run | None:
    """Return the requested run, ready to train; None if there is nothing to train."""
    world = ranks.world
    world.same("command line", " ".join(arguments))
    world.same("version of nettorrent_mpi", __version__)
    args = asked(world, arguments)
    if args.print_config:
        text = world.once(lambda: to_yaml(read(args)))
        if world.rank == 0:
            sys.stdout.write(text)
        return None
    planned, device = plan_requested(world, args)
    START.reached("plan")
    if args.dry_run:
        hosts = world.gather_objects(world.host)
        if world.rank == 0:
            sys.stdout.write(
                planned.describe(hosts if planned.topology.size == world.size and args.nodes is None else None)
            )
        return None
    folder = RunFolder(planned.config.output or "runs/run")
    ranks.owns(folder.close, folder.close)
    with world.agreement():
        if world.rank == 0:
            folder.lock(world.run)
    place = world.once(lambda: folder.starting_point(args.resume, overwrite=args.overwrite))
    trainer = Trainer(planned, comm=world, output=folder.path, stop_on_signals=signals)
    ranks.owns(trainer.close, trainer.abandon)
    if place is not None:
        trainer.resume(place)
    checkpoint = trainer.resumed_from
    run = Run(world, planned, trainer, folder, checkpoint, arguments)
    if checkpoint is not None and run.is_complete(checkpoint):
        return None
    run.environment, run.device = chosen, device
    return run


def _anywhere(config: Config) -> Config:
    """Name the data so that they are found from any folder, as `evaluate` needs them."""
    root = Path(config.data.root or "").expanduser()
    if config.data.root is None or not root.exists():  # what a data set of a script's own reads may be no path
        return config
    return replace(config, data=replace(config.data, root=str(root.absolute())))


class Run:
    """A Run shows a training and writes its folder. All ranks call its methods; rank 0 shows and writes. It continues
    from `checkpoint` if there is one."""

    environment = ""  # how it was set, in words
    device = ""  # what the run computes on, in words

    def __init__(
        self,
        world: World,
        planned: PlannedRun,
        trainer: Trainer,
        folder: RunFolder,
        checkpoint: Path | None,
        arguments: Sequence[str],
        *,
        quiet: bool = False,
    ):
        """`arguments` are the command's; `quiet`: nothing is shown."""
        self._world, self._planned, self.trainer, self._folder = world, planned, trainer, folder
        self._checkpoint, self._arguments, self._quiet = checkpoint, arguments, quiet
        self._about: dict[str, Any] = {}  # the content of run.json
        self._created = self._begun = False
        self._reporter: Reporter | None = None
        trainer.on_recovery(self.go_on)
        trainer.on_leaving(self.leave)

    def is_complete(self, checkpoint: Path) -> bool:
        """Whether the run that `checkpoint` continues has nothing left to train, and the folder has its results: they
        stay, and a line says so."""
        step, steps, folder = self.trainer.step, self._planned.setup.steps, self._folder
        complete = self._world.once(lambda: folder.holds(checkpoint) and folder.has_results(step))
        if not (complete and self.trainer.finished):
            return False
        if self._world.rank == 0:
            if step < steps:
                whole, more = "train.stop_at", f"train.stop_at.{self.trainer.stopped_by or PATIENCE}"
            else:
                whole = f"all {steps} steps" if step == steps else f"{steps} steps are asked for"
                more = "train.epochs or train.steps"
            sys.stdout.write(
                f"{folder.path} is complete after step {step} ({whole}): nothing is left to train, and nothing was "
                f"changed; to train on, raise {more}\n"
            )
        return True

    @NOW.during("run folder")
    def begin(self) -> None:
        """Create the folder, and describe the run, unless that was done."""
        if self._begun:
            return
        world, setup, checkpoint = self._world, self._planned.setup, self._checkpoint
        self._create(self.trainer.step)
        self._begun = True
        if world.rank == 0:
            self._reporter = self._open_reporter()
            self._reporter.message(f"learning rate: {setup.rates_line}")
            if self.device:
                self._reporter.message(f"device: {self.device}")
            hint = faster(setup.network, setup.options, make_device("cpu", setup.options.kernels))
            if hint:
                self._reporter.message(hint)
            if world.size > 1 and not survivable():
                self._reporter.message(
                    f"a rank that dies ends the run, and --resume auto goes on from the newest of "
                    f"{self._folder.path / 'checkpoints'}; Open MPI's mpirun --with-ft ulfm goes on without it at once"
                )
            every = copy_interval(setup)
            if survivable() and every is not None and members_with_copies(setup) > 1:
                steps, part = (f"{every} steps" if every > 1 else "step"), 100 * part_of_copies(setup, every)
                self._reporter.message(
                    f"the others go on without a rank that dies: after every {steps} each rank copies what it owns to "
                    f"a buddy (about {part:.2g} % of the time)"
                )
            if checkpoint is not None:
                self._reporter.message(f"resumes after step {self.trainer.step} of {setup.steps}, from {checkpoint}")

    def _create(self, step: int, failure: Failure | None = None) -> None:
        """Create the folder. If it has this run's files, those stay that tell of steps up to this one. `failure` is the
        one after which the run goes on."""
        world, folder, checkpoint = self._world, self._folder, self._checkpoint
        continues = any(world.gather_objects(self._created))
        hosts = world.gather_objects(world.host)
        with world.agreement():
            if world.rank == 0:
                from nettorrent_mpi.cli.about_run import about_run, parts_before

                continues = continues or (checkpoint is not None and folder.holds(checkpoint))
                origin = folder.path if continues or checkpoint is None else checkpoint.absolute().parent.parent
                earlier = parts_before(origin, step)
                folder.create(to_yaml(_anywhere(self._planned.setup.config)), step if continues else None)
                source = None if checkpoint is None else str(checkpoint)
                self._about = about_run(
                    self._planned.setup,
                    self._arguments,
                    hosts,
                    world.library,
                    after=step,
                    source=source if failure is None else failure.source,
                    lost=None if failure is None else failure.line,
                    earlier=earlier,
                )
                folder.about(self._about)
        self._created = True

    def _open_reporter(self) -> Reporter:
        from nettorrent_mpi.cli.progress import Quiet, open_reporter  # on rank 0 only
        from nettorrent_mpi.cli.time_left import TimeLeft

        if self._quiet:
            return Quiet()
        setup, per_epoch = self._planned.setup, self._planned.setup.sampler.steps_per_epoch
        return open_reporter(
            sys.stdout,
            layout=setup.layout_line,
            ranks=self._world.size,
            environment=self.environment,
            output=str(self._folder.path),
            steps=setup.steps,
            steps_per_epoch=per_epoch,
            left=TimeLeft(setup.steps, setup.config.train.evaluate_every * per_epoch, after=self.trainer.step),
        )

    def go_on(self, failure: Failure) -> None:
        """Tell that ranks were lost, on the rank that is now the first one, and let metrics.jsonl end where the
        training goes on."""
        world, self._begun = self._world, True
        with world.agreement():
            if world.rank == 0:
                self._folder.lock(self._world.run)
        self._create(failure.resumed_from, failure)
        if world.rank == 0:
            ranks = f"{world.size} ranks" if world.size > 1 else "1 rank"
            if self._reporter is None:
                self._reporter = self._open_reporter()
            else:
                self._reporter.message(f"layout: {self._planned.setup.layout_line} on {ranks}")
            self._reporter.message(failure.line)

    def leave(self) -> None:
        """Let another rank show and write, if this one did: it has no place among the survivors."""
        reporter, self._reporter = self._reporter, None
        if reporter is not None:
            reporter.close()
        self._folder.close()

    @NOW.during("showing progress")
    def tell(self, record: Record) -> None:
        """Write a record to metrics.jsonl, and show it."""
        if self._reporter is None:
            return
        line = record.line()
        self._folder.metrics(line)
        (self._reporter.epoch if record.evaluated else self._reporter.report)(line)

    @NOW.during("results")
    def end(self) -> int:
        """Write the results, unless a signal has stopped the training; return the exit code."""
        stopped, diverged = self.trainer.stopped_by == SIGNAL, self.trainer.diverged
        traced = False if stopped else self._write_results()
        with self._world.agreement():
            if self._world.rank == 0:
                ended = "stopped" if stopped else "diverged" if diverged else "done"
                self._folder.about(self._about | {"ended": ended, "traced": traced})
        self._world.agree()
        if self._reporter is not None:
            if stopped:
                self._reporter.message(f"stopped by a signal after step {self.trainer.step}; continue with --resume")
            if diverged:
                self._reporter.message("the training diverged: its results are written, but of no use")
            elif not stopped:
                self._tell_what_next()
            self._reporter.close()
        return SIGNALLED if stopped else DIVERGED if diverged else 0

    def go_on_or_fail(self, error: Exception) -> None:
        """Let the training go on where the error says that ranks are lost. Otherwise, raise it, and say from where the
        run can go on."""
        try:
            self.trainer.recover(error)
        except NetTorrentError:
            self._fail()
            raise

    def _fail(self) -> None:
        """Restore the terminal after an error, and say from where the run can go on."""
        if self._reporter is not None:
            found = newest(self._folder.path)
            if found is not None:
                self._reporter.message(f"latest checkpoint: {found}; when the cause is mended, continue with --resume")
            self._reporter.close()

    def _tell_what_next(self) -> None:
        """Say where the model lies, and what can be done with it."""
        assert self._reporter is not None
        import shlex

        folder, setup = shlex.quote(str(self._folder.path)), self._planned.setup
        scored = setup.dataset.test is not None or len(setup.sampler.validation_rows) > 0
        evaluate = f"nettorrent evaluate {folder} scores it; " if scored else ""
        more = "more epochs" if setup.config.train.steps is None else "more steps"
        if self.trainer.stopped_by in (ACCURACY, PATIENCE):
            more = f"a higher train.stop_at.{self.trainer.stopped_by}"
        self._reporter.message(f"model: {self._folder.path / 'model.h5'}")
        self._reporter.message(
            f"next: {evaluate}nettorrent export {folder} --output weights.npz writes its weights; "
            f"the same command with --resume and {more} trains it on"
        )

    def _write_results(self) -> bool:
        """Write model.h5, trace.json and summary.json; return on rank 0 whether there is a trace."""
        world, trainer = self._world, self.trainer
        best = None if trainer.diverged else trainer.take_best()
        summary = trainer.summary() | ({} if best is None else {"best_step": best})
        if best is not None and self._reporter is not None:
            self._reporter.message(f"the best network, after step {best}, is kept as model.h5")
        trainer.save(self._folder.path / "model.h5")
        trace = trainer.trace()
        with world.agreement():
            if trace is not None:
                self._folder.trace(trace)
        peaks = world.gather_objects((peak_memory(), trainer.gpu_bytes))
        peak, on_gpu = (max(each) for each in zip(*peaks, strict=True))
        with world.agreement():
            if world.rank == 0:
                from nettorrent_mpi.cli.about_run import about_results

                more = about_results(self._planned, summary["samples_per_second"], peak, on_gpu)
                self._folder.summary(summary | more)
        return trace is not None
