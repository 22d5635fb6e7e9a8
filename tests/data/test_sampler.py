"""The order of the rows: all of them, once an epoch, whoever asks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.plan.blocks import micro_batch, span
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


# ---- a part of the rows for each replica ----------------------------------------------------------------------------


def rows_of(sampler: Sampler, step: int, replica: int) -> list[int]:
    """What the engine lets a replica train on: by position in the mini-batch."""
    batch, found = sampler.rows(step), []
    for m in range(sampler.micro_batches):
        cut = micro_batch(len(batch), sampler.batch_size, sampler.micro_batches, m)
        found += batch[slice(*cut)][slice(*span(cut.size, sampler.replicas, replica))].tolist()
    return found


@given(
    rows=st.integers(1, 120),
    seed=st.integers(0, 2**31),
    validation=st.sampled_from([0.0, 0.1, 0.33]),
    batch_size=st.integers(1, 50),
    replicas=st.integers(1, 7),
    micro_batches=st.integers(1, 6),
)
def test_a_replica_trains_on_all_of_its_own_rows_every_epoch_and_on_no_others(
    rows: int, seed: int, validation: float, batch_size: int, replicas: int, micro_batches: int
) -> None:
    if round(rows * validation) >= rows:
        return
    sampler = Sampler(
        rows, seed, validation, batch_size, replicas=replicas, micro_batches=micro_batches, partition="disjoint"
    )
    parts = []
    for epoch in range(2):
        np.testing.assert_array_equal(np.sort(sampler.order(epoch)), sampler.training_rows)
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        parts.append([sorted(row for n in steps for row in rows_of(sampler, n, r)) for r in range(replicas)])
    assert parts[0] == parts[1]
    assert sorted(row for part in parts[0] for row in part) == sampler.training_rows.tolist()
    shared = Sampler(rows, seed, validation, batch_size)
    np.testing.assert_array_equal(sampler.validation_rows, shared.validation_rows)
    assert sampler.steps_per_epoch == shared.steps_per_epoch


def test_parts_are_fixed_and_shuffled_anew_each_epoch() -> None:
    sampler = Sampler(1000, 5, 0.1, 64, replicas=3, micro_batches=4, partition="disjoint")
    again = Sampler(1000, 5, 0.1, 64, replicas=3, micro_batches=4, partition="disjoint")
    np.testing.assert_array_equal(again.order(3), sampler.order(3))  # asked in another sequence
    for replica in range(3):
        first, second = ([row for n in range(15) for row in rows_of(sampler, 15 * e + n, replica)] for e in (0, 1))
        # A micro-batch of 16 rows is 6 + 5 + 5; the last mini-batch is one of 4 rows, 2 + 1 + 1.
        assert len(first) == [14 * 24 + 2, 14 * 20 + 1, 14 * 20 + 1][replica]
        assert first != second
        assert first != sorted(first)
    other = Sampler(1000, 6, 0.1, 64, replicas=3, micro_batches=4, partition="disjoint")
    assert sorted(rows_of(other, 0, 0)) != sorted(rows_of(sampler, 0, 0))
    assert sampler.order(0).dtype == sampler.training_rows.dtype
    with pytest.raises(ValueError, match="read-only"):
        sampler.rows(3)[0] = 1


def test_a_part_is_no_run_of_neighbouring_rows() -> None:
    sampler = Sampler(10_000, 1, 0.0, 100, replicas=2, partition="disjoint")
    means = [np.mean([row for n in range(100) for row in rows_of(sampler, n, replica)]) for replica in range(2)]
    assert all(abs(mean - 5000) < 200 for mean in means)


def test_one_replica_and_shared_rows_have_the_common_order() -> None:
    plain = Sampler(103, 1, 0.1, 10)
    one = Sampler(103, 1, 0.1, 10, replicas=1, micro_batches=3, partition="disjoint")
    shared = Sampler(103, 1, 0.1, 10, replicas=4, micro_batches=3)
    for epoch in range(2):
        np.testing.assert_array_equal(one.order(epoch), plain.order(epoch))
        np.testing.assert_array_equal(shared.order(epoch), plain.order(epoch))


def test_validation_that_leaves_no_row_to_train_on() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampler(10, 1, 0.99, 1)
    assert caught.value.key == "data.validation"
