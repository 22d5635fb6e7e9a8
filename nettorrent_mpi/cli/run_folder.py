"""The run folder, written on rank 0: config.yaml, metrics.jsonl, summary.json, model.h5, trace.json.

The checkpoints in it are written by the trainer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from nettorrent_mpi.engine.run_files import write_whole, written
from nettorrent_mpi.plan.errors import OutputError

OURS = ("config.yaml", "metrics.jsonl", "summary.json", "model.h5", "trace.json")


class RunFolder:
    """A RunFolder writes the files of one run. Errors are OutputErrors that name the file and the remedy."""

    def __init__(self, path: str):
        self.path = Path(path)
        self._metrics: TextIO | None = None

    def check(self, overwrite: bool) -> None:
        """Raise an OutputError if the folder holds another run's results, or is a file."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file, not a folder; choose another with --output DIR")
        there = [name for name in (*OURS, "checkpoints") if (self.path / name).exists()]
        if there and not overwrite:
            raise OutputError(
                f"{self.path} holds another run's results ({', '.join(there)}); "
                "choose another folder with --output DIR, replace them with --overwrite, or continue it with --resume"
            )

    def create(self, config: str, after: int | None = None) -> None:
        """Create the folder, write config.yaml and open metrics.jsonl.

        A new run removes an earlier one's files; one that resumes after step `after` keeps them, and the lines of
        metrics.jsonl up to that step.
        """

        def body() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            metrics = self.path / "metrics.jsonl"
            told = metrics.read_text().splitlines(keepends=True) if after is not None and metrics.exists() else []
            for name in OURS:
                (self.path / name).unlink(missing_ok=True)
            if after is None and (self.path / "checkpoints").is_dir():
                for path in (self.path / "checkpoints").glob("step-*.h5"):
                    path.unlink()
                shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
            (self.path / "config.yaml").write_text(config)
            self._metrics = metrics.open("w", buffering=1)
            self._metrics.writelines(
                line for line in told if line.endswith("\n") and json.loads(line)["step"] <= (after or 0)
            )

        self._guard(body, "config.yaml")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, which can be read immediately."""

        def body() -> None:
            assert self._metrics is not None
            self._metrics.write(json.dumps(record) + "\n")

        self._guard(body, "metrics.jsonl")

    def trace(self, trace: str) -> None:
        """Write trace.json."""
        self._guard(lambda: write_whole(self.path / "trace.json", trace), "trace.json")

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, the last file of a run: if it is there, the run is complete."""

        def body() -> None:
            write_whole(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
            if self._metrics is not None:
                self._metrics.close()

        self._guard(body, "summary.json")

    def _guard(self, body: Callable[[], None], name: str) -> None:
        with written(self.path / name):
            body()


def commit(*, dirty: bool = False) -> str | None:
    """Return the commit of the checkout that this package runs from; None if it runs from elsewhere. With `dirty` it
    ends in -dirty where files were changed."""
    import subprocess

    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*"]
    command += ["--dirty"] if dirty else []
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
