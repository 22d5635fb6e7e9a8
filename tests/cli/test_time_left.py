"""The time that is left: what it comes to for trainings whose every step, evaluation and start has a known length."""

from __future__ import annotations

import pytest

from nettorrent_mpi.cli.time_left import TimeLeft

STEPS, EPOCH, STEP, EVALUATION = 1000, 100, 0.5, 20.0
SLOW = {0: 30.0, 1: 5.0, 2: 5.0}  # seconds more of the first steps, of which the first has the start


class Training:
    """A training that tells `left` of every `report_every` steps: each takes STEP, the first ones more."""

    def __init__(self, report_every: int, *, after: int = 0, evaluation: float = EVALUATION):
        self.left, self.step, self.time = TimeLeft(STEPS, EPOCH, after=after), after, 0.0
        self._after, self._every, self._evaluation = after, report_every, evaluation

    def go_on(self, until: int) -> None:
        while self.step < until:
            self.time += STEP + SLOW.get(self.step - self._after, 0.0)
            self.step += 1
            evaluated = self.step % EPOCH == 0 or self.step == STEPS
            if evaluated or self.step % self._every == 0:
                warm = max(self.step - self._after - 5, 0) * 32 / (max(self.step - self._after - 5, 1) * STEP)
                record = {"time": self.time, "samples": 32 * self.step, "samples_per_second": warm or 1.0}
                self.left.see(self.step, record, evaluated=evaluated)
            self.time += self._evaluation if evaluated else 0.0

    def truth(self) -> float:
        evaluations = (STEPS - 1) // EPOCH - self.step // EPOCH + 1 if self.step < STEPS else 0
        return STEP * (STEPS - self.step) + self._evaluation * evaluations


@pytest.mark.parametrize("report_every", [1, 7, 50, 100, 1000])
@pytest.mark.parametrize("after", [0, 300])
def test_it_is_right_from_the_second_epoch_on(report_every: int, after: int) -> None:
    training = Training(report_every, after=after)
    for until in (after + 250, after + 500, 999, 1000):
        training.go_on(until)
        known = training.step if report_every == 1 else training.step - training.step % min(report_every, EPOCH)
        truth = training.truth() + (STEP * (training.step - known) if until < STEPS else 0)
        assert training.left.seconds == pytest.approx(truth, rel=0.01, abs=2 * EVALUATION / 100)


@pytest.mark.parametrize("report_every", [1, 5, 20])
def test_the_start_does_not_count_and_nothing_is_said_before_it_is_known(report_every: int) -> None:
    training = Training(report_every, evaluation=0.0)
    training.go_on(4)
    assert training.left.seconds is None
    for until in (20, 21, 40, 99):
        training.go_on(until)
        known = until - until % report_every
        assert training.left.seconds == pytest.approx(STEP * (STEPS - known), rel=0.01)


def test_a_change_of_pace_is_followed() -> None:
    left = TimeLeft(STEPS, None)
    for step in range(10, 101, 10):
        left.see(step, {"time": float(step)}, evaluated=False)
    assert left.seconds == pytest.approx(900)
    for step in range(110, 301, 10):
        left.see(step, {"time": 100 + 3.0 * (step - 100)}, evaluated=False)
    assert left.seconds == pytest.approx(3 * 700)


def test_steps_that_come_again_begin_anew() -> None:
    """After a loss of ranks the training goes on after an earlier step, and takes longer."""
    left = TimeLeft(STEPS, None)
    for step in range(10, 201, 10):
        left.see(step, {"time": float(step)}, evaluated=False)
    for step in range(110, 301, 10):
        left.see(step, {"time": 300 + 2.0 * step}, evaluated=False)
    assert left.seconds == pytest.approx(2 * 700)


def test_at_the_end_nothing_is_left() -> None:
    training = Training(10)
    training.go_on(STEPS)
    assert training.left.seconds == 0
