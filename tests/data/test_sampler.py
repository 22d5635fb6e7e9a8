"""The order of the rows: all of them, once an epoch, whoever asks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.plan.errors import ConfigError


@given(st.integers(1, 300), st.integers(0, 2**31), st.floats(0, 0.9), st.integers(1, 350), st.integers(0, 3))
def test_every_epoch_is_a_permutation_of_the_training_rows(
    rows: int, seed: int, validation: float, batch_size: int, epoch: int
) -> None:
    if round(rows * validation) >= rows:
        return
    sampler = Sampler(rows, seed, validation, batch_size)
    both = np.concatenate([sampler.training_rows, sampler.validation_rows])
    assert sorted(both.tolist()) == list(range(rows))
    assert len(sampler.validation_rows) == round(rows * validation)
    first = epoch * sampler.steps_per_epoch
    batches = [sampler.rows(step) for step in range(first, first + sampler.steps_per_epoch)]
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), sampler.training_rows)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


def test_order_depends_on_seed_and_epoch_alone() -> None:
    one, two = Sampler(1000, 5, 0.1, 64), Sampler(1000, 5, 0.1, 100)
    later = two.order(7).copy()  # asked in another sequence, with another batch size
    np.testing.assert_array_equal(one.validation_rows, two.validation_rows)
    for epoch in (0, 1, 2, 3, 0):
        np.testing.assert_array_equal(one.order(epoch), two.order(epoch))
    np.testing.assert_array_equal(one.order(7), later)
    assert not np.array_equal(one.order(0), one.order(1))
    assert not np.array_equal(one.order(0), Sampler(1000, 6, 0.1, 64).order(0))
    assert not np.array_equal(one.validation_rows, Sampler(1000, 6, 0.1, 64).validation_rows)


def test_the_last_batch_is_smaller_not_dropped() -> None:
    sampler = Sampler(103, 1, 0.0, 25)
    assert sampler.steps_per_epoch == 5
    assert [len(sampler.rows(step)) for step in range(6)] == [25, 25, 25, 25, 3, 25]
    assert [sampler.epoch(step) for step in (0, 4, 5, 9, 10)] == [0, 0, 1, 1, 2]


def test_an_order_is_made_once_and_cannot_be_written_to() -> None:
    sampler = Sampler(100, 1, 0.0, 10)
    assert sampler.rows(0).base is sampler.rows(9).base
    assert sampler.order(0) is sampler.order(0)
    with pytest.raises(ValueError, match="read-only"):
        sampler.rows(3)[0] = 1
    ahead = sampler.order(1)
    assert sampler.order(0) is sampler.order(0)
    assert sampler.order(1) is ahead


def test_augment_key_changes_with_the_epoch_only() -> None:
    sampler = Sampler(100, 1, 0.0, 10)
    assert sampler.augment_key(0) == sampler.augment_key(9)
    assert sampler.augment_key(10) != sampler.augment_key(9)
    assert sampler.augment_key(0) != Sampler(100, 2, 0.0, 10).augment_key(0)


def test_mistakes() -> None:
    for rows, validation, batch_size, key in (
        (10, 1.0, 1, "data.validation"),
        (10, -0.1, 1, "data.validation"),
        (10, 0.99, 1, "data.validation"),
        (10, float("nan"), 1, "data.validation"),
        (10, 0.1, 0, "train.batch_size"),
    ):
        with pytest.raises(ConfigError) as caught:
            Sampler(rows, 1, validation, batch_size)
        assert caught.value.key == key
