"""Trainings for the benchmarks of exchanges: on this machine, or on hosts joined by links of a given rate."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nettorrent_mpi.cores import cores_of_node
from nettorrent_mpi.speedup.runs import left_in, run

HOSTS = "benchmarks/hosts"


@dataclass(frozen=True)
class Here:
    """Ranks on this machine, which communicate through its memory."""

    mpirun: str

    def words(self, ranks: int, sent: str) -> list[str]:
        """Return the launcher's words before the command; `sent` is for launchers that count bytes."""
        more = ["--oversubscribe"] if ranks > cores_of_node(os.environ) else []
        return [self.mpirun, *more, "-n", str(ranks)]


@dataclass(frozen=True)
class Hosts:
    """A host for each rank; `rate` is its link's, None without a limit. Needs root."""

    mpirun: str
    rate: str | None

    def words(self, ranks: int, sent: str) -> list[str]:
        limit = ["-r", self.rate] if self.rate else []
        return [HOSTS, "-n", str(ranks), *limit, "-b", sent, "-m", self.mpirun, "--"]


Launcher = Here | Hosts


@dataclass(frozen=True)
class Trained:
    """The results of a training in its run folder, and the bytes that each host sent over its link (none without
    links)."""

    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    trace: str | None
    sent: list[int]

    @property
    def by_epoch(self) -> list[tuple[float, float]]:
        """(epoch, accuracy on the test rows) wherever it was measured."""
        return [
            (record["epoch"], record["test_accuracy"])
            for record in self.metrics
            if record.get("test_accuracy") is not None
        ]


TRAIN = ("nettorrent_mpi.train",)


def train(
    config: str, settings: Mapping[str, str], ranks: int, launcher: Launcher, module: Sequence[str] = TRAIN
) -> Trained:
    """Run one training with the settings applied to a configuration; ends the program if it fails. `module` takes the
    arguments of nettorrent_mpi.train, after words of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output, sent = Path(folder, "run"), Path(folder, "sent")
        command = [*launcher.words(ranks, str(sent)), *training(config, settings, str(output), module)]
        run(command)
        return Trained(*left_in(output), read_sent(sent))


def training(config: str, settings: Mapping[str, str], output: str, module: Sequence[str] = TRAIN) -> list[str]:
    """Return the training command of this package, without its launcher."""
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", *module, config, "--output", output, "--overwrite", *sets]


def program(words: Sequence[str], ranks: int, launcher: Launcher) -> tuple[str, list[int]]:
    """Run another command; return (standard output, bytes that each host sent)."""
    with tempfile.TemporaryDirectory() as folder:
        sent = Path(folder, "sent")
        output = run([*launcher.words(ranks, str(sent)), *words])
        return output, read_sent(sent)


def read_sent(path: Path) -> list[int]:
    """Return the bytes of each host from the file that benchmarks/hosts wrote."""
    return [int(line.split()[1]) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def layout(replicas: int, layers: int) -> str:
    """Return replicas of one rank each, for a network of `layers` weight layers."""
    return f"{{replicas: {replicas}, swarms: [{{layers: {layers}, rows: 1, cols: 1}}]}}"


def in_turns(sides: Mapping[str, Callable[[], float]], repeats: int, unit: str) -> dict[str, dict[str, Any]]:
    """Measure every side `repeats` times in turns, so that other load on the machine affects them alike."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name, measure in sides.items():
            figures[name].append(measure())
            print(f"turn {turn + 1}  {name}: {figures[name][-1]:,.2f} {unit}", flush=True)
    return {name: summarize(values) for name, values in figures.items()}


def summarize(figures: list[float]) -> dict[str, Any]:
    """Return the median and the spread, (largest - smallest) / median."""
    middle = median(figures)
    return {"figures": figures, "median": middle, "spread": (max(figures) - min(figures)) / middle}
