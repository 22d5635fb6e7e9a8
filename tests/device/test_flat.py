"""Operations on flat arrays: what they compute, in every number of blocks, without allocating."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.device import Device, make_device


@pytest.fixture(params=["numpy", "fastest"])
def device(request: pytest.FixtureRequest) -> Device:
    return make_device("cpu", request.param)


@pytest.mark.parametrize("size", [0, 1, 1000, 50_003])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moves_and_withholds(size: int, dtype: Any, device: Device) -> None:
    rng = np.random.default_rng(1)
    x, towards, origin, before, kept = (rng.standard_normal(size).astype(dtype) for _ in range(5))
    start, share = x.copy(), dtype(0.3)
    device.ops.move(x, 0.3, towards)
    np.testing.assert_array_equal(x, start + share * (towards - start))
    start = x.copy()
    device.ops.move(x, 0.3, towards, origin)
    np.testing.assert_array_equal(x, start + share * (towards - origin))
    start, held = x.copy(), kept.copy()
    device.ops.withhold(x, before, kept, 0.3)
    np.testing.assert_array_equal(x, start - share * (start - before))
    np.testing.assert_array_equal(kept, held + share * (start - before))


def test_sum_of_squares_is_exact_in_float32_and_allocates_nothing(device: Device) -> None:
    values = np.random.default_rng(6).standard_normal(100_003).astype(np.float32) * np.float32(1e18)
    expected = math.fsum(float(v) ** 2 for v in values)
    total = np.zeros(1)
    device.ops.sum_of_squares(values, total)
    total[0] = 3.0
    tracemalloc.start()
    device.ops.sum_of_squares(values, total)  # single squares leave float32's range
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total[0] == pytest.approx(3.0 + expected, rel=1e-13)
    assert peak < 8192
    empty = np.zeros(1)
    device.ops.sum_of_squares(values[:0], empty)
    assert empty[0] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_found(bad: float, device: Device) -> None:
    x, count = np.ones((7, 30_001), np.float32), np.zeros(2)
    assert device.ops.all_finite(x.reshape(-1))
    device.ops.count_nonfinite(x, count, np.array([4.0]))
    assert count.tolist() == [0, 0]
    x[5, 3] = bad
    assert not device.ops.all_finite(x.reshape(-1))
    for found in (1, 2):
        device.ops.count_nonfinite(x, count, np.array([4.0 + found]))
        assert count.tolist() == [found, 5.0]  # the first step


def test_memory_begins_on_a_cache_line(device: Device) -> None:
    array = device.zeros((3, 5), "float32")
    assert array.ctypes.data % 64 == 0
    assert array.shape == (3, 5)
    assert not array.any()
    assert device.workspace("float64").keep("x", (2,)).dtype == np.float64
