"""Direct calls of the BLAS that NumPy has loaded, because NumPy's matmul cannot add a product to existing values.

Where no BLAS is found (it is searched on Linux only, and not every build exports it), NumPy adds in a second pass.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType


class Gemm:
    """A matrix product: gemm(a_mk, b_kn, out_mn, beta) computes out <- a @ b + beta * out. None is empty. `out` is
    C-contiguous; a and b are, or some columns of such matrices, or the transposes of these.

    `call` is a library's function. Its first arguments, of the types `flags`, are returned by `before(plain_a,
    plain_b)`; then come sizes and numbers of these types.
    """

    def __init__(
        self, call: Any, flags: list[Any], size: Any, real: Any, before: Callable[[bool, bool], tuple[Any, ...]]
    ):
        pointer = ctypes.c_void_p
        call.restype = None
        call.argtypes = [*flags, size, size, size, real, pointer, size, pointer, size, real, pointer, size]
        self._call, self._before = call, before

    def __call__(self, a: Array, b: Array, out: Array, beta: float) -> None:
        self._call(*self._arguments(a, b, out, beta))

    def prepare(self, a: Array, b: Array, out: Array, beta: float) -> Callable[[], object]:
        """Return a function that computes the product at each call, as long as the arrays stay in place."""
        arguments = zip(self._call.argtypes, self._arguments(a, b, out, beta), strict=True)
        return partial(self._call, *(kind(value) for kind, value in arguments))

    def _arguments(self, a: Array, b: Array, out: Array, beta: float) -> tuple[Any, ...]:
        (m, k), n = a.shape, b.shape[1]
        return (
            *self._before(plain(a), plain(b)), m, n, k, 1.0, address(a), _apart(a), address(b), _apart(b),
            beta, address(out), n,
        )  # fmt: skip


def plain(matrix: Array) -> bool:
    """Whether the elements of a row are adjacent; otherwise those of a column are."""
    return bool(matrix.strides[1] == matrix.itemsize)


def _apart(matrix: Array) -> int:
    """Return the distance in elements between neighbouring rows, or columns where the matrix is not plain."""
    across = matrix.shape[1] if plain(matrix) else matrix.shape[0]
    return int(max(matrix.strides[not plain(matrix)] // matrix.itemsize, across))


def address(array: Array) -> int:
    """Return the address of the first element, in a third of the time of `array.ctypes.data`."""
    return int(array.__array_interface__["data"][0])


_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112
# Names of cblas_?gemm in different builds: (prefix, suffix, type of sizes). NumPy's wheels have the first.
_NAMES = (
    ("scipy_cblas_", "64_", ctypes.c_int64),
    ("cblas_", "64_", ctypes.c_int64),
    ("cblas_", "_64", ctypes.c_int64),
    ("scipy_cblas_", "", ctypes.c_int32),
    ("cblas_", "", ctypes.c_int32),
)


@cache
def wake(dtype: DType) -> None:
    """Touch the memory into which OpenBLAS packs its operands: once per process, for some milliseconds.

    OpenBLAS allocates 32 MiB when it is loaded, whose pages exist only once they are written to. Its kernels prefetch
    beyond what small products have ever written, and a processor takes long over a missing page: on Zen 1 products of
    128 rows and 256 columns ran at 10 GFLOP/s, and at 35 after one product of the size below, which fills the place of
    the first operand (up to 768 x 384 float32 in OpenBLAS 0.3.31).
    """
    np.matmul(np.ones((64, 512), dtype), np.ones((512, 1024), dtype))


@cache
def gemm(dtype: np.dtype[Any]) -> Gemm | None:
    """Return the product for matrices of this type, or None without such a BLAS."""
    letter, real = {4: ("s", ctypes.c_float), 8: ("d", ctypes.c_double)}[dtype.itemsize]
    for path in _loaded():
        for before, after, size in _NAMES:
            try:
                call = getattr(ctypes.CDLL(path), f"{before}{letter}gemm{after}")
            except (OSError, AttributeError):
                continue
            found = Gemm(call, [ctypes.c_int] * 3, size, real, _flags)
            if _right(found, dtype):
                return found
    return None


def _loaded() -> list[str]:
    """Return the BLAS libraries in this process."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return []
    return sorted(set(re.findall(r"/.*/lib\S*(?:blas|blis|mkl_rt)\S*\.so\S*", maps)))


def _flags(plain_a: bool, plain_b: bool) -> tuple[int, int, int]:
    order = (_TRANSPOSED, _PLAIN)
    return _ROW_MAJOR, order[plain_a], order[plain_b]


def _right(gemm: Gemm, dtype: np.dtype[Any]) -> bool:
    """Whether the product is correct. Sizes of another type than expected would not be."""
    a, b = np.arange(6, dtype=dtype).reshape(2, 3), np.arange(12, dtype=dtype).reshape(3, 4)
    out = np.ones((2, 4), dtype)
    gemm(a, b, out, 1.0)
    return bool(np.array_equal(out, a @ b + 1))
