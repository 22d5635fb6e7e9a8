"""The folder of a study. Jobs share it without a server: what a group takes, it takes by making a folder.

search.yaml           what is searched, with its base inside
study.json            ... and the other results, which each job writes at its end (tune/findings.py)
trial-0007/           a run folder; trial.json says what was tried and what came of it, lock.json who trains it now
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nettorrent_mpi.config.search_file import Search, differences, read_plain
from nettorrent_mpi.data.storage import check_folder
from nettorrent_mpi.engine.run_files import write_whole, written
from nettorrent_mpi.engine.run_lock import LOCK, RunLock, in_use
from nettorrent_mpi.plan.errors import ConfigError, InUseError, OutputError
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.tune.samplers import point
from nettorrent_mpi.tune.trials import Trial

TRIAL, SEARCH = "trial.json", "search.yaml"
PATIENCE = 120.0  # seconds in which another job may write the files of the whole study
_FOLDER = re.compile(r"trial-(\d{4,})\Z")


@dataclass(frozen=True)
class Claimant:
    """A Claimant is a group of ranks that takes trials: its MPI run, its number, of how many, and its size."""

    job: str
    number: int
    groups: int
    ranks: int


class Study:
    """A Study takes trials for a group, one at a time, and knows those that have ended. Each rank has one, and the
    first of the group uses it."""

    def __init__(self, folder: Path, search: Search):
        self.folder, self._search = folder, search
        self._done: dict[int, Trial] = {}
        self._passed: set[int] = set()  # trials that others train, elsewhere
        self._lock: RunLock | None = None  # of the trial that is taken

    def open(self) -> None:
        """Make the folder. Raises an OutputError if it holds something else."""
        path = self.folder / SEARCH
        check_folder(self.folder)
        with self.alone(), written(path):
            if path.exists():
                self._compare(path)
            elif any(not entry.name.startswith(LOCK) for entry in self.folder.iterdir()):
                raise OutputError(f"{self.folder} holds other files than a study's; choose another with --output DIR")
            write_whole(path, self._search.text())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other job write the files of the whole study inside the `with` block."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                lock = RunLock(self.folder)
                break
            except InUseError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        with lock:
            yield

    def _compare(self, path: Path) -> None:
        """Raise an OutputError if the folder holds the study of another search; its number of trials may differ."""
        try:
            before = read_plain(path.read_text(encoding="utf-8"), str(path))
        except (ConfigError, UnicodeDecodeError):
            before = {}
        differ = differences(before, self._search.plain())
        if differ:
            raise OutputError(
                f"{self.folder} holds the study of another search ({', '.join(differ)} differ); choose another folder "
                "with --output DIR, or remove it"
            )

    def trials(self) -> list[Trial]:
        """Return the trials so far, in order; those that run now, or were left, among them."""
        running = []
        for number in self._numbers():
            if number not in self._done:
                trial = self._read(number)
                if trial is not None and trial.done:
                    self._done[number] = trial
                elif trial is not None:
                    running.append(trial)
        return sorted([*self._done.values(), *running], key=lambda each: each.number)

    def claim(self, group: Claimant) -> Trial | None:
        """Take a trial: one that a job has left, the next new one, or one of a job on another machine that shows no
        sign of life, for which this waits. None: nothing is left to take."""
        for number in self._open_numbers(group):
            trial = self._take(number, group)
            if trial is not None:
                return trial
        self._passed.clear()
        return None

    def _open_numbers(self, group: Claimant) -> Iterator[int]:
        """Yield the numbers of trials that may be taken."""
        trials = self.trials()
        ended = {trial.number for trial in trials if trial.done}
        named = {trial.number: trial.job for trial in trials}
        begun = [number for number in self._numbers() if number not in ended]
        doubtful = [number for number in begun if number not in self._passed]
        # A folder without a file is probably being taken at this moment, and can wait.
        left = [number for number in doubtful if number in named and not in_use(self.folder_of(number))]
        first = group.number * len(left) // group.groups  # the groups of a job begin at different ones
        yield from [*left[first:], *left[:first]]
        there = {*ended, *begun}
        yield from (n for n in range(self._search.trials) if n not in there and self._make(n))
        for number in doubtful:
            if number not in left and named.get(number) != group.job:
                yield number
                self._passed.add(number)

    def end(self, trial: Trial) -> None:
        """Write what came of the trial, and give its folder back; its checkpoints are not needed any more."""
        folder = self.folder_of(trial.number)
        if self._lock is not None:
            self._lock.check()
        with written(folder / TRIAL):
            write_whole(folder / TRIAL, trial.text())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Give the folder of the trial back. If it has not ended, it can be taken again."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def folder_of(self, number: int) -> Path:
        """Return the run folder of a trial."""
        return self.folder / f"trial-{number:04}"

    def _numbers(self) -> list[int]:
        with written(self.folder):
            found = (_FOLDER.match(entry.name) for entry in self.folder.iterdir())
            return sorted(int(each[1]) for each in found if each)

    def _make(self, number: int) -> bool:
        """Make the folder of a new trial; False if another group has."""
        folder = self.folder_of(number)
        with written(folder):
            try:
                folder.mkdir()
            except FileExistsError:
                return False
        return True

    def _take(self, number: int, group: Claimant) -> Trial | None:
        """Hold the folder of a trial and say so in its file; None if another group was faster."""
        folder = self.folder_of(number)
        try:
            lock = RunLock(folder)
        except InUseError:
            return None
        before = self._read(number)
        if before is not None and before.done:
            lock.release()
            return None
        others = [trial for trial in self.trials() if trial.number != number]
        chosen = point(self._search, number, others) if before is None else before.point
        trial = Trial(number, chosen, group.job, group.number, group.groups, group.ranks, time.time())
        with written(folder / TRIAL):
            write_whole(folder / TRIAL, trial.text())
        self._lock = lock
        return trial

    def _read(self, number: int) -> Trial | None:
        path = self.folder_of(number) / TRIAL
        with written(path):
            try:
                return Trial.read(path.read_bytes())
            except FileNotFoundError:
                return None
