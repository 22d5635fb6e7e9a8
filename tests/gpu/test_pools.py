"""Pooling on a GPU is the CPU's, bit for bit: ties, NaN, windows that overlap or leave pixels out."""

from __future__ import annotations

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.geometry import Pair, Pooling
from nettorrent_mpi.device.gpu.pools import GpuPoolOperations
from tests.gpu.compared import CPU
from tests.gpu.host import build
from tests.gpu.kernel_cases import Bench, near, planted, same, some, typed, wide

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

# (images, channels), image, window, stride
CASES = [
    ((3, 5), (6, 8), (2, 2), (2, 2)),  # tiles
    ((2, 1), (7, 9), (3, 2), (2, 3)),  # overlaps in one direction, apart in the other, edges left out
    ((2, 3), (7, 7), (3, 3), (1, 1)),  # nine windows a pixel
    ((1, 129), (3, 3), (3, 3), (1, 1)),
    ((4, 2), (9, 5), (1, 2), (3, 2)),  # pixels of no window
    ((0, 4), (4, 4), (2, 2), (2, 2)),
    ((1, 2), (17, 19), (17, 18), (1, 1)),  # more taps than a byte counts
    ((70, 1), (2, 2), (2, 1), (1, 1)),
]
every = pytest.mark.parametrize(("counts", "image", "size", "stride"), CASES)


def inputs(name: str, counts: Pair, image: Pair, kind: str) -> Array:
    shape = (counts[0], *image, counts[1])
    if kind == "plain":
        return some(name, *shape)
    x = np.random.default_rng(3).integers(-2, 2, shape).astype(np.float32)  # many ties
    if x.size:
        x.reshape(-1)[:: max(x.size // 7, 1)] = np.nan
        x.reshape(-1)[1 :: max(x.size // 5, 1)] = -np.inf
    return x.astype(some(name, 1).dtype)


@typed
@every
@pytest.mark.parametrize(("kind", "relu"), [("plain", False), ("ties", False), ("ties", True)])
def test_max_pool(
    name: str,
    kind: str,
    relu: bool,
    counts: Pair,
    image: Pair,
    size: Pair,
    stride: Pair,
) -> None:
    bench, x = Bench(GpuPoolOperations, seed=1), inputs(name, counts, image, kind)
    pooling = Pooling(image, size, stride)
    shape = (counts[0], *pooling.count, counts[1])
    winner = np.zeros(shape, np.uint8 if pooling.taps < 256 else np.uint32)
    wanted = wide(np.empty(shape, x.dtype))
    CPU.max_pool(wide(x), wanted, winner, pooling, relu)
    y, won = bench.like(np.empty(shape, x.dtype)), bench.like(winner)
    bench.ops.max_pool(bench.up(x), y, won, pooling, relu)
    same(bench.down(y), wanted)
    same(bench.down(won), winner)
    alone = bench.like(np.empty(shape, x.dtype))
    bench.ops.max_pool(bench.up(x), alone, None, pooling, relu)
    same(bench.down(alone), wanted)
    dy, dx = some(name, *shape, seed=2), wide(x)
    CPU.max_pool_grad(wide(dy), winner, dx, pooling)
    found = bench.like(x)
    bench.ops.max_pool_grad(bench.up(dy), won, found, pooling)
    same(bench.down(found), dx)


@typed
@every
def test_avg_pool(name: str, counts: Pair, image: Pair, size: Pair, stride: Pair) -> None:
    bench, x, pooling = (
        Bench(GpuPoolOperations, seed=2),
        some(name, counts[0], *image, counts[1]),
        Pooling(image, size, stride),
    )
    shape = (counts[0], *pooling.count, counts[1])
    y, wanted = bench.like(np.empty(shape, x.dtype)), wide(np.empty(shape, x.dtype))
    bench.ops.avg_pool(bench.up(x), y, pooling)
    CPU.avg_pool(wide(x), wanted, pooling)
    same(bench.down(y), wanted)
    dy, dx, wide_dx = some(name, *shape, seed=2), bench.like(x), wide(x)
    bench.ops.avg_pool_grad(bench.up(dy), dx, pooling)
    CPU.avg_pool_grad(wide(dy), wide_dx, pooling)
    same(bench.down(dx), wide_dx)


@typed
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (0, 2, 2, 3), (1, 1, 1, 1), (2, 13, 11, 129), (5, 8, 8, 64)])
def test_global_avg_pool(name: str, shape: tuple[int, int, int, int]) -> None:
    bench, x = Bench(GpuPoolOperations, seed=3), some(name, *shape, shift=0.5)
    y, wanted = bench.like(x[:, 0, 0]), np.empty((shape[0], shape[3]))
    bench.ops.global_avg_pool(bench.up(x), y)
    CPU.global_avg_pool(x.astype(np.float64), wanted)
    near(bench.down(y), wanted, name, np.abs(x.astype(np.float64)).mean(axis=(1, 2)) if x.size else None)
    dy, dx, wide_dx = some(name, shape[0], shape[3], seed=2), bench.like(x), wide(x)
    bench.ops.global_avg_pool_grad(bench.up(dy), dx)
    CPU.global_avg_pool_grad(wide(dy), wide_dx)
    same(bench.down(dx), wide_dx)


FAULTS = {
    "the last place of ties": ("if (v > best) winner = p * kw + q;", "if (v >= best) winner = p * kw + q;"),
    "a gradient below 0": ("relu && !(best > WORK(0)) ? ~0u : 0", "relu && best < WORK(0) ? ~0u : 0"),
    "a number below 0": ("if (relu && best < WORK(0)) best = 0;", ""),
    "NaN that is forgotten": ("if (v > best || v != v) best = v;", "if (v > best) best = v;"),
    "a window too far": ("if (up < yh && left < yw)", "if (up < yh)"),
    "a tap left out": ("p < kh && p <= h; p += down", "p < kh && p < h; p += down"),
}


RELU_FAULTS = ("a gradient below 0", "a number below 0")


@pytest.mark.long
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_in_max_pool_are_found(fault: str | None) -> None:
    text = planted("Norms|Pools", *FAULTS[fault]) if fault else None
    counts, image, pooling, relu = (2, 3), (7, 8), Pooling((7, 8), (3, 3), (2, 2)), fault in RELU_FAULTS
    bench, x = Bench(GpuPoolOperations, 1, text), inputs("float32", counts, image, "ties")
    shape = (counts[0], *pooling.count, counts[1])
    wanted, winner, dx = np.empty(shape, "f4"), np.zeros(shape, np.uint8), np.empty_like(x)
    CPU.max_pool(x, wanted, winner, pooling, relu)
    dy = some("float32", *shape)
    CPU.max_pool_grad(dy, winner, dx, pooling)
    y, won, found = bench.like(wanted), bench.like(winner), bench.like(x)
    bench.ops.max_pool(bench.up(x), y, won, pooling, relu)
    bench.ops.max_pool_grad(bench.up(dy), bench.up(winner), found, pooling)
    right = (
        np.array_equal(bench.down(y), wanted, equal_nan=True),
        np.array_equal(bench.down(won), winner),
        np.array_equal(bench.down(found), dx),
    )
    assert all(right) == (fault is None)
