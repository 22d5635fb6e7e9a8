"""Merges: factors by hand, flow control, deadlines."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nettorrent_mpi.exchange.merging import (
    DEVIATIONS,
    LEAST_ROUNDS,
    WINDOW,
    Deadline,
    FlowControl,
    Standing,
    factor,
    merged_clock,
    told_loss,
)
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.exchange_specs import ClockMix, ConstantMix, LinearMix, LossDivergenceMix, LossMix, PushSumMix
from nettorrent_mpi.plan.pairing import draw_target
from nettorrent_mpi.plan.specs import Spec

UNKNOWN, DIVERGED = math.nan, math.inf
WEIGHT = 0.3
MIXES: list[Spec] = [ConstantMix(), ConstantMix(0.7), ClockMix(), LossMix(), LinearMix(), LossDivergenceMix()]

# -- factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mix", "own", "peer", "expected"),
    [
        (ConstantMix(), Standing(1, 10), Standing(2, 30), WEIGHT),
        (ConstantMix(0.7), Standing(1, 10), Standing(2, 30), 0.7),
        (ConstantMix(0.0), Standing(1, 10), Standing(2, 30), 0.0),
        (ClockMix(), Standing(1, 10), Standing(2, 30), 0.75),
        (ClockMix(), Standing(1, 10), Standing(2, 0), 0.0),
        (ClockMix(), Standing(1, 0), Standing(2, 10), 1.0),
        (ClockMix(), Standing(1, 0), Standing(2, 0), 0.5),
        (LossMix(), Standing(1, 10), Standing(3, 30), 0.25),
        (LossMix(), Standing(0, 10), Standing(3, 30), 0.0),
        (LossMix(), Standing(3, 10), Standing(0, 30), 1.0),
        (LossMix(), Standing(0, 10), Standing(0, 30), 0.5),
        (LinearMix(0.5, 0.1, 1000), Standing(1, 0), Standing(2, 30), 0.5),
        (LinearMix(0.5, 0.1, 1000), Standing(1, 250), Standing(2, 30), 0.4),
        (LinearMix(0.5, 0.1, 1000), Standing(1, 1000), Standing(2, 30), 0.1),
        (LinearMix(0.5, 0.1, 1000), Standing(1, 9999), Standing(2, 30), 0.1),
        (LinearMix(0.1, 0.6, 10), Standing(1, 4), Standing(2, 30), 0.3),
        (LossDivergenceMix(2.0), Standing(1, 10), Standing(3, 30), 0.1 * 0.5),
        (LossDivergenceMix(2.0), Standing(2, 10), Standing(4, 30), 0.2),
        (LossDivergenceMix(2.0), Standing(6, 10), Standing(2, 30), 0.9),
        (LossDivergenceMix(2.0), Standing(0, 10), Standing(3, 30), 0.0),
        (LossDivergenceMix(2.0), Standing(0, 10), Standing(0, 30), 0.0),
        (LossDivergenceMix(2.0), Standing(4, 10), Standing(0, 30), 1.0),
    ],
)
def test_factors_by_hand(mix: Spec, own: Standing, peer: Standing, expected: float) -> None:
    assert factor(mix, 0.0, own, peer, WEIGHT) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (ConstantMix(), WEIGHT),
        (ConstantMix(0.7), 0.7),
        (ClockMix(), 0.75),
        (LossMix(), 0.25),
        (LinearMix(0.5, 0.1, 20), 0.3),
        (LossDivergenceMix(2.0), 0.05),
    ],
)
def test_below_the_threshold_replicas_go_apart(mix: Spec, expected: float) -> None:
    own, peer = Standing(1, 10), Standing(3, 30)
    assert factor(mix, 4.0, own, peer, WEIGHT) == pytest.approx(expected / 4)
    assert factor(mix, 1.0, own, peer, WEIGHT) == pytest.approx(expected)
    assert factor(mix, 4.0, Standing(0, 10), peer, WEIGHT) == 0.0


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("threshold", [0.0, 5.0])
@pytest.mark.parametrize("other", [0.0, 1.0, UNKNOWN])
def test_of_a_replica_that_diverged_nothing_is_taken(mix: Spec, threshold: float, other: float) -> None:
    assert factor(mix, threshold, Standing(DIVERGED, 10), Standing(other, 30), WEIGHT) == 1.0
    assert factor(mix, threshold, Standing(other, 10), Standing(DIVERGED, 30), WEIGHT) == 0.0


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (ConstantMix(), WEIGHT),
        (ConstantMix(0.7), 0.7),
        (ClockMix(), 0.75),
        (LossMix(), 0.5),
        (LossDivergenceMix(2.0), 0.5),
    ],
)
def test_losses_that_cannot_be_compared_are_equal(mix: Spec, expected: float) -> None:
    for loss in (UNKNOWN, DIVERGED):
        assert factor(mix, 0.0, Standing(loss, 10), Standing(loss, 30), WEIGHT) == pytest.approx(expected)
        assert factor(mix, 4.0, Standing(loss, 10), Standing(loss, 30), WEIGHT) == pytest.approx(expected)
    assert factor(mix, 4.0, Standing(UNKNOWN, 10), Standing(1, 30), WEIGHT) == pytest.approx(expected)
    by_own = 0.5 if isinstance(mix, LossDivergenceMix) else 1.0  # 1 / target
    assert factor(mix, 0.0, Standing(1, 10), Standing(UNKNOWN, 30), WEIGHT) == pytest.approx(expected * by_own)
    assert factor(mix, 4.0, Standing(1, 10), Standing(UNKNOWN, 30), WEIGHT) == pytest.approx(expected * by_own / 4)


def test_what_is_told_of_a_loss() -> None:
    assert math.isnan(told_loss(None))
    assert told_loss(0.25) == 0.25
    for diverged in (math.nan, math.inf, -math.inf):
        assert told_loss(diverged) == math.inf


losses = st.one_of(st.floats(0, allow_nan=False), st.just(UNKNOWN))
clocks = st.floats(0, 1e12)


@given(st.sampled_from(MIXES), st.floats(0, 1e6), losses, losses, clocks, clocks)
def test_a_factor_is_a_part(mix: Spec, threshold: float, own: float, other: float, clock: float, peer: float) -> None:
    """Whatever the losses, up to the largest and the smallest numbers that there are."""
    assert 0.0 <= factor(mix, threshold, Standing(own, clock), Standing(other, peer), WEIGHT) <= 1.0


def test_push_sum_has_no_factor() -> None:
    with pytest.raises(AssertionError):
        factor(PushSumMix(), 0.0, Standing(1, 1), Standing(1, 1), WEIGHT)


def test_merged_clocks() -> None:
    assert merged_clock(0.25, 10, 30) == 15
    assert merged_clock(0.0, 10, 30) == 10
    assert merged_clock(1.0, 10, 30) == 30


# -- flow control -----------------------------------------------------------------------------------------------------


def test_scores_rise_slowly_and_fall_fast() -> None:
    flow = FlowControl(3)
    assert flow.scores == [1000, 1000, 1000]
    flow.succeeded(0)
    flow.timed_out(1)
    assert flow.scores == [1000, 900, 1000]
    flow.succeeded(1)
    assert flow.scores == [1000, 910, 1000]
    for _ in range(9):
        flow.timed_out(1)
    assert flow.scores[1] == 10
    flow.timed_out(1)
    assert flow.scores[1] == 10
    for _ in range(98):
        flow.succeeded(1)
    assert flow.scores[1] == 990
    flow.succeeded(1)
    flow.succeeded(1)
    assert flow.scores == [1000, 1000, 1000]


def test_patience_follows_the_score() -> None:
    flow = FlowControl(2)
    assert flow.patience(1) == 1.0
    for expected in (890, 790, 690):
        flow.timed_out(1)
        assert flow.patience(1) == pytest.approx(expected / 990)
    for _ in range(20):
        flow.timed_out(1)
    assert flow.patience(1) == 0.0
    assert flow.patience(0) == 1.0


def test_a_peer_that_is_late_is_drawn_seldom() -> None:
    flow = FlowControl(4)
    for _ in range(10):
        flow.timed_out(2)
    drawn = [draw_target(7, number, 0, 4, flow.scores) for number in range(300)]
    assert drawn.count(2) < 15
    assert min(drawn.count(1), drawn.count(3)) > 100


# -- deadlines --------------------------------------------------------------------------------------------------------


def test_the_automatic_deadline_follows_the_last_rounds() -> None:
    deadline, generator, times = Deadline("auto"), random.Random(1), []
    for number in range(3 * WINDOW):
        if number < LEAST_ROUNDS:
            assert deadline.seconds is None
        times.append(generator.choice([0.25, 0.5, generator.lognormvariate(0, 1 + number / 50)]))  # equal ones, too
        deadline.add(times[-1])
        if number % 3 and number >= LEAST_ROUNDS - 1:  # not asked for after every round
            window = np.array(times[-WINDOW:])
            median = np.median(window)
            expected = median + DEVIATIONS * np.median(np.abs(window - median))
            assert deadline.seconds == pytest.approx(expected, rel=1e-12)
            assert deadline.seconds == pytest.approx(expected, rel=1e-12)


def test_a_straggler_does_not_move_the_automatic_deadline() -> None:
    deadline = Deadline("auto")
    for number in range(20):
        deadline.add(1.0 + number % 3 / 10)
    before = deadline.seconds
    assert before == pytest.approx(1.1 + 5 * 0.1)
    deadline.add(3600.0)
    assert deadline.seconds == pytest.approx(before)


def test_a_deadline_that_is_told_stays() -> None:
    fixed, none = Deadline(250.0), Deadline("none")
    for _ in range(2 * LEAST_ROUNDS):
        assert fixed.seconds == 0.25
        assert none.seconds is None
        fixed.add(1.0)
        none.add(1.0)
    assert Deadline(0).seconds == 0.0


@pytest.mark.parametrize("limit", [-1.0, math.nan, math.inf])
def test_impossible_deadlines_are_refused(limit: float) -> None:
    with pytest.raises(ConfigError) as caught:
        Deadline(limit)
    assert caught.value.key == "exchange.gossip.deadline"
    assert str(limit) in str(caught.value)
