"""Kernels of flat arrays and views give what the CPU device's operations give, bit for bit; sums up to rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu import Gpu, operations
from nettorrent_mpi.device.gpu.views import view
from tests.gpu.compared import NAMES, SIZES, HostOps, dtype_of, on_both, some
from tests.gpu.host import build
from tests.gpu.host.runtime import HostRuntime

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_flat_operations(host_ops: HostOps, name: str, size: int) -> None:
    a, b, c, out = (some(name, size, seed=seed) for seed in range(4))
    on_both(host_ops, lambda ops, a, b, out: ops.add(a, b, out), a, b, out)
    on_both(host_ops, lambda ops, a, b, out: ops.subtract(a, b, out), a, b, out)
    on_both(host_ops, lambda ops, a, b, out: ops.multiply(a, b, out), a, b, out)
    on_both(host_ops, lambda ops, a, b: ops.add(a, b, a), a, b)
    on_both(host_ops, lambda ops, x: ops.scale(x, 0.3), a)
    on_both(host_ops, lambda ops, x: ops.divide(x, 3), a)
    on_both(host_ops, lambda ops, x: ops.fill(x, 0.1), a)
    on_both(host_ops, lambda ops, out, x: ops.copy(out, x), out, a)
    for accumulate in (False, True):
        on_both(host_ops, lambda ops, out, x, on=accumulate: ops.store(out, x, on), out, a)
        on_both(host_ops, lambda ops, out, x, on=accumulate: ops.store(out, x, on), out, some("float64", size, seed=9))
    on_both(host_ops, lambda ops, x, to: ops.move(x, 0.3, to), a, b)
    on_both(host_ops, lambda ops, x, to, origin: ops.move(x, 0.3, to, origin), a, b, c)
    on_both(host_ops, lambda ops, x, before, kept: ops.withhold(x, before, kept, 0.3), a, b, c)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blocks", [1, operations.MOST_BLOCKS])
def test_parts_of_arrays_begin_anywhere(
    host_ops: HostOps, name: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs of 16 bytes are taken only where all addresses allow; a small grid goes round several times."""
    monkeypatch.setattr(operations, "MOST_BLOCKS", blocks)
    a, b, out = (some(name, 5003, seed=seed) for seed in range(3))
    for first, second in ((0, 0), (1, 1), (8, 0), (0, 3)):
        size = 4990

        def run(ops: Any, a: Array, b: Array, out: Array, first: int = first, second: int = second) -> None:
            ops.subtract(a[first : first + size], b[second : second + size], out[first : first + size])  # noqa: B023
            ops.relu(a[second : second + 77], out[first : first + 77])
            ops.copy(out[-3:], a[first : first + 3])

        on_both(host_ops, run, a, b, out)
        x, y = a[first : first + size], np.zeros(5003, np.float32)
        for given, into in ((x, y), (y, a)):
            on_device = host_ops.up(into)
            host_ops.copy(on_device[second : second + size], host_ops.up(given)[:size])
            wanted = into.copy()
            wanted[second : second + size] = given[:size]
            np.testing.assert_array_equal(host_ops.down(on_device), wanted)


TYPES = ["float32", "float64", "bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64"]


@pytest.mark.parametrize("x_name", [*TYPES, "bfloat16"])
def test_copies_convert_every_type_to_every_other(host_ops: HostOps, x_name: str) -> None:
    x = np.array([0, 1, 2, 77, 100, 126, 0, 3], dtype_of(x_name))
    if x_name in ("float32", "float64"):
        x += dtype_of(x_name).type(0.7)
    for out_name in TYPES + ([] if x_name != "bfloat16" else ["bfloat16"]):
        out = np.full(x.shape, 5, dtype_of(out_name))
        on_device = host_ops.up(out)
        host_ops.copy(on_device, host_ops.up(x))
        np.copyto(out, x, casting="unsafe")
        np.testing.assert_array_equal(host_ops.down(on_device), out)
        host_ops.fill(on_device, 1.7)
        out.fill(1.7)
        np.testing.assert_array_equal(host_ops.down(on_device), out)


def test_whole_numbers_are_rounded_once(host_ops: HostOps) -> None:
    x = np.array([2**53 + 1, -(2**62) - 1, 2**24 + 1, 16777217 * 2**30 + 1], np.int64)
    for name in ("float32", "float64", "int32"):
        out = host_ops.up(np.zeros(4, name))
        host_ops.copy(out, host_ops.up(x))
        np.testing.assert_array_equal(host_ops.down(out), x.astype(name))


def test_numbers_become_bfloat16_as_elsewhere(host_ops: HostOps) -> None:
    dtype = dtype_of("bfloat16")
    for name in ("float32", "float64"):
        x = np.concatenate([some(name, 3000), np.float32(1) + np.arange(600).astype(name) * 2**-10])
        out = host_ops.up(np.zeros(x.shape, dtype))
        host_ops.copy(out, host_ops.up(x))
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(host_ops.down(out).astype(np.float64), x.astype(dtype).astype(np.float64))


