"""Signals that ask a run to stop, and those that end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nettorrent_mpi.engine.signals import EARLY, TRAINING, Signals

ROOT = Path(__file__).resolve().parents[2]
SHORT = """\
data: {name: synthetic, rows: 8, test_rows: 0, shape: [3], classes: 2}
model: {layers: [{linear: 2}]}
train: {steps: 1, batch_size: 8}
kernels: numpy
"""


@pytest.fixture
def signals() -> Iterator[Signals]:
    made = Signals()
    yield made
    made.close()


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [*EARLY, *TRAINING])
def test_a_training_is_asked_to_stop(signals: Signals, number: signal.Signals) -> None:
    signals.listen(tells=False)
    assert not signals.asked
    send(number)
    assert signals.asked


@pytest.mark.parametrize("number", EARLY)
def test_a_start_up_takes_note(signals: Signals, number: signal.Signals) -> None:
    send(number)
    assert signals.asked


def test_a_start_up_can_be_ended() -> None:
    before = {number: signal.getsignal(number) for number in TRAINING}
    signals = Signals()
    assert {number: signal.getsignal(number) for number in TRAINING} == before
    signals.close()


def test_the_second_interrupt_ends(signals: Signals, capfd: pytest.CaptureFixture[str]) -> None:
    signals.listen(tells=True)
    send(signal.SIGINT)
    assert "stopping with a checkpoint; Ctrl-C again" in capfd.readouterr().err
    send(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_what_nohup_ignores_stays_ignored(signals: Signals) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals.listen(tells=False)
        send(signal.SIGHUP)
        assert not signals.asked
    finally:
        signal.signal(signal.SIGHUP, before)


LATE = """
import atexit, os, signal, sys, time
from nettorrent_mpi.__main__ import main
code = main(sys.argv[2:])

class Last:  # what runs when the interpreter has restored its signal handlers, as MPI_Finalize does
    def __del__(self, kill=os.kill, pid=os.getpid(), numbers=(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)):
        for number in numbers:
            kill(pid, number)

if sys.argv[1] == "now":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
sys.modules["last"] = Last()
os._last = Last()
sys.exit(code or 75)
"""


@pytest.mark.parametrize(
    ("when", "command", "code"),
    [
        ("now", ["train", "short.yaml", "--output", "run"], 75),
        ("last", ["train", "short.yaml", "--set", "device=none"], 2),
        ("last", ["evaluate", "nothing"], 2),
    ],
)
def test_signals_that_come_too_late_do_not_replace_the_exit_code(
    tmp_path: Path, when: str, command: list[str], code: int
) -> None:
    (tmp_path / "short.yaml").write_text(SHORT)
    done = subprocess.run(
        [sys.executable, "-c", LATE, when, *command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr


def test_handlers_are_restored() -> None:
    before = {number: signal.getsignal(number) for number in (*EARLY, *TRAINING)}
    signals = Signals()
    signals.listen(tells=False)
    signals.close()
    signals.close()
    assert {number: signal.getsignal(number) for number in before} == before
