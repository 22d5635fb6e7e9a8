"""What tests of kernels share: the operations of a GPU on the host device, and comparisons with the CPU device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.device.gpu import Gpu

CPU = make_device("cpu", "numpy").ops
NAMES = ["float32", "float64", "bfloat16"]
SIZES = [0, 1, 31, 257, 10_007]
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-30, -1e-30, 3e38, -3e38, 90.0, -90.0, 9.5, -9.5]


class HostOps:
    """The operations of a GPU on the host device; `up` and `down` copy arrays to it and back."""

    def __init__(self, device: Gpu):
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device.ops, name)

    def up(self, x: Array) -> Array:
        array = self.device.empty(x.shape, x.dtype)
        self.device.upload(array, x)
        return array

    def down(self, x: Array) -> Array:
        return self.device.on_host(x)


def dtype_of(name: str) -> Any:
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes", reason="bfloat16 in NumPy comes from ml_dtypes").bfloat16)
    return np.dtype(name)


def some(name: str, *shape: int, seed: int = 1) -> Array:
    """Random numbers; where there is room, what is special as well."""
    x = np.random.default_rng(seed).standard_normal(shape)
    if x.size > 5 * len(SPECIAL):
        x.reshape(-1)[seed : seed + 4 * len(SPECIAL) : 4] = SPECIAL
    with np.errstate(over="ignore"):
        return x.astype(dtype_of(name))


def assert_alike(found: Array, wanted: Array, ulps: float = 0) -> None:
    """The same bits, or as many roundings away relative to the number. bfloat16 is compared with float32 arithmetic
    that is rounded once: `wanted` is float32 then."""
    assert found.shape == wanted.shape
    if found.dtype == wanted.dtype and not ulps:
        np.testing.assert_array_equal(found, wanted)
        return
    with np.errstate(invalid="ignore", over="ignore"):
        near = wanted.astype(found.dtype).astype(np.float64)
    step = {"float32": 2**-23, "float64": 2**-52, "bfloat16": 2**-8}[found.dtype.name]
    np.testing.assert_allclose(found.astype(np.float64), near, rtol=max(ulps, 0.5) * step, atol=max(ulps, 0.5) * 1e-38)


def on_both(gpu: HostOps, run: Callable[..., Any], *arrays: Array | None, ulps: float = 0) -> None:
    """Run an operation (ops, *arrays) on copies of the arrays, on the CPU device and on the host device: all arrays are
    alike afterwards. The CPU computes in float32 what is bfloat16."""
    wide = [None if x is None else x.astype(np.float32) if x.dtype.name == "bfloat16" else x.copy() for x in arrays]
    own = [None if x is None else gpu.up(x) for x in arrays]
    with np.errstate(all="ignore"):
        run(CPU, *wide)
    run(gpu, *own)
    for found, wanted, given in zip(own, wide, arrays, strict=True):
        if found is not None and wanted is not None and given is not None:
            assert_alike(gpu.down(found), wanted, ulps)
