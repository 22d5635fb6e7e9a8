"""Sums of rows, batch norm and layer norm on a GPU are the CPU's: bit for bit where they work element by element."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.device.gpu import GpuOperations
from nettorrent_mpi.device.gpu.norms import SUM_BLOCK, SUM_BLOCKS, GpuNormOperations
from nettorrent_mpi.device.gpu.tiles import tiles
from nettorrent_mpi.nn.layer import Context, Features
from nettorrent_mpi.nn.layers.norm import LayerNormLayer
from nettorrent_mpi.nn.layers.registry import Site
from nettorrent_mpi.plan import specs
from tests.gpu.compared import CPU, dtype_of
from tests.gpu.host import build
from tests.gpu.kernel_cases import OTHERS, Bench, near, planted, same, some, typed, wide, work_of

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

Shape = tuple[int, ...]
SHAPES = [(7, 5), (0, 3), (1, 1), (4, 3, 5, 16), (33, 129), (5, 7, 7, 3), (3, 0), (2, 2, 1025), (1500, 17)]
every = pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, shape)) for shape in SHAPES])


def channels(c: int, seed: int = 5) -> tuple[Array, Array]:
    """The means and scales of c channels."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(c), rng.random(c) + 0.5


def exact(*arrays: Array) -> list[Array]:
    return [array.astype(np.float64) for array in arrays]


def absolute(x: Array) -> Array:
    """The sums of the magnitudes over all but the last axis."""
    return np.abs(x.astype(np.float64)).reshape(prod(x.shape[:-1]), x.shape[-1]).sum(axis=0)


# -- sums of columns --------------------------------------------------------------------------------------------------


@typed
@every
def test_sums_of_rows(name: str, shape: Shape) -> None:
    bench, x = Bench(GpuNormOperations, seed=1), some(name, *shape, shift=1.0)
    for out_name in (name, "float64"):
        for accumulate in (False, True):
            start = some(out_name, shape[-1], seed=2)
            out, (wanted,) = bench.up(start), exact(start)
            bench.ops.sum_rows(bench.up(x), out, accumulate)
            CPU.sum_rows(x.astype(np.float64), wanted, accumulate)
            near(bench.down(out), wanted, name, absolute(x) + np.abs(start.astype(np.float64)))


@typed
@every
def test_the_derivative_of_a_relu_and_the_sums_of_rows(name: str, shape: Shape) -> None:
    """The same bits as one after the other."""
    bench, y, dy = Bench(GpuOperations, seed=1), some(name, *shape), some(name, *shape, seed=2, shift=1.0)
    if dy.size > 9:
        dy.reshape(-1)[5::19], y.reshape(-1)[7::23] = np.nan, np.nan
    for out_name in (name, "float64"):
        for accumulate in (False, True):
            start = some(out_name, shape[-1], seed=3)
            found, out, wanted, total = (bench.up(x) for x in (dy, start, dy, start))
            bench.ops.relu_grad_sum(bench.up(y), found, out, accumulate)
            bench.ops.relu_grad(bench.up(y), wanted)
            bench.ops.sum_rows(wanted, total, accumulate)
            assert bench.down(found).tobytes() == bench.down(wanted).tobytes()
            assert bench.down(out).tobytes() == bench.down(total).tobytes()
            exactly, sums = wide(dy), wide(start)
            CPU.relu_grad_sum(wide(y), exactly, sums, accumulate)
            same(bench.down(found), exactly)
            np.testing.assert_array_equal(np.isnan(bench.down(out).astype(np.float64)), np.isnan(sums))


@typed
@every
def test_moments(name: str, shape: Shape) -> None:
    bench, x, c = Bench(GpuNormOperations, seed=2), some(name, *shape, shift=0.5), shape[-1]
    part, wanted = bench.like(np.empty(1 + 2 * c)), np.empty(1 + 2 * c)
    bench.ops.moments(bench.up(x), part)
    CPU.moments(x.astype(np.float64), wanted)
    if c:  # nothing is launched without channels
        size = np.concatenate([[0], absolute(x), absolute(x.astype(np.float64) ** 2)])
        near(bench.down(part), wanted, name, size)


