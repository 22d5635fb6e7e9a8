"""Matrix products as cublasLt computes them, by NumPy: bfloat16 is multiplied and added up in float32, and everything
is rounded once, at the end."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array


def product(
    a: Array,
    b: Array,
    out: Array,
    accumulate: bool = False,
    bias: Array | None = None,
    relu: bool = False,
    tf32: bool = False,
) -> None:
    """Compute out <- (out +) a @ b, then plus the bias of each column, then max(., 0)."""
    assert a.dtype == b.dtype
    assert bias is None or (bias.dtype == out.dtype and bias.shape == out.shape[1:])
    total = np.matmul(operand(a, tf32), operand(b, tf32))
    if accumulate:
        total += out
    if bias is not None:
        total += bias
    if relu:
        np.maximum(total, 0, out=total)
    out[...] = total


def operand(x: Array, tf32: bool) -> Array:
    """Return a factor in the type that products are computed in: float32 for bfloat16, rounded to TF32 with `tf32`."""
    if x.dtype == np.float64:
        return x
    wide = x.astype(np.float32)
    return rounded(wide) if tf32 and x.dtype == np.float32 else wide


def rounded(x: Array) -> Array:
    """Return float32 numbers rounded to TF32's 10 bits of mantissa, ties away from zero (PTX: cvt.rna.tf32.f32)."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    near = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), near, x)
