"""The BLAS that NumPy has loaded: woken, and called directly, since NumPy's matmul cannot add a product to what is there.

Without a BLAS that can be found (Linux only, and not every build) there is none, and NumPy adds in a second pass.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nettorrent_mpi.nn.backend import Array, DType

Gemm = Callable[[Array, Array, Array, float], None]
"""gemm(a_mk, b_kn, out_mn, beta): out <- a @ b + beta * out. `out` is C-contiguous, a and b are or their transposes."""

_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112
# Where a build keeps cblas_?gemm: (before, after the name, the type of sizes). NumPy's wheels have the first.
_NAMES = (
    ("scipy_cblas_", "64_", ctypes.c_int64),
    ("cblas_", "64_", ctypes.c_int64),
    ("cblas_", "_64", ctypes.c_int64),
    ("scipy_cblas_", "", ctypes.c_int32),
    ("cblas_", "", ctypes.c_int32),
)


def wake(dtype: DType) -> None:
    """Let OpenBLAS have the memory into which it packs its operands: once for a process, some milliseconds.

    It asks the system for 32 MiB when it is loaded, whose pages exist from when they are first written to. Its kernels
    fetch ahead, beyond what small products have ever written, and a processor takes long over a page that is not there:
    on Zen 1 products of 128 rows and 256 columns ran at 10 GFLOP/s, and at 35 after one product of the size below,
    which fills the place of the first operand (up to 768 x 384 float32 in OpenBLAS 0.3.31).
    """
    np.matmul(np.ones((64, 512), dtype), np.ones((512, 1024), dtype))


@cache
def gemm(dtype: np.dtype[Any]) -> Gemm | None:
    """For arrays of this type, None where there is no such BLAS."""
    letter, real = {4: ("s", ctypes.c_float), 8: ("d", ctypes.c_double)}[dtype.itemsize]
    for path in _loaded():
        for before, after, size in _NAMES:
            try:
                call = getattr(ctypes.CDLL(path), f"{before}{letter}gemm{after}")
            except (OSError, AttributeError):
                continue
            found = _bound(call, size, real)
            if _right(found, dtype):
                return found
    return None


def _loaded() -> list[str]:
    """The BLAS libraries in this process."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    return sorted(set(re.findall(r"/.*/lib\S*(?:blas|blis|mkl_rt)\S*\.so\S*", maps)))


def _bound(call: Any, size: type, real: type) -> Gemm:
    pointer, flag = ctypes.c_void_p, ctypes.c_int
    call.restype = None
    call.argtypes = [
        flag, flag, flag, size, size, size, real, pointer, size, pointer, size, real, pointer, size,
    ]  # fmt: skip

    def gemm(a: Array, b: Array, out: Array, beta: float) -> None:
        (m, k), n = a.shape, b.shape[1]
        plain_a, plain_b = a.flags.c_contiguous, b.flags.c_contiguous
        call(
            _ROW_MAJOR, _PLAIN if plain_a else _TRANSPOSED, _PLAIN if plain_b else _TRANSPOSED, m, n, k,
            1.0, a.ctypes.data, k if plain_a else m, b.ctypes.data, n if plain_b else k, beta, out.ctypes.data, n,
        )  # fmt: skip

    return gemm


def _right(gemm: Gemm, dtype: np.dtype[Any]) -> bool:
    """Does it compute what it should? Sizes of another type than expected would not."""
    a, b = np.arange(6, dtype=dtype).reshape(2, 3), np.arange(12, dtype=dtype).reshape(3, 4)
    out = np.ones((2, 4), dtype)
    gemm(a, b, out, 1.0)
    return bool(np.array_equal(out, a @ b + 1))
