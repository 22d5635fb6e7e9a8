"""The run folder: config.yaml, metrics.jsonl, summary.json, model.h5, trace.json. Rank 0 writes it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from nettorrent_mpi.engine.model_file import write_model
from nettorrent_mpi.nn.backend import Array
from nettorrent_mpi.plan.errors import OutputError

OURS = ("config.yaml", "metrics.jsonl", "summary.json", "model.h5", "trace.json")


class RunFolder:
    """One run's folder. Whatever cannot be written is an OutputError that names the file and the remedy."""

    def __init__(self, path: str):
        self.path = Path(path)
        self._metrics: TextIO | None = None

    def check(self, overwrite: bool) -> None:
        """OutputError if the folder holds another run's results, or cannot be a folder at all."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file, not a folder; choose another with --output DIR")
        there = [name for name in OURS if (self.path / name).exists()]
        if there and not overwrite:
            raise OutputError(
                f"{self.path} holds another run's results ({', '.join(there)}); "
                "choose another folder with --output DIR, or replace them with --overwrite"
            )

    def create(self, config: str) -> None:
        """Make the folder, remove an earlier run's files, write config.yaml and open metrics.jsonl."""

        def body() -> None:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in OURS:
                (self.path / name).unlink(missing_ok=True)
            (self.path / "config.yaml").write_text(config)
            self._metrics = (self.path / "metrics.jsonl").open("w", buffering=1)

        self._guard(body, "config.yaml")

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, there to be read at once."""

        def body() -> None:
            assert self._metrics is not None
            self._metrics.write(json.dumps(record) + "\n")

        self._guard(body, "metrics.jsonl")

    def model(self, arrays: Mapping[str, Array], model: str) -> None:
        """model.h5."""
        self._guard(lambda: write_model(self.path / "model.h5", arrays, model), "model.h5")

    def trace(self, trace: str) -> None:
        """trace.json."""
        self._guard(lambda: self._write("trace.json", trace), "trace.json")

    def summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json, the last file of a run: when it is there, the run is complete."""

        def body() -> None:
            self._write("summary.json", json.dumps(summary, indent=2) + "\n")
            if self._metrics is not None:
                self._metrics.close()

        self._guard(body, "summary.json")

    def _write(self, name: str, text: str) -> None:
        """Write the file whole or not at all."""
        part = self.path / f"{name}.part"
        try:
            part.write_text(text)
            part.replace(self.path / name)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def _guard(self, body: Callable[[], None], name: str) -> None:
        try:
            body()
        except OSError as error:
            file = self.path / name
            full = error.errno == errno.ENOSPC or "No space left" in str(error) or error.errno == errno.EDQUOT
            if full:
                text = f"{file} could not be written: the disk is full; free some space or choose another --output DIR"
            else:
                text = (
                    f"{file} could not be written ({error.strerror or error}); choose another folder with --output DIR"
                )
            raise OutputError(text) from error
