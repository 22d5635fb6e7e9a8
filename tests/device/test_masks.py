"""Dropout's choice: the right share, no pattern, and the same whoever makes it."""

from __future__ import annotations

import numpy as np
import pytest

from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.device.random import generator
from nettorrent_mpi.nn.layer import Features
from nettorrent_mpi.plan import seeds
from nettorrent_mpi.plan.blocks import Span


def mask(shape, rate, rows, key=1234567890123456789, cols=1, col=0, step=0):
    features = Features.divided(shape, cols, col)
    ops = make_device().ops
    codes = ops.place_codes(features.shape, features.part)
    keep = np.zeros((rows.size, codes.size), dtype=np.bool_)
    ops.keep_mask(keep, codes, rate, key, np.array([float(step)]), rows)
    return keep.reshape(rows.size, *features.local)


def correlation(a, b):
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    return float((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean()))


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.5, 0.9])
def test_the_share_is_right_overall_in_each_row_and_at_each_place(rate):
    rows, size = 1000, 1000
    keep = mask((size,), rate, Span(0, rows))
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(keep.mean() - (1 - rate)) < 4 * deviation / 1000
    for axis in (0, 1):
        scores = (keep.mean(axis) - (1 - rate)) / (deviation / np.sqrt(1000))
        assert abs(scores).max() < 5
        assert 0.9 < scores.std() < 1.1  # neither clustered nor too even


def test_extreme_rates():
    assert mask((100,), 0.0, Span(0, 50)).all()
    assert mask((2000,), 1 - 1e-7, Span(0, 500)).sum() < 5


@pytest.mark.parametrize("distance", [1, 2, 3, 16, 64, 256, 512])
def test_neighbours_are_independent(distance):
    keep = mask((1024,), 0.5, Span(0, 1024)).astype(float)
    bound = 4.5 / np.sqrt(keep.size / 2)
    assert abs(correlation(keep[:, distance:], keep[:, :-distance])) < bound
    assert abs(correlation(keep[distance:], keep[:-distance])) < bound
    assert abs(correlation(keep[distance:, distance:], keep[:-distance, :-distance])) < bound
    # Neither are sums of three: a linear generator would show here.
    odd = keep[:, distance:] != keep[:, :-distance]
    assert abs(correlation(odd[1:].astype(float), odd[:-1].astype(float))) < bound


def test_pairs_of_rows_and_of_keys_are_independent():
    keep = mask((4096,), 0.5, Span(0, 200)) * 2.0 - 1
    table = keep @ keep.T / 4096
    np.fill_diagonal(table, 0)
    assert abs(table).max() < 5.5 / np.sqrt(4096)
    steps = [mask((100000,), 0.5, Span(7, 8), seeds.key(1, "dropout", "dropout1", step)) for step in range(30)]
    flat = np.concatenate(steps) * 2.0 - 1
    table = flat @ flat.T / flat.shape[1]
    np.fill_diagonal(table, 0)
    assert abs(table).max() < 5 / np.sqrt(flat.shape[1])


def test_large_row_numbers_are_rows_of_their_own():
    starts = [0, 1 << 31, 1 << 32, (1 << 32) + 1, 1 << 40]
    flat = np.concatenate([mask((20000,), 0.5, Span(start, start + 1)) for start in starts]) * 2.0 - 1
    table = flat @ flat.T / 20000
    np.fill_diagonal(table, 0)
    assert abs(table).max() < 5 / np.sqrt(20000)


@pytest.mark.parametrize("shape", [(17,), (5, 4, 7), (200, 130)])
def test_any_division_makes_the_same_choice(shape):
    whole = mask(shape, 0.3, Span(100, 113))
    for start, stop in ((100, 104), (104, 105), (105, 113)):
        np.testing.assert_array_equal(mask(shape, 0.3, Span(start, stop)), whole[start - 100 : stop - 100])
    parts = [mask(shape, 0.3, Span(100, 113), cols=3, col=col) for col in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), whole)
    assert mask(shape, 0.3, Span(100, 100)).shape == (0, *shape)


def test_another_key_is_another_choice():
    assert (mask((1000,), 0.5, Span(0, 10), key=1) != mask((1000,), 0.5, Span(0, 10), key=2)).mean() > 0.4
    high = mask((1000,), 0.5, Span(0, 10), key=1 + (1 << 63))
    assert (mask((1000,), 0.5, Span(0, 10), key=1) != high).mean() > 0.4


def test_the_choice_is_pinned():
    """A run that is resumed with another version has to go on as it would have."""
    keep = mask((5, 13), 0.5, Span(3, 5), key=42)
    assert np.packbits(keep).tobytes().hex() == "ac8aac5556bac6ecd30bb0ee7dc4c22940"


def test_generators_repeat_and_differ_by_purpose_and_number():
    first = generator(1, "initial", "linear1", "weight").random(5)
    np.testing.assert_array_equal(first, generator(1, "initial", "linear1", "weight").random(5))
    for other in (
        (2, "initial", "linear1", "weight"),
        (1, "order", "linear1", "weight"),
        (1, "initial", "linear1", "w"),
    ):
        assert not np.array_equal(first, generator(*other).random(5))
