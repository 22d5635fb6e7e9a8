"""The clock of a run counts training, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from nettorrent_mpi.engine.usage import WARM_UP, Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set by the test."""
    time_now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: time_now[0])
    return time_now


def test_it_counts_only_between_go_on_and_stop(now: list[float]) -> None:
    clock = Clock()
    now[0] += 5
    assert clock.seconds == 0
    clock.go_on()
    now[0] += 2
    clock.go_on()  # changes nothing while it runs
    now[0] += 1
    assert clock.seconds == 3
    clock.stop()
    now[0] += 10
    assert clock.seconds == 3
    clock.go_on()
    now[0] += 4
    assert clock.seconds == 7


@pytest.mark.parametrize(("steps", "rate"), [(1, 10.0), (WARM_UP, 10.0), (WARM_UP + 4, 20.0)])
def test_the_rate_leaves_the_first_steps_out(now: list[float], steps: int, rate: float) -> None:
    clock = Clock()
    clock.go_on()
    for step in range(steps):
        now[0] += 1.0 if step < WARM_UP else 0.5
        clock.step(10)
    clock.stop()
    now[0] += 100
    assert clock.samples_per_second == rate


def test_nothing_trained() -> None:
    assert (Clock().seconds, Clock().samples_per_second, Clock().seconds_per_step) == (0, 0, 0)


PEAK = """
from nettorrent_mpi.engine.usage import peak_memory
before = peak_memory()
held = bytearray(b"x") * 300_000_000
with_it = peak_memory()
del held
print(before, with_it, peak_memory())
"""


def test_peak_memory_is_what_was_held_at_most() -> None:
    """The test uses a process of its own: one that has held more before does not reach its peak again."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    before, with_it, after = map(int, done.stdout.split())
    assert with_it == pytest.approx(before + 300e6, rel=0.05)
    assert after == pytest.approx(with_it, rel=0.01)


def test_peak_memory_is_not_that_of_who_started_the_process() -> None:
    held = bytearray(b"x") * 300_000_000
    code = "from nettorrent_mpi.engine.usage import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100e6 < len(held)