@typed
@every
def test_norm_sums(name: str, shape: Shape) -> None:
    bench, x, dy = Bench(GpuNormOperations, seed=3), some(name, *shape), some(name, *shape, seed=2)
    mean, scale = some("float32", shape[-1], seed=3).astype(np.float64), channels(shape[-1])[1]
    sums, wanted = bench.like(np.empty((2, shape[-1]))), np.empty((2, shape[-1]))
    bench.ops.norm_sums(*map(bench.up, (x, dy, mean, scale)), sums)
    wide_x, wide_dy = exact(x, dy)
    CPU.norm_sums(wide_x, wide_dy, mean, scale, wanted)
    near(bench.down(sums), wanted, name, np.stack([absolute((wide_x - mean) * scale * wide_dy), absolute(dy)]))


def test_long_columns_are_cut_into_chunks_whatever_the_gpu() -> None:
    assert tiles(100_000, 16, SUM_BLOCK, SUM_BLOCKS) == (16, (1, SUM_BLOCKS))
    assert tiles(100_000, 129, SUM_BLOCK, SUM_BLOCKS) == (43, (3, 88))
    assert tiles(1024, 8192, SUM_BLOCK, SUM_BLOCKS) == (64, (128, 2))
    assert tiles(1, 1, SUM_BLOCK, SUM_BLOCKS) == (1, (1, 1))
    assert tiles(0, 5, SUM_BLOCK, SUM_BLOCKS) == (5, (1, 1))
    assert tiles(5, 0, SUM_BLOCK, SUM_BLOCKS)[1][0] == 0
    for c in range(1, 500):
        width, (across, _) = tiles(9, c, SUM_BLOCK, SUM_BLOCKS)
        assert (across - 1) * width < c <= across * width


@pytest.mark.parametrize("shape", [(3000, 45), (700, 129)])
def test_sums_are_the_same_bits_in_any_order_and_each_time(shape: Shape) -> None:
    found = []
    for seed in (0, 1, 2, 3):
        bench = Bench(GpuNormOperations, seed)
        x, dy = bench.up(some("float32", *shape)), bench.up(some("float32", *shape, seed=2))
        mean, scale = map(bench.up, channels(shape[-1]))
        assert tiles(*shape, SUM_BLOCK, SUM_BLOCKS)[1][1] > 1
        for _ in range(2):
            sums = bench.like(np.empty((2, shape[-1])))
            bench.ops.norm_sums(x, dy, mean, scale, sums)
            bench.ops.sum_rows(x, sums[0], accumulate=True)
            found.append(bench.down(sums))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


# -- element by element -----------------------------------------------------------------------------------------------


@typed
@every
def test_batch_norm_element_by_element(name: str, shape: Shape) -> None:
    bench, x, dy = Bench(GpuNormOperations, seed=1), some(name, *shape), some(name, *shape, seed=2)
    weight, bias = some(name, shape[-1], seed=3), some(name, shape[-1], seed=4)
    mean, scale = channels(shape[-1])
    y, wanted = bench.like(x), wide(x)
    bench.ops.normalize(*map(bench.up, (x, mean, scale, weight, bias)), y)
    CPU.normalize(wide(x), mean, scale, wide(weight), wide(bias), wanted)
    same(bench.down(y), wanted)
    for count in (prod(shape[:-1]) + 3, 0):
        sums = np.random.default_rng(6).standard_normal((2, shape[-1]))
        dx, wanted = bench.up(dy), wide(dy)
        bench.ops.norm_grad(bench.up(x), dx, *map(bench.up, (mean, scale, weight, sums)), count)
        CPU.norm_grad(wide(x), wanted, mean, scale, wide(weight), sums, count)
        same(bench.down(dx), wanted)


