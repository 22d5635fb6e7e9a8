"""A rank that is slowed down from outside is named by the records and by `watch`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, kill_session

# An epoch has 16 steps: all records are about as many.
CONFIG = """\
data: {name: synthetic, rows: 4096, test_rows: 0, shape: [512], classes: 10}
model: {layers: [{linear: {units: 1024, activation: relu}}, {linear: {units: 512, activation: relu}}, {linear: 10}]}
train: {steps: 100000, batch_size: 256, report_every: 16, schedule: constant}
checkpoint: {every_epochs: null}
watchdog: none
"""
STOPPED, RUNS = 0.08, 0.02  # seconds that the slow rank is stopped, and then runs
SLOW = 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["{swarms: [{layers: 3, rows: 4}]}", "{replicas: 2, swarms: [{layers: 1}, {layers: 2}]}"]
)
def test_a_slow_rank_is_named_within_two_reports(
    installed_mpi: Callable[[str], tuple[list[str], dict[str, str]]], tmp_path: Path, layout: str
) -> None:
    launcher, environment = installed_mpi("openmpi")
    config, run = tmp_path / "c.yaml", tmp_path / "run"
    config.write_text(CONFIG + f"layout: {layout}\n")
    program = ["-m", "nettorrent_mpi.train", config, "--output", run]
    command = [*launcher, "-n", "4", sys.executable, *map(str, program)]
    settings = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    process = subprocess.Popen(
        command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_for(lambda: len(records(run)) >= 2)
        slow = rank_process(process.pid, SLOW)
        before = len(records(run))
        until = time.monotonic() + 240
        # The report under way when the slowness begins is about the time before, too.
        while len(records(run)) < before + 3:
            assert time.monotonic() < until, "no records come any more"
            os.kill(slow, signal.SIGSTOP)
            time.sleep(STOPPED)
            os.kill(slow, signal.SIGCONT)
            time.sleep(RUNS)
        os.kill(slow, signal.SIGSTOP)  # so that no record of a time when nobody is slow follows
        named = [record["ranks"]["slowest"] for record in records(run)[before : before + 3]]
        assert named[1:] == [SLOW, SLOW], "\n".join(str(r["ranks"]) for r in records(run)[before:])
        shown = subprocess.run(
            [sys.executable, "-m", "nettorrent_mpi", "watch", run, "--once"],
            env=settings,
            capture_output=True,
            text=True,
        )
        assert f"Slowest: rank {SLOW} (host " in shown.stdout
    finally:
        process.terminate()
        kill_session(process.pid)
        process.wait()


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def wait_for(ready: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.05)


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank that this launcher started."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.getsid(int(entry.name)) == launcher:
                environment = (entry / "environ").read_bytes().split(b"\0")
                if f"OMPI_COMM_WORLD_RANK={rank}".encode() in environment:
                    return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"rank {rank} is no process of session {launcher}")
