"""Measured programs: started one after another, with their results."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nettorrent_mpi.comm.processes import ending_with_this
from nettorrent_mpi.plan.errors import ChildError
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.speedup.machine import Launcher, environment

LAST_LINES = 12  # lines of a failed program's output that are shown
PROGRAM = (sys.executable, "-m", "nettorrent_mpi")
PATIENCE = 10  # seconds that a program has to stop


@dataclass(frozen=True)
class Trained:
    """The results of a training of this package in its run folder."""

    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    trace: str | None


def run(command: Sequence[str], threads: int = 1) -> str:
    """Return the standard output of a program. Raises ChildError if it fails; stopping this program stops it, too."""
    with subprocess.Popen(
        command,
        env=environment(threads),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # so that all processes of the launcher can be stopped
        preexec_fn=ending_with_this(),  # noqa: PLW1509 (it takes no lock)
    ) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            _stop(process)
            raise
    if process.returncode:
        lines = [line for line in f"{out}\n{err}".splitlines() if line.strip()]
        raise ChildError(shlex.join(command), process.returncode, lines[-LAST_LINES:])
    return out


def _stop(process: subprocess.Popen[str]) -> None:
    """Stop a launcher, which then ends its ranks; remaining processes of its session are killed."""
    process.terminate()
    try:
        process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def train(config: Path, ranks: int, launcher: Launcher, program: Sequence[str] = PROGRAM) -> Trained:
    """Train the configuration in this file on `ranks` ranks, in a temporary run folder. `program` is this package's
    command line."""
    with tempfile.TemporaryDirectory(prefix="nettorrent-") as folder:
        output = Path(folder, "run")
        run(launcher.command(ranks, training(config, output, program)))
        return Trained(*left_in(output))


def left_in(output: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str | None]:
    """Return (summary, metrics, trace) of a run folder."""
    trace = output / "trace.json"
    return (
        json.loads((output / "summary.json").read_text(encoding="utf-8")),
        [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()],
        trace.read_text(encoding="utf-8") if trace.exists() else None,
    )


def training(config: Path, output: Path, program: Sequence[str] = PROGRAM) -> list[str]:
    """Return the training command, without its launcher."""
    return [*program, "train", str(config), "--output", str(output)]


def torch_peer(config: Path, options: Sequence[str], threads: int) -> dict[str, Any]:
    """Return torch_peer.py's output for the configuration in this file."""
    program = [sys.executable, "-m", "nettorrent_mpi.speedup.torch_peer", str(config)]
    lines = run([*program, "--threads", str(threads), *options], threads).splitlines()
    told: dict[str, Any] = json.loads(lines[-1])
    return told


def curve_of(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    """Return (seconds since training began, epoch, accuracy) of each evaluation: on the validation rows, which stop_at
    uses, or on the test set if none are held back."""
    found = []
    for record in metrics:
        accuracy = record.get("validation_accuracy")
        accuracy = record.get("test_accuracy") if accuracy is None else accuracy
        if accuracy is not None:
            found.append((record["time"], record["epoch"], accuracy))
    return found