@pytest.mark.parametrize("name", ["float32", OTHERS[0]])
@pytest.mark.parametrize("size", [0, 1, 129, 1000])
def test_statistics(name: str, size: int) -> None:
    bench, x = Bench(GpuNormOperations, seed=1), np.abs(some(name, size))
    x[size // 2 :][:1] = 0
    out, wanted = bench.up(x), x.copy()
    bench.ops.inverse_root(out, 1e-5)
    CPU.inverse_root(wanted, 1e-5)
    same(bench.down(out), wanted)
    for counts in ([7.0], [3.0, 0.0, 5.0]):
        parts = np.random.default_rng(2).random((len(counts), 1 + 2 * size))
        parts[:, 0] = counts
        parts[parts[:, 0] == 0] = 0
        for momentum in (0.0, 0.1):
            found = [bench.like(np.empty(size)) for _ in range(2)] + [bench.up(x) for _ in range(2)]
            statistics = [np.empty(size) for _ in range(2)] + [x.copy() for _ in range(2)]
            bench.ops.merge_moments(bench.up(parts), *found, momentum, 1e-5)
            CPU.merge_moments(parts, *statistics, momentum, 1e-5)
            for one, other in zip(found, statistics, strict=True):
                same(bench.down(one), other)


# -- layer norm -------------------------------------------------------------------------------------------------------


KINDS = [("float64", "float64"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]  # of arrays, of statistics


@pytest.mark.parametrize(
    ("name", "kind"), [("float32", "float32"), *(pytest.param(*kinds, marks=pytest.mark.long) for kinds in KINDS)]
)
@every
def test_layer_norm(name: str, kind: str, shape: Shape) -> None:
    bench, x, dy = Bench(GpuNormOperations, seed=2), some(name, *shape), some(name, *shape, seed=2)
    n, c = prod(shape[:-1]), shape[-1]
    mean, scale = some(kind, n, seed=3), np.abs(some(kind, n, seed=4))
    weight, bias = some(name, c, seed=5), some(name, c, seed=6)
    (x64, dy64, mean64, scale64), work = exact(x, dy, mean, scale), work_of(name)

    total, wanted = bench.like(mean), mean64.copy()
    bench.ops.sum_features(bench.up(x), total)
    CPU.sum_features(x64, wanted)
    near(bench.down(total), wanted, name, np.abs(x64).reshape(n, c).sum(axis=1))

    y, squares, wanted, wide_y = bench.like(x), bench.like(mean), mean64.copy(), wide(x)
    bench.ops.center(bench.up(x), bench.up(mean), y, squares)
    CPU.center(wide(x), wide(mean), wide_y, wide(mean))
    CPU.center(x64, mean64, np.empty_like(x64), wanted)
    same(bench.down(y), wide_y)
    near(bench.down(squares), wanted, name)

    y, wide_y = bench.up(x), wide(x)
    bench.ops.scale_features(y, *map(bench.up, (scale, weight, bias)))
    CPU.scale_features(wide_y, wide(scale), wide(weight), wide(bias))
    same(bench.down(y), wide_y)

    dx, wide_dx = bench.up(dy), wide(dy)
    sums, gradients = bench.like(np.empty((2, n), dtype_of(kind))), bench.like(np.empty((2, c), dtype_of(kind)))
    bench.ops.layer_norm_sums(*map(bench.up, (x,)), dx, *map(bench.up, (mean, scale, weight)), gradients, sums)
    CPU.layer_norm_sums(
        wide(x), wide_dx, wide(mean), wide(scale), wide(weight), np.empty((2, c), work), np.empty((2, n), work)
    )
    same(bench.down(dx), wide_dx)
    wanted_gradients, wanted_sums = np.empty((2, c)), np.empty((2, n))
    CPU.layer_norm_sums(x64, dy64.copy(), mean64, scale64, weight.astype(np.float64), wanted_gradients, wanted_sums)
    products = dy64.reshape(n, c) * ((x64.reshape(n, c) - mean64[:, None]) * scale64[:, None])
    near(bench.down(gradients), wanted_gradients, name, np.stack([absolute(products), absolute(dy)]))
    both = np.stack([products, dy64.reshape(n, c)]) * weight.astype(np.float64)
    near(bench.down(sums), wanted_sums, name, np.abs(both).sum(axis=2))

    given, dx, wide_dx = some(kind, 2, n, seed=7), bench.up(dy), wide(dy)
    bench.ops.layer_norm_grad(bench.up(x), dx, *map(bench.up, (mean, scale, given)))
    CPU.layer_norm_grad(wide(x), wide_dx, wide(mean), wide(scale), wide(given))
    same(bench.down(dx), wide_dx)


def layer_norm(device: Any, dtype: Any, x: Array, dy: Array) -> list[Array]:
    """The output, dx and gradients of the layer, in float64."""
    layer = LayerNormLayer(specs.LayerNorm(), Site("norm", Features.whole(x.shape[1:])))
    ctx = Context(device.ops, device.workspace(dtype))

    def up(values: Array) -> Array:
        array = device.empty(values.shape, dtype)
        device.upload(array, values.astype(dtype))
        return array

    params = {"weight": up(np.linspace(0.5, 1.5, x.shape[-1])), "bias": up(np.zeros(x.shape[-1]))}
    grads = {name: up(np.zeros(x.shape[-1])) for name in params}
    y, saved = layer.forward(params, up(x), ctx)
    found = [np.array(device.on_host(y))]
    found.append(device.on_host(layer.backward(params, grads, saved, up(dy), ctx)))
    return [array.astype(np.float64) for array in (*found, *map(device.on_host, grads.values()))]


def test_bfloat16_loses_nothing_by_its_statistics() -> None:
    """Means far from 0 that were rounded to bfloat16 would leave nothing of the features."""
    x, dy = (some("bfloat16", 40, 129, seed=seed, shift=shift).astype(float) for seed, shift in ((1, 30.0), (2, 0.0)))
    found = layer_norm(Bench(GpuNormOperations).device, dtype_of("bfloat16"), x, dy)
    for array, wanted in zip(found, layer_norm(make_device("cpu", "numpy"), np.float64, x, dy), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=2**-6, atol=2**-6 * np.abs(wanted).max())


def test_nan_stays_in_its_channel_and_in_its_row() -> None:
    bench, x = Bench(GpuNormOperations), some("float32", 9, 5)
    x[4, 2] = np.nan
    out, total = bench.like(x[0]), bench.like(x[:, 0])
    bench.ops.sum_rows(bench.up(x), out)
    bench.ops.sum_features(bench.up(x), total)
    assert np.isnan(bench.down(out)).tolist() == [False, False, True, False, False]
    assert np.isnan(bench.down(total)).tolist() == [row == 4 for row in range(9)]


# -- faults -----------------------------------------------------------------------------------------------------------


def sums_of(text: str | None, seed: int) -> Array:
    bench, x = Bench(GpuNormOperations, seed, text), np.random.default_rng(1).integers(-9, 9, (3300, 65)).astype("f4")
    out = bench.like(np.empty((2, 65)))
    for k in (1, 0):  # counters that are not cleared show in the second one, a column too far in the first
        bench.ops.sum_rows(bench.up(x), out[k])
    return bench.down(out) - x.sum(axis=0, dtype=np.float64)


LANES = "    for (int k = 0; k < K; k++) shared[k * blockDim.x + threadIdx.x] = v[k];\n    __syncthreads();\n"
FAULTS: dict[str, tuple[str, str]] = {
    "a barrier left out": (LANES, LANES.replace("    __syncthreads();\n", "")),
    "a barrier of some": (LANES, LANES.replace("__syncthreads", "if (t.on) __syncthreads")),
    "a counter that stays": ("if (last) *done = 0;", ""),
    "a sum before the last block": ("atomicAdd(done, 1u) == blocks - 1;", "atomicAdd(done, 1u) + 2 == blocks;"),
    "a row left out": (
        "row + 7ll * t.lanes < t.stop; row += 8ll * t.lanes) {\n        WORK part[K] = {};",
        "row + 6ll * t.lanes < t.stop; row += 8ll * t.lanes) {\n        WORK part[K] = {};",
    ),
    "a column too far": ("t.lane < t.lanes && t.column < c;", "t.lane < t.lanes && t.column <= c;"),
    "half of the lanes": ("for (half /= 2; half; half /= 2) {", "for (half /= 2; half > 1; half /= 2) {"),
}


def test_sums_without_faults() -> None:
    assert not any(sums_of(None, seed).any() for seed in range(4))


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_sums_are_found(fault: str) -> None:
    text = planted("Norms", *FAULTS[fault])

    def wrong(run: Callable[[], Array]) -> bool:
        try:
            return bool((run() != 0).any())
        except build.HostError:
            return True

    assert any(wrong(lambda seed=seed: sums_of(text, seed)) for seed in range(4))
