"""Products and convolutions of a GPU: what stands for the libraries in tests equals the CPU's operations, and the GPU's
operations hand the library what it needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu.convolution import GpuConvolutionOperations
from nettorrent_mpi.device.gpu.products import GpuProductOperations
from nettorrent_mpi.device.gpu.runtime import Matrix
from nettorrent_mpi.plan import specs
from tests.gpu.host import convolution, products

NAMES = ["float32", "float64", "bfloat16"]


def dtype_of(name: str) -> Any:
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy comes from ml_dtypes").bfloat16)
    return np.dtype(name)


def random(rng: np.random.Generator, dtype: Any, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(dtype)


def assert_near(found: Array, wanted: Array, dtype: Any) -> None:
    """`wanted` is float64; the error is measured by the largest element, in roundings of the type."""
    rounding = {"float32": 2**-23, "float64": 2**-52, "bfloat16": 2**-8}[np.dtype(dtype).name]
    error = np.abs(found.astype(np.float64) - wanted).max(initial=0.0)
    assert error <= (1 if dtype.name == "bfloat16" else 40) * rounding * max(np.abs(wanted).max(initial=0.0), 1e-3)


# -- the libraries' doubles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_products_double_equals_the_cpu(name: str, turned: tuple[bool, bool], accumulate: bool) -> None:
    dtype, rng = dtype_of(name), np.random.default_rng(5)
    a, b = (random(rng, dtype, *shape) for shape in ((13, 37), (37, 11)))
    out, bias = random(rng, dtype, 13, 11), random(rng, dtype, 11)
    wide, start = out.astype(np.float64), out.copy()
    given = [np.ascontiguousarray(x.T) if turn else x for x, turn in zip((a, b), turned, strict=True)]
    make_device().ops.matmul(
        *(x.astype(np.float64) for x in given), wide, turn_a=turned[0], turn_b=turned[1], accumulate=accumulate
    )
    first, second = (x.T if turn else x for x, turn in zip(given, turned, strict=True))
    products.product(first, second, out, accumulate)
    assert_near(out, wide, dtype)
    out = start.copy()
    products.product(first, second, out, accumulate, bias, relu=True)
    assert_near(out, np.maximum(wide + bias.astype(np.float64), 0), dtype)
    assert (out == 0).any()


def test_tf32_keeps_ten_bits() -> None:
    numbers = np.array([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11, np.inf, 3e38, np.nan], np.float32)
    wanted = np.array([1 + 2**-10, 1 + 2**-10, 1, -1 - 2**-10, np.inf, 3e38, np.nan], np.float32)
    np.testing.assert_allclose(products.rounded(numbers), wanted, rtol=2**-11)
    np.testing.assert_array_equal(products.rounded(numbers)[:5], wanted[:5])
    a, b = np.full((1, 3), 1 + 2**-12, np.float32), np.ones((3, 2), np.float32)
    out = np.empty((1, 2), np.float32)
    products.product(a, b, out, tf32=True)
    assert (out == 3).all()
    products.product(a, b, out)
    assert (out > 3).all()


def geometry(image: tuple[int, int, int], filters: int, kernel: Any, stride: Any, padding: Any) -> Geometry:
    return Geometry.of(image, filters, specs.pair(kernel), specs.pair(stride), padding)


GEOMETRIES = [
    geometry((8, 8, 6), 5, 3, 1, "same"),
    geometry((9, 7, 3), 5, 3, 1, "valid"),
    geometry((9, 7, 3), 17, 3, 2, "same"),
    geometry((6, 6, 8), 8, 2, 1, "same"),
    geometry((11, 5, 1), 4, (4, 2), (3, 2), "same"),
    geometry((9, 9, 8), 12, 1, 2, "valid"),
    geometry((5, 5, 2), 3, 1, 1, "valid"),
    geometry((4, 5, 2), 3, (4, 5), 1, "valid"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_convolutions_double_equals_the_cpu(name: str, shape: Geometry, rows: int) -> None:
    dtype, rng = dtype_of(name), np.random.default_rng(2)
    x, dy = random(rng, dtype, rows, *shape.image), random(rng, dtype, rows, *shape.output)
    filters = random(rng, dtype, shape.output[2], *shape.kernel, shape.image[2])
    bias = random(rng, dtype, shape.output[2])

    def wide(array: Array) -> Array:
        return np.ascontiguousarray(array, np.float64)

    ops, weight = make_device().ops, wide(filters.transpose(1, 2, 3, 0))
    wanted, found = np.empty(dy.shape), np.empty_like(dy)
    for given in (bias, None):
        ops.convolve(wide(x), weight, None if given is None else wide(given), wanted, shape)
        convolution.forward(x, filters, found, shape, given)
        assert_near(found, wanted, dtype)
    convolution.forward(x, filters, found, shape, relu=True)
    assert_near(found, np.maximum(wanted, 0), dtype)
    wanted, found = np.empty(x.shape), np.full_like(x, np.nan)
    ops.convolve_grad_x(weight, wide(dy), wanted, shape)
    convolution.grad_x(found, filters, dy, shape)
    assert_near(found, wanted, dtype)
    wanted, found = np.empty(weight.shape), np.full_like(filters, np.nan)
    ops.convolve_grad_w(wide(x), wide(dy), wanted, shape, False)
    convolution.grad_w(x, found, dy, shape)
    assert_near(found, wanted.transpose(3, 0, 1, 2), dtype)


# -- the operations over them -----------------------------------------------------------------------------------------


class Prepared:
    """Prepared runs a function and counts its runs."""

    def __init__(self, run: Callable[[], None]):
        self._run = run
        self.runs = 0

    def run(self, stream: Any) -> None:
        assert stream == "stream"
        self._run()
        self.runs += 1


class Libraries:
    """Libraries is the part of a runtime that operations here use. `made` are all prepared products."""

    def __init__(self) -> None:
        self.made: list[Prepared] = []
        self.workspaces: list[Array] = []

    def address(self, array: Array) -> int:
        return array.ctypes.data

    def product(self, a: Matrix, b: Matrix, out: Array, *, workspace: Array, accumulate: bool, **more: Any) -> Prepared:
        for matrix in (a.array, b.array, out):
            assert matrix.size
            assert matrix.strides[1] == matrix.itemsize
        self.workspaces.append(workspace)
        first, second = (x.array.T if x.turned else x.array for x in (a, b))
        self.made.append(Prepared(lambda: products.product(first, second, out, accumulate, **more)))
        return self.made[-1]

    def convolution(
        self,
        kind: str,
        x: Array,
        weight: Array,
        y: Array,
        geometry: Geometry,
        *,
        workspace: Any,
        bias: Any,
        **more: Any,
    ) -> Prepared:
        self.workspaces.append(workspace(1000 * (len(self.made) + 1)))
        assert not more["relu"]
        arguments, tf32 = {"bias": bias} if kind == "forward" else {}, more["tf32"]
        run = getattr(convolution, kind)
        self.made.append(Prepared(lambda: run(x, weight, y, geometry, tf32=tf32, **arguments)))
        return self.made[-1]


class Operations(GpuProductOperations, GpuConvolutionOperations):
    def fill(self, out: Array, value: float) -> None:
        out[...] = value

    def copy(self, out: Array, x: Array) -> None:
        out[...] = x

    def store(self, out: Array, x: Array, accumulate: bool) -> None:
        assert out.dtype == x.dtype
        out[...] = out + x if accumulate else x


def make(tf32: bool = False) -> tuple[Any, Libraries]:
    libraries = Libraries()

    def empty(shape: tuple[int, ...], dtype: Any) -> Array:
        memory = np.full(math.prod(shape) * np.dtype(dtype).itemsize, 255, np.uint8)
        return memory.view(dtype).reshape(shape)

    device: Any = SimpleNamespace(runtime=libraries, stream="stream", tf32=tf32, empty=empty)
    return Operations(device), libraries


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_matmul(turned: tuple[bool, bool], accumulate: bool, columns: bool) -> None:
    ops, libraries = make()
    rng = np.random.default_rng(1)

    def matrix(high: int, wide: int) -> Array:
        return random(rng, np.float64, high, wide + 9)[:, 4:-5] if columns else random(rng, np.float64, high, wide)

    a, b = (matrix(*(shape[::-1] if t else shape)) for t, shape in zip(turned, ((13, 7), (7, 5)), strict=True))
    out = matrix(13, 5)
    expected = out.copy()
    for _ in range(3):
        ops.matmul(a, b, out, *turned, accumulate)
        step = (a.T if turned[0] else a) @ (b.T if turned[1] else b)
        expected = expected + step if accumulate else step
        np.testing.assert_allclose(out, expected, rtol=1e-13)
    (prepared,) = libraries.made  # once for the same arrays
    assert prepared.runs == 3
    assert [workspace.nbytes for workspace in libraries.workspaces] == [32 << 20]
    ops.matmul(a[:6] if not turned[0] else a[:, :6], b, out[:6], *turned, accumulate)
    assert len(libraries.made) == 2
    assert np.shares_memory(*libraries.workspaces)  # one for all


def test_linear_adds_the_bias_and_tf32_reaches_the_library() -> None:
    ops, libraries = make(tf32=True)
    x, weight = np.full((3, 2), 1 + 2**-12, np.float32), np.ones((2, 5), np.float32)
    bias, y = np.arange(5, dtype=np.float32), np.empty((3, 5), np.float32)
    for given, wanted in ((bias, 2 + bias), (None, np.float32(2))):
        ops.linear(x, weight, given, y)
        assert (y == wanted).all()
    ops.linear(x, weight, bias, y)
    assert (y == 2 + bias).all()
    assert len(libraries.made) == 2


def test_empty_matrices_are_filled_or_kept_without_the_library() -> None:
    ops, libraries = make()
    wide = np.ones((4, 7))
    for accumulate, wanted in ((True, 1), (False, 0)):
        ops.matmul(np.empty((4, 0)), np.empty((0, 3)), wide[:, :3], accumulate=accumulate)
        assert (wide[:, :3] == wanted).all()
        assert (wide[:, 3:] == 1).all()
    ops.matmul(np.empty((0, 4)), np.ones((4, 3)), np.empty((0, 3)))
    ops.linear(np.empty((4, 0)), np.empty((0, 3)), np.arange(3.0), wide[:, :3])
    assert (wide[:, :3] == np.arange(3)).all()
    ops.linear(np.empty((4, 0)), np.empty((0, 3)), None, wide[:, :3])
    assert (wide[:, :3] == 0).all()
    shape, weight = GEOMETRIES[1], np.ones((5, 3, 3, 3)).transpose(1, 2, 3, 0)
    x, y = np.empty((0, *shape.image)), np.empty((0, *shape.output))
    ops.convolve(x, weight, None, y, shape)
    ops.convolve_grad_x(weight, y, x, shape)
    ops.convolve_grad_w(x, y, weight, shape, True)
    assert (weight == 1).all()
    ops.convolve_grad_w(x, y, weight, shape, False)
    assert (weight == 0).all()
    assert not libraries.made


@pytest.mark.parametrize("shape", GEOMETRIES[2:5], ids=str)
@pytest.mark.parametrize("wide_gradient", [False, True])
def test_convolutions(shape: Geometry, wide_gradient: bool) -> None:
    cpu, (ops, libraries) = make_device().ops, make()
    dtype = np.dtype(np.float32 if wide_gradient else np.float64)
    rng = np.random.default_rng(1)
    x, dy = random(rng, dtype, 4, *shape.image), random(rng, dtype, 4, *shape.output)
    weight = random(rng, dtype, *shape.kernel, shape.image[2], shape.output[2])
    bias = random(rng, dtype, shape.output[2])
    given = np.ascontiguousarray(weight.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)
    assert given.shape == weight.shape
    for some in (bias, None, bias):
        wanted, found = np.empty_like(dy), np.empty_like(dy)
        cpu.convolve(x, weight, some, wanted, shape)
        ops.convolve(x, given, some, found, shape)
        assert_near(found, wanted, dtype)
    wanted, found = np.empty_like(x), np.empty_like(x)
    cpu.convolve_grad_x(weight, dy, wanted, shape)
    ops.convolve_grad_x(given, dy, found, shape)
    assert_near(found, wanted, dtype)
    libraries.made.clear()
    total = np.zeros(given.shape[3:] + given.shape[:3], np.float64).transpose(1, 2, 3, 0)
    expected = np.full(weight.shape, np.nan, dtype)
    cpu.convolve_grad_w(x, dy, expected, shape, False)
    for accumulate, times in ((False, 1), (True, 2), (True, 3), (False, 1)):
        ops.convolve_grad_w(x, dy, total, shape, accumulate)
        assert_near(total, times * expected.astype(np.float64), dtype)
    assert len(libraries.made) == (1 if wide_gradient else 2)  # one straight into the gradient, one beside it
    odd = np.empty(dy.size + 1, dtype)[1:].reshape(dy.shape)
    assert odd.ctypes.data % 16
    with pytest.raises(AssertionError, match=r"forward: .* is not aligned"):
        ops.convolve(x, given, bias, odd, shape)
    with pytest.raises(AssertionError, match="KRSC"):
        ops.convolve(x, weight, bias, np.empty_like(dy), shape)
