"""Gradients of weights in parts: however the matrix is cut, the parts are those of x.T @ dy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.operands import SharedOperands
from nettorrent_mpi.nn.layer import Context
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.sizes import in_parts

DEVICE = make_device()


@given(st.integers(1, 9), st.integers(1, 7), st.lists(st.integers(0, 63), max_size=4), st.integers(1, 6))
def test_parts_of_the_product(inputs: int, units: int, cuts: list[int], count: int) -> None:
    rows, size = 6, inputs * units
    rng = np.random.default_rng(inputs * 100 + units)
    memory = np.full((rows, inputs), np.nan), np.full((rows, units), np.nan)
    x, dy = rng.standard_normal((count, inputs)), rng.standard_normal((count, units))
    sums = np.full(size, np.nan)
    ends = sorted({0, size, *(cut for cut in cuts if cut < size)})
    parts = []
    for start, stop in [*pairwise(ends), (size, size)]:  # the last one owns nothing
        operands = SharedOperands(DEVICE, *memory)
        operands.own(Span(start, stop), sums[start:stop])
        parts.append(operands)
    for first, last in pairwise(sorted({0, count // 2, count})):  # by different ranks
        ctx = Context(DEVICE.ops, DEVICE.workspace("float64"), rows=Span(first, last))
        parts[0].put(x[first:last], dy[first:last], ctx)
    for operands in parts:
        for _ in range(2):
            operands.multiply(count)
    np.testing.assert_allclose(sums.reshape(inputs, units), x.T @ dy, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((128, 2, 256, 256), False),
        ((128, 2, 1024, 1024), True),
        ((128, 2, 256, 10), False),
        ((1024, 2, 256, 256), False),
        ((64, 8, 2304, 512), True),
        ((0, 2, 1024, 1024), False),
        ((128, 1, 1024, 1024), False),
    ],
)
def test_where_parts_are_less_work(case: tuple[int, int, int, int], expected: bool) -> None:
    assert in_parts(*case) is expected