@pytest.mark.parametrize("name", ["float32", "float64", "uint8"])
def test_copies_of_views(host_ops: HostOps, name: str) -> None:
    x = (np.random.default_rng(3).random((3, 5, 4, 6)) * 99).astype(name)
    views: list[Callable[[Array], Array]] = [
        lambda x: x[..., 1:3],
        lambda x: x[1],
        lambda x: x.transpose(1, 2, 3, 0),
        lambda x: x.transpose(3, 2, 1, 0)[1:5, ::2],
        lambda x: x[:, 2:4, 1:3, ::2],
        lambda x: x[1, 1, 1, 1:2],
        lambda x: x[:0],
    ]
    for one, other in itertools.product(views, [*views, lambda x: x]):
        source, out = one(x), np.zeros(x.shape, name)
        found = host_ops.up(out)
        try:
            other(out)[...] = source
        except ValueError:
            with pytest.raises(ValueError, match="does not fit"):
                host_ops.copy(other(found), one(host_ops.up(x)))
            continue
        host_ops.copy(other(found), one(host_ops.up(x)))
        np.testing.assert_array_equal(host_ops.down(found), out)
        found = host_ops.up(out)
        other(out)[...] = 3
        host_ops.fill(other(found), 3)
        np.testing.assert_array_equal(host_ops.down(found), out)


def test_a_copy_of_more_axes_than_a_kernel_has_is_refused() -> None:
    x, y = np.zeros((2, 3, 2, 3, 2)), np.zeros((2, 7, 5, 7, 5))
    assert view(x, x)[0] == x.size
    with pytest.raises(ValueError, match="5 axes"):
        view(x, y[:, 1::2, 1::2, 1::2, 1::2])


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_arrays_that_broadcast(host_ops: HostOps, name: str) -> None:
    x, channels, column, plane = (some(name, *shape) for shape in ((7, 3, 5, 6), (6,), (7, 1, 1, 1), (3, 1, 6)))
    for a, b in ((x, channels), (channels, x), (x, column), (column, plane), (x, plane), (plane, plane)):
        out = np.zeros(np.broadcast_shapes(a.shape, b.shape), x.dtype)
        for operation in ("add", "subtract", "multiply"):
            on_both(host_ops, lambda ops, a, b, out, f=operation: getattr(ops, f)(a, b, out), a, b, out)
    for part in (np.s_[..., 1:4], np.s_[:, 1], np.s_[::2]):
        on_both(host_ops, lambda ops, x, y, on=part: ops.add(x[on], y[on], x[on]), x, some(name, 7, 3, 5, 6, seed=2))
    transposed = some(name, 6, 5, 7, 3)
    on_both(host_ops, lambda ops, x, y, out: ops.add(x, y.transpose(2, 3, 1, 0), out), x, transposed, np.zeros_like(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [*SIZES, 100_003])
def test_sums_of_squares_and_the_search_for_what_is_not_finite(host_ops: HostOps, name: str, size: int) -> None:
    x = np.random.default_rng(size).standard_normal(size).astype(dtype_of(name))
    wide = x.astype(np.float64)
    if name == "float32":
        x, wide = x * np.float32(1e18), x.astype(np.float64) * np.float32(1e18)  # squares leave float32's range
        wide = x.astype(np.float64)
    total, count, step = host_ops.up(np.array([0.5])), host_ops.up(np.zeros(2)), host_ops.up(np.array([7.0]))
    given = host_ops.up(x)
    for _ in range(2):
        host_ops.sum_of_squares(given, total)
    np.testing.assert_allclose(host_ops.down(total), 0.5 + 2 * np.square(wide).sum(), rtol=1e-13)
    assert host_ops.all_finite(given)
    host_ops.count_nonfinite(given, count, step)
    assert host_ops.down(count).tolist() == [0, 0]
    if not size:
        return
    for place, bad in ((size - 1, np.nan), (size // 2, np.inf)):
        y = x.copy()
        y[place] = bad
        given = host_ops.up(y)
        assert not host_ops.all_finite(given)
        count = host_ops.up(np.zeros(2))
        for now in (7.0, 8.0):
            host_ops.count_nonfinite(given, count, host_ops.up(np.array([now])))
        assert host_ops.down(count).tolist() == [2, 7]


def test_sums_have_the_same_bits_in_every_order() -> None:
    x, found = some("float64", 100_003), set()
    x[~np.isfinite(x)] = 0
    for seed in range(5):
        ops = HostOps(Gpu(HostRuntime(seed)))
        total = ops.up(np.zeros(1))
        ops.sum_of_squares(ops.up(x), total)
        found.add(float(ops.down(total)[0]))
    assert len(found) == 1


def test_a_sum_of_finite_numbers_that_is_not_is_counted(host_ops: HostOps) -> None:
    x = np.full(3, 3e38, np.float32)
    on_both(host_ops, lambda ops, x, count, step: ops.count_nonfinite(x, count, step), x, np.zeros(2), np.array([4.0]))
    assert host_ops.all_finite(host_ops.up(x))


def test_numbers_of_clipping(host_ops: HostOps) -> None:
    for total in (0.0, 4.0, 1e-30, 1e300, np.inf, np.nan):
        scale, given = np.zeros(1), np.array([total])
        on_both(host_ops, lambda ops, total, scale: ops.clip_scale(total, 1.5, scale), given, scale)
    for name in ("float32", "float64"):
        on_both(host_ops, lambda ops, x: ops.increase(x, 0.1), some(name, 3))
