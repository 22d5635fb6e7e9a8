"""The command `nettorrent tune`: a job runs the trials of a study on all ranks, which are divided into groups."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nettorrent_mpi.api import watched
from nettorrent_mpi.cli.arguments import parse
from nettorrent_mpi.cli.ranks import Ranks
from nettorrent_mpi.comm.activity import NOW, OUTSIDE
from nettorrent_mpi.comm.failures import lost
from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.config.search_file import Search, read_search
from nettorrent_mpi.config.search_space import Point
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.engine.setup import set_up
from nettorrent_mpi.engine.signals import Signals
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.errors import SIGNALLED, ConfigError, DataError, LaunchError, UserError, warn
from nettorrent_mpi.tune import findings, samplers
from nettorrent_mpi.tune.attempt import Attempt, in_words
from nettorrent_mpi.tune.study import Claimant, Study
from nettorrent_mpi.tune.trials import COMPLETE, FAILED, RUNNING, Accuracies, Trial, point_in_words, prunes

PAUSE = 0.05  # seconds from one look at the other groups to the next


def tune(arguments: Sequence[str], chosen: str, signals: Signals) -> int:
    """Run `nettorrent tune` on all ranks; returns the exit code."""
    with Ranks() as ranks:
        job = ranks.complete(lambda: _start(ranks, arguments, signals))
        ranks.code = job.run()
    return ranks.code


def _start(ranks: Ranks, arguments: Sequence[str], signals: Signals) -> TuneJob:
    """Return the job that the command line asks for. All ranks call."""
    world = ranks.world
    with world.agreement():
        args = parse(arguments)
        groups = world.size if args.groups is None else args.groups
        if not 1 <= groups <= world.size:
            there = f"{world.size} ranks" if world.size > 1 else "1 rank"
            raise LaunchError(f"--groups {groups}: there are {there}, and each group has at least one")
    world.same("command line", " ".join(arguments))
    search, config = world.once(lambda: _read(args))
    watched(world, config)
    study = Study(Path(search.sections.output or "runs/search"), search)
    world.once(study.open)
    spans = [span(world.size, groups, number) for number in range(groups)]
    number = next(number for number, each in enumerate(spans) if each.start <= world.rank < each.stop)
    group = world
    if groups > 1:
        members = world.subgroup(range(*spans[number]))
        group = World(members.comm)
        members.free()
        ranks.owns(group.free, group.unwatch)
    me = Claimant(world.run, number, groups, group.size)
    return TuneJob(ranks, group, me, search, study, signals, arguments)


def _read(args: argparse.Namespace) -> tuple[Search, Config]:
    """Read the search, and the configuration of its first trial; look at its data, which all trials need."""
    search = read_search(args.search, args.changes)
    if args.output is not None:
        search = replace(search, sections=replace(search.sections, output=args.output))
    samplers.check(search)
    config = search.config(search.first)
    try:
        classes = set_up(config, 1, device="cpu").dataset.classes
    except DataError:
        raise
    except UserError:  # of this trial alone, perhaps
        return search, config
    if classes is None:
        raise ConfigError(f"data set {config.data.name} has no classes, so there is no accuracy to compare trials by")
    return search, config


class TuneJob:
    """A TuneJob is this rank's part of a job: it trains trials with its `group` until none is left, waits for the other
    groups, and tells what all trials show."""

    def __init__(
        self,
        ranks: Ranks,
        group: World,
        me: Claimant,
        search: Search,
        study: Study,
        signals: Signals,
        arguments: Sequence[str],
    ):
        self._ranks, self._world, self._group, self._me = ranks, ranks.world, group, me
        self._search, self._study, self._signals, self._arguments = search, study, signals, arguments
        self._attempt: Attempt | None = None
        ranks.owns(self._close, self._abandon)

    def run(self) -> int:
        """Run the trials; returns the exit code."""
        world, study = self._world, self._study
        if world.rank == 0:
            done = sum(trial.done for trial in study.trials())
            sizes = sorted({span(world.size, self._me.groups, each).size for each in range(self._me.groups)})
            groups = f"{self._me.groups} groups" if self._me.groups > 1 else "1 group"
            _tell(
                f"study: {study.folder}, {self._search.sections.sampler}, {done} of {self._search.trials} trials done; "
                f"{groups} of {' or '.join(map(str, sizes))} rank{'s' if sizes[-1] > 1 else ''}"
            )
        self._work()
        stopped = self._wait()
        with world.agreement():
            complete = world.rank != 0 or findings.write(study, self._search)
        if stopped and world.rank == 0:
            _tell("stopped by a signal; the same command goes on")
        return SIGNALLED if stopped else 0 if all(world.gather_objects(complete)) else 1

    def _work(self) -> None:
        """Train trials until there are none, or a signal stops this group: also where the group loses ranks, which the
        training itself survives, and here what is around it."""
        group = self._group
        while True:
            try:
                while not any(group.gather_objects(self._signals.asked)) and self._next():
                    group.agree()
                group.agree()
                return
            except Exception as error:
                if not lost(error, group):
                    raise
                self._abandon()
                group.revoke()
                gone = group.shrink()
                self._me = replace(self._me, ranks=group.size)
                if group.rank == 0:
                    warn(f"without rank {', '.join(map(str, gone))}, its group begins its trial again", alone=True)

    def _next(self) -> bool:
        """Train the next trial; False: there is none."""
        group, study = self._group, self._study
        with NOW.during(OUTSIDE):  # it may wait for the sign of life of another job
            trial = group.once(lambda: study.claim(self._me))
        if trial is None:
            return False
        ended = self._train(trial)
        with group.agreement():
            if group.rank == 0 and ended.done:
                study.end(ended)
                self._tell_of(ended)
            elif group.rank == 0:
                study.release()
        return True

    def _train(self, trial: Trial) -> Trial:
        """Train a trial; return what came of it, with the state RUNNING if a signal has stopped it."""
        group, folder = self._group, self._study.folder_of(trial.number)
        config = group.once(lambda: self._config(trial.point, folder))
        if isinstance(config, str):
            return replace(trial, state=FAILED, reason=config, ended=time.time())
        self._attempt = attempt = Attempt(group, folder, self._signals, self._ends_early, self._arguments)
        attempt.train(config)
        self._attempt = None
        return replace(
            trial,
            state=attempt.state,
            accuracy=attempt.accuracy if attempt.state == COMPLETE else None,
            test_accuracy=attempt.test_accuracy,
            accuracies=tuple(attempt.accuracies),
            epochs=attempt.epochs,
            reason=attempt.reason,
            ended=None if attempt.state == RUNNING else time.time(),
        )

    def _config(self, point: Point, folder: Path) -> Config | str:
        """Return the configuration of a trial, or what is wrong about it."""
        try:
            return self._search.config(point, str(folder))
        except ConfigError as error:
            return in_words(error)

    def _ends_early(self, accuracies: Accuracies) -> bool:
        """Whether a trial with these accuracies is to be ended."""
        rule = self._search.sections.prune
        return rule is not None and prunes(rule, accuracies, self._study.trials())

    def _wait(self) -> bool:
        """Wait until all groups are done; return whether a signal has stopped one. Trials of ranks that are lost are
        trained before."""
        world = self._world
        while True:
            try:
                with NOW.during(OUTSIDE):
                    stopped = Pending(world, [float(self._signals.asked)])
                    while not stopped.done():
                        time.sleep(PAUSE)
                return bool(stopped.sums()[0])
            except Exception as error:
                if not lost(error, world):
                    raise
                self._work()
                world.revoke()
                world.shrink()

    def _tell_of(self, trial: Trial) -> None:
        """Show one line about a trial that has ended."""
        trials = [each for each in self._study.trials() if each.done]
        best = findings.best(trials)
        found = {COMPLETE: f"{100 * (trial.accuracy or 0):.2f} %"}.get(trial.state, trial.state)
        words = [
            f"{len(trials)}/{self._search.trials}",
            f"trial {trial.number}",
            found,
            f"{trial.seconds:.1f} s",
            point_in_words(trial.point),
            "(the best so far)" if best == trial else "",
            trial.reason or "",
        ]
        _tell("  ".join(word for word in words if word))

    def _close(self) -> None:
        if self._attempt is not None:
            self._attempt.close()
        self._study.release()

    def _abandon(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.abandon()
        self._study.release()


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
