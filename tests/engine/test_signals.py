"""Signals that ask a run to stop, and those that end it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from nettorrent_mpi.engine.signals import EARLY, TRAINING, Signals


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


def test_handlers_are_restored() -> None:
    before = {number: signal.getsignal(number) for number in (*EARLY, *TRAINING)}
    signals = Signals()
    signals.listen(tells=False)
    signals.close()
    signals.close()
    assert {number: signal.getsignal(number) for number in before} == before
