"""Runs in which a rank is stopped by SIGSTOP for some seconds: their programs tell of each step (`TimedSteps`)."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

Run = subprocess.CompletedProcess[str]


class TimedSteps:
    """Writes a rank's process id to FOLDER/pid.RANK, and the time (time.monotonic, as float64) after every step to
    FOLDER/steps.RANK.

    A step takes `pause` seconds longer than it would: so the cores are not busy, and no rank becomes faster because
    another one stands still. A rank that was stopped for seconds works without pauses until it has made up for the
    steps it missed, so that the others need not wait for it so long in the end.
    """

    def __init__(self, folder: Path, rank: int, pause: float):
        self._pause, self._done, self._missed, self._first, self._last = pause, 0, 0, 0.0, 0.0
        self._log = os.open(folder / f"steps.{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        (folder / f"pid.{rank}.part").write_text(str(os.getpid()))
        (folder / f"pid.{rank}.part").rename(folder / f"pid.{rank}")

    def done(self) -> None:
        """Tell that a step is done."""
        if self._missed:
            self._missed -= 1
        else:
            time.sleep(self._pause)
        now = time.monotonic()
        if self._last and now - self._last > 2:
            self._missed = int((now - self._last) / (self._last - self._first) * self._done)
        self._done, self._last, self._first = self._done + 1, now, self._first or now
        os.write(self._log, struct.pack("d", now))


def steps(folder: Path, rank: int) -> np.ndarray:
    """When this rank's steps were done, as far as it has come."""
    path = folder / f"steps.{rank}"
    data = path.read_bytes() if path.exists() else b""
    return np.frombuffer(data[: len(data) // 8 * 8])


def wait_until(condition: Callable[[], bool], running: Future[Run]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert not running.done(), running.result()
        assert time.monotonic() < until, "the ranks do not get so far"
        time.sleep(0.02)


def with_a_standstill(
    mpirun: Callable[..., Run],
    ranks: int,
    program: Sequence[str | Path],
    folder: Path,
    stopped: int,
    seconds: float,
    *,
    before: float = 2.0,
    mpi: str = "openmpi",
) -> tuple[float, float]:
    """(when a rank was stopped, when it was let go on) in a run that ends well."""
    with ThreadPoolExecutor() as pool:
        running = pool.submit(mpirun, ranks, program, mpi=mpi, timeout=120)
        wait_until(lambda: len(steps(folder, stopped)) > 100, running)
        time.sleep(before)
        pid = int((folder / f"pid.{stopped}").read_text())
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        try:
            time.sleep(seconds)
        finally:
            os.kill(pid, signal.SIGCONT)
        ended = time.monotonic()
        done = running.result()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return began, ended
