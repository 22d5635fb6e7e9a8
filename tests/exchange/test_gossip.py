"""The numbers that gossip chooses by itself: the learning rate's factor, and what of its steps a replica withholds."""

from __future__ import annotations

import math

import pytest

from nettorrent_mpi.plan.exchange_specs import Gossip
from nettorrent_mpi.plan.gossip_rules import GROWTH, rate_factor, withholding
from nettorrent_mpi.plan.specs import Adagrad, Adam, AdamW, Rmsprop, Sgd, Spec


@pytest.mark.parametrize("optimizer", [Adagrad(), Adam(), AdamW(), Rmsprop()], ids=str)
def test_the_factor_grows_to_the_root_of_the_replicas_and_on_as_the_rate_falls(optimizer: Spec) -> None:
    def factor(done: float, decay: float) -> float:
        return rate_factor(Gossip(), optimizer, 9, done, decay)

    assert factor(0.0, 1.0) == 1
    assert factor(GROWTH / 2, 1.0) == pytest.approx(2)
    assert factor(GROWTH, 1.0) == factor(1.0, 1.0) == pytest.approx(3)  # a rate that stays as it is
    assert factor(1.0, 0.25) == pytest.approx(3 * math.sqrt(2))
    assert factor(1.0, 0.01) == factor(1.0, 0.0) == 9


def test_a_factor_that_is_given_is_taken_and_sgd_needs_none() -> None:
    assert rate_factor(Gossip(rate_factor=1.5), Adam(), 9, 0.7, 0.1) == 1.5
    assert rate_factor(Gossip(), Sgd(), 9, 0.7, 0.1) == 1


def test_withheld_is_what_is_more_than_a_step_of_the_mean_where_exchanges_are_frequent() -> None:
    more = 1 - 1 / math.sqrt(9)
    assert [withholding(Gossip(), 9, parts) for parts in (1, 2, 3, 400)] == pytest.approx([more, more, 0, 0])
    assert withholding(Gossip(every=2), 9, 1) == withholding(Gossip(probability=0.5), 9, 1) == pytest.approx(more)
    assert withholding(Gossip(every=2), 9, 2) == withholding(Gossip(probability=0.4), 9, 1) == 0
    assert withholding(Gossip(overlap=False), 9, 1) == 0  # nothing is waiting
    assert withholding(Gossip(overlap=False), 9, 2) == pytest.approx(more)
    assert withholding(Gossip(withhold=0.2), 9, 400) == 0.2
    assert withholding(Gossip(), 1, 1) == 0
