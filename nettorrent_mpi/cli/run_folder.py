"""The run folder, written on rank 0: config.yaml, run.json, metrics.jsonl, summary.json, model.h5, trace.json.

The checkpoints in it are written by the trainer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.data.storage import check_folder, replacing, retried
from nettorrent_mpi.engine.checkpoint import lies_in, named_checkpoints
from nettorrent_mpi.engine.checkpoint_folder import checkpoints_in, remove_checkpoints, tidy
from nettorrent_mpi.engine.record import read_lines
from nettorrent_mpi.engine.run_files import write_whole, written
from nettorrent_mpi.engine.run_lock import RunLock
from nettorrent_mpi.engine.training_files import BEST
from nettorrent_mpi.plan.errors import OutputError, warn

AUTO = "auto"  # the value of --resume that continues if there is something to continue, and begins else
OURS = ("config.yaml", "run.json", "metrics.jsonl", "summary.json", "model.h5", BEST, "trace.json", "report.html")
# What `nettorrent evaluate RUN --confusion` writes about the network.
EVALUATION = ("confusion.csv", "confusion.svg", "classes.csv", "predictions.csv", "mistakes.svg")


class RunFolder:
    """A RunFolder writes the files of one run. Errors are OutputErrors that name the file and the remedy."""

    def __init__(self, path: str):
        self.path = Path(path)
        self._metrics: FileIO | None = None
        self._lines = bytearray()  # of metrics.jsonl that are still to be written
        self._warned = False
        self._lock: RunLock | None = None

    def lock(self, run: str) -> None:
        """Keep other runs from writing here. Raises an OutputError if one does."""
        self._lock = self._lock or RunLock(self.path, run)

    def close(self) -> None:
        """Write what is left of metrics.jsonl, and let other runs write here."""
        if self._metrics is not None:
            with suppress(OSError):
                self._append()
            self._metrics.close()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def check(self, overwrite: bool, results: Sequence[str] = (*OURS, "checkpoints")) -> None:
        """Raise an OutputError if the folder holds any of another run's `results`, or cannot be written to."""
        check_folder(self.path)
        there = [name for name in results if (self.path / name).exists()]
        if there and not overwrite:
            text = (
                f"{self.path} holds another run's results ({', '.join(there)}); choose another folder with --output DIR"
            )
            if "checkpoints" in results:
                raise OutputError(f"{text}, replace them with --overwrite, or continue it with --resume")
            raise OutputError(f"{text}, or replace them with --overwrite")

    def has_results(self, step: int) -> bool:
        """Whether it holds the results of a run that has come to its end after this step."""
        try:
            summary = parsed((self.path / "summary.json").read_bytes())
            return bool(summary["steps"] == step) and (self.path / "model.h5").exists()
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def holds(self, checkpoint: Path) -> bool:
        """Whether it is one of this folder's own checkpoints."""
        return lies_in(checkpoint, self.path / "checkpoints")

    def starting_point(self, resume: str | None, *, overwrite: bool) -> Path | None:
        """Return the checkpoint, or the folder of checkpoints, from which a run in this folder continues; None: it
        begins. `resume` is the value of the option: None without it, empty where it stands alone.

        Raises an OutputError where nothing is to continue from, or where another run's results would be lost.
        """
        if resume == AUTO and not checkpoints_in(self.path / "checkpoints"):
            self.check(overwrite, results=("summary.json", "model.h5"))
            return None
        if resume is None:
            self.check(overwrite)
            return None
        place = self.path if resume in ("", AUTO) else Path(resume)
        if resume == "" and not checkpoints_in(self.path / "checkpoints"):
            raise OutputError(f"{self.path} holds no checkpoint to resume from; start the run without --resume")
        if not self.holds(named_checkpoints(place)[-1]):
            self.check(overwrite)
        elif overwrite:
            raise OutputError(
                f"--overwrite would replace the run in {self.path} that --resume continues: leave one out"
            )
        return place

    def create(self, config: str, after: int | None = None) -> None:
        """Create the folder, write config.yaml and open metrics.jsonl.

        A new run removes an earlier one's files, once its own configuration could be written. One that resumes after
        step `after` keeps them until its own take their places, and the lines of metrics.jsonl up to that step; but
        what was found about the network (EVALUATION) will not hold any more.
        """
        checkpoints, metrics = self.path / "checkpoints", self.path / "metrics.jsonl"

        def body() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            told = [] if after is None else self._told(metrics, after)
            if after is not None and checkpoints.is_dir():  # better now than after an epoch
                write_whole(checkpoints / "try", "")
                (checkpoints / "try").unlink()
            with replacing(self.path / "config.yaml") as part:
                part.write_text(config, encoding="utf-8")
                if after is None:
                    for name in OURS:
                        (self.path / name).unlink(missing_ok=True)
                    remove_checkpoints(checkpoints)
                for name in EVALUATION:
                    (self.path / name).unlink(missing_ok=True)
            write_whole(metrics, "".join(told))
            if self._metrics is not None:
                self._metrics.close()
            self._metrics = metrics.open("ab", buffering=0)
            with suppress(OSError):  # what a run that was killed has left
                for part in (self.path / f"{name}.part" for name in OURS):
                    part.unlink(missing_ok=True)
                tidy(checkpoints)

        self._guard(body, "config.yaml")

    def _told(self, metrics: Path, after: int) -> list[str]:
        """Return the undamaged lines of metrics.jsonl up to step `after`."""
        if not metrics.exists():
            return []
        lines, damaged = read_lines(metrics.read_bytes())
        if damaged:
            many = f"{damaged} line{'s' if damaged > 1 else ''}"
            warn(f"{metrics}: {many} could not be read, and the resumed run goes on without", alone=True)
        return [line.decode() + "\n" for line, record in lines if record["step"] <= after]

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, which can be read immediately. A disk that is full for a while delays it."""
        if self._lock is not None:
            self._lock.check()
        self._lines += json.dumps(record).encode() + b"\n"
        try:
            self._append()
        except OSError as error:
            if not self._warned:
                text = f"{self.path / 'metrics.jsonl'} cannot be written ({error.strerror or error}); training goes on"
                warn(text, alone=True)
            self._warned = True

    def _append(self) -> None:
        assert self._metrics is not None
        while self._lines:
            del self._lines[: self._metrics.write(self._lines)]

    def about(self, about: Mapping[str, Any]) -> None:
        """Write run.json, which says what runs here and where, from its beginning on."""
        self._guard(lambda: write_whole(self.path / "run.json", json.dumps(about, indent=1) + "\n"), "run.json")

    def trace(self, trace: str) -> None:
        """Write trace.json."""
        self._guard(lambda: write_whole(self.path / "trace.json", trace), "trace.json")

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, the last file of a run: if it is there, the run is complete."""

        def body() -> None:
            self._append()
            write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

        self._guard(body, "summary.json")

    def _guard(self, body: Callable[[], None], name: str) -> None:
        with written(self.path / name):
            retried(body)


@cache
def commit(*, dirty: bool = False) -> str | None:
    """Return the commit of the checkout that this package runs from; None if it runs from elsewhere. With `dirty`, git
    is asked, and it ends in -dirty where files were changed."""
    root = Path(__file__).resolve().parents[2]
    if not dirty:
        return _head(root)
    import subprocess

    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", errors="replace", timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _head(root: Path) -> str | None:
    """Read which commit is checked out in a folder: ranks that start begin no process for it."""
    try:
        git = root / ".git"
        if git.is_file():  # of a worktree
            git = root / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return head
        name, shared = head.removeprefix("ref:").strip(), git / "commondir"
        common = git / shared.read_text(encoding="utf-8").strip() if shared.exists() else git
        if (common / name).exists():
            return (common / name).read_text(encoding="utf-8").strip()
        lines = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)
    except (OSError, UnicodeDecodeError):
        return None
