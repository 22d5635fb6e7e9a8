"""How a run is stopped: by signals to its launcher, by Ctrl-C; and unplanned rests change nothing."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONG = """\
data: {name: synthetic, rows: 64, test_rows: 8, shape: [6], classes: 3}
model: {layers: [{linear: {units: 8, activation: relu}}, {linear: 3}]}
train: {steps: 10000000, batch_size: 16, report_every: 100, evaluate_every: 10000000}
checkpoint: {every_epochs: null}
kernels: numpy
"""
Installed = Callable[[str], tuple[list[str], dict[str, str]]]
slow = pytest.mark.slow


class Started:
    """A long training in a session of its own, from its first record on."""

    def __init__(self, folder: Path, launcher: list[str], env: dict[str, str], terminal: bool = False):
        config, self.run = folder / "long.yaml", folder / "run"
        config.write_text(LONG)
        command = [*launcher, sys.executable, "-m", "nettorrent_mpi.train", str(config), "--output", str(self.run)]
        self.terminal, other = pty.openpty()
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **env}
        self.told = (folder / "told").open("w+b")
        out = other if terminal else self.told
        if terminal:  # the terminal's Ctrl-C goes to all processes in the foreground
            command = ["setsid", "--ctty", "--wait", *command]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=other, stdout=out, stderr=out, start_new_session=not terminal
        )
        os.close(other)
        until = time.monotonic() + 60
        while not (self.run / "metrics.jsonl").exists() or not (self.run / "metrics.jsonl").stat().st_size:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < until, self.text()
            time.sleep(0.05)

    def end(self) -> int:
        """Wait for the end, at most 20 s; return the exit code."""
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            os.close(self.terminal)

    def text(self) -> str:
        self.told.seek(0)
        return self.told.read().decode()

    @property
    def checkpoints(self) -> list[str]:
        return [path.name for path in (self.run / "checkpoints").glob("step-*")]


@pytest.mark.parametrize(
    ("mpi", "number"),
    [
        ("openmpi", signal.SIGUSR1),
        ("mpich", signal.SIGTERM),
        pytest.param("openmpi", signal.SIGUSR2, marks=slow),
        pytest.param("mpich", signal.SIGUSR1, marks=slow),
        pytest.param("mpich", signal.SIGINT, marks=slow),
    ],
)
def test_launchers_that_pass_a_signal_on(
    installed_mpi: Installed, tmp_path: Path, mpi: str, number: signal.Signals
) -> None:
    launcher, env = installed_mpi(mpi)
    started = Started(tmp_path, [*launcher, "-n", "2"], env)
    os.kill(started.process.pid, number)
    assert started.end() == 75, started.text()
    assert len(started.checkpoints) == 1, started.text()
    assert "stopped by a signal after step" in started.text()


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_at_a_terminal(tmp_path: Path, times: int) -> None:
    """The first Ctrl-C stops the run with a checkpoint, the second ends it at once."""
    started = Started(tmp_path, [], {}, terminal=True)
    for _ in range(times):
        os.write(started.terminal, b"\x03")
        time.sleep(0.02)  # together they would be one
    if times == 1:
        assert started.end() == 75
        assert len(started.checkpoints) == 1
    else:
        assert started.end() in (75, 130)  # 75: it had stopped already
