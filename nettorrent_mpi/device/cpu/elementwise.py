"""Activations and dropout, element by element, in blocks that stay in the cache or in one compiled loop."""

from __future__ import annotations

from functools import cache
from math import erf, exp, pi, sqrt

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType, Workspace
from nettorrent_mpi.device.cpu.blocking import blocks
from nettorrent_mpi.device.cpu.flat import Operations
from nettorrent_mpi.device.cpu.loop import Loop


class ElementwiseOperations(Operations):
    """Activation functions and dropout: see device.ops."""

    def relu(self, x: Array, y: Array) -> None:
        if x is y and self._tuning.compiled:
            relu(y.reshape(-1))
        else:
            np.maximum(x, 0, out=y)

    def relu_grad(self, y: Array, dy: Array) -> None:
        y, dy = y.reshape(-1), dy.reshape(-1)
        if self._tuning.compiled:
            relu_grad(y, dy)
            return
        memory = self.memory(dy.dtype)
        for block in blocks(dy.size):
            positive = memory.scratch("positive", dy[block].shape, np.bool_)
            np.greater(y[block], 0, out=positive)
            np.multiply(dy[block], positive, out=dy[block])

    def leaky_relu(self, x: Array, y: Array, slope: float) -> None:
        x, y, memory = x.reshape(-1), y.reshape(-1), self.memory(x.dtype)
        for block in blocks(x.size):
            scaled = memory.scratch("scaled", x[block].shape)
            np.multiply(x[block], slope, out=scaled)
            np.maximum(x[block], scaled, out=y[block])

    def leaky_relu_grad(self, y: Array, dy: Array, slope: float) -> None:
        y, dy, memory = y.reshape(-1), dy.reshape(-1), self.memory(dy.dtype)
        for block in blocks(dy.size):
            positive = memory.scratch("positive", dy[block].shape, np.bool_)
            factor = memory.scratch("factor", dy[block].shape)
            np.greater(y[block], 0, out=positive)
            np.maximum(positive, dy.dtype.type(slope), out=factor)
            np.multiply(dy[block], factor, out=dy[block])

    def sigmoid(self, x: Array, y: Array) -> None:
        if self._tuning.compiled and x.dtype == np.float32:
            if x is not y:
                np.copyto(y, x)
            sigmoid(y.reshape(-1))
            return
        x, y = x.reshape(-1), y.reshape(-1)
        with np.errstate(over="ignore"):  # where exp overflows to infinity, the result is 0, as it should be
            for block in blocks(x.size):
                part = y[block]
                np.negative(x[block], out=part)
                np.exp(part, out=part)
                np.add(part, 1, out=part)
                np.reciprocal(part, out=part)

    def sigmoid_grad(self, y: Array, dy: Array) -> None:
        y, dy = y.reshape(-1), dy.reshape(-1)
        if self._tuning.compiled:
            sigmoid_grad(y, dy)
            return
        memory = self.memory(dy.dtype)
        for block in blocks(dy.size):
            part = y[block]
            slope = memory.scratch("slope", part.shape)
            np.subtract(1, part, out=slope)
            np.multiply(slope, part, out=slope)
            np.multiply(dy[block], slope, out=dy[block])

    def tanh(self, x: Array, y: Array) -> None:
        np.tanh(x, out=y)

    def tanh_grad(self, y: Array, dy: Array) -> None:
        y, dy, memory = y.reshape(-1), dy.reshape(-1), self.memory(dy.dtype)
        for block in blocks(dy.size):
            slope = memory.scratch("slope", y[block].shape)
            np.multiply(y[block], y[block], out=slope)
            np.subtract(1, slope, out=slope)
            np.multiply(dy[block], slope, out=dy[block])

    def gelu(self, x: Array, y: Array, slope: Array | None) -> None:
        x, y, memory = x.reshape(-1), y.reshape(-1), self.memory(x.dtype)
        slope = None if slope is None else slope.reshape(-1)
        for block in blocks(x.size):
            cdf = memory.scratch("cdf", x[block].shape)
            normal_cdf(x[block], cdf, memory)
            if slope is not None:
                np.multiply(x[block], x[block], out=slope[block])
                slope[block] *= -0.5
                np.exp(slope[block], out=slope[block])
                slope[block] *= 1 / sqrt(2 * pi)
                slope[block] *= x[block]
                slope[block] += cdf
            np.multiply(x[block], cdf, out=y[block])

    def drop(self, y: Array, keep: Array, scale: float) -> None:
        y, keep = y.reshape(-1), keep.reshape(-1)
        if self._tuning.compiled:
            drop(y, keep, y.dtype.type(scale))
            return
        for block in blocks(y.size):
            np.multiply(y[block], keep[block], out=y[block])
            np.multiply(y[block], scale, out=y[block])


@Loop
def relu(y: Array) -> None:
    """y <- max(y, 0) (flat)."""
    for i in range(y.size):
        y[i] = y.dtype.type(0) if y[i] < 0 else y[i]  # NaN stays NaN


@Loop
def relu_grad(y: Array, dy: Array) -> None:
    """dy <- dy where y > 0, elsewhere 0 (flat)."""
    for i in range(dy.size):
        dy[i] *= y[i] > 0


@Loop
def sigmoid(y: Array) -> None:
    """Compute y <- 1 / (1 + exp(-y)) (flat, float32), to 1.5e-7; rounding differs from NumPy's.

    exp(t) = 2^n exp(r) with n a whole number and |r| <= log(2) / 2, for which a polynomial of degree 7 (Cephes' expf by
    S. Moshier) gives the exponential. Numba calls a function for each exp, which prevents vectorization.
    """
    one, least, most = np.float32(1), np.float32(-87), np.float32(88)
    for i in range(y.size):
        t = -y[i]
        t = most if t > most else t  # NaN stays NaN
        t = least if t < least else t
        n = np.floor(t * np.float32(1.4426950408889634) + np.float32(0.5))
        r = t - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * (r * r) + r + one
        power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
        y[i] = one / (one + p * power)


@Loop
def sigmoid_grad(y: Array, dy: Array) -> None:
    """dy <- dy * y * (1 - y) (flat)."""
    for i in range(dy.size):
        dy[i] *= y[i] * (y.dtype.type(1) - y[i])


@Loop
def drop(y: Array, keep: Array, scale: float) -> None:
    """y <- y * scale where `keep`, elsewhere 0 (flat)."""
    for i in range(y.size):
        y[i] = y[i] * keep[i] * scale


REACH = 9.0  # beyond, Phi is 0 or 1 to the last bit of a float64 near 1 (Phi(-9) = 1e-19)
STEPS = 32  # points of the table in a unit of x


def _taylor_table(terms: int) -> Array:
    """Return (points, terms): the coefficients of Phi's Taylor series around -REACH, -REACH + 1/STEPS, ..., REACH.

    phi(a + h) = sum g_k h^k with g_0 = phi(a) and, as phi' = -x phi, g_{k+1} = -(a g_k + g_{k-1}) / (k + 1).
    Integrated: Phi(a + h) = Phi(a) + sum g_k h^{k+1} / (k + 1).
    """
    table = np.empty((int(2 * REACH * STEPS) + 1, terms))
    for index, row in enumerate(table):
        a = index / STEPS - REACH
        row[0] = 0.5 * (1 + erf(a / sqrt(2)))
        before, g = 0.0, exp(-a * a / 2) / sqrt(2 * pi)
        for k in range(terms - 1):
            row[k + 1] = g / (k + 1)
            before, g = g, -(a * g + before) / (k + 1)
    return table


@cache
def _taylor(dtype: DType) -> Array:
    """Return the table in this type, one contiguous row per term. With |h| <= 1/64 the first term left out is below
    1e-17 (float64) and 2e-9 (float32). It is made in the first step, because few networks need it."""
    return np.ascontiguousarray(_taylor_table(8 if dtype == np.float64 else 4).T.astype(dtype))


def normal_cdf(x: Array, cdf: Array, workspace: Workspace) -> None:
    """Compute cdf <- Phi(x) to the last few bits of the dtype (float64: 3e-16 absolute), for flat arrays of one block.

    NumPy has no erf. A Taylor series around the nearest point of a table needs no case distinction, so it takes a
    handful of ufuncs over the block.
    """
    table = _taylor(x.dtype)
    h = workspace.scratch("cdf h", x.shape)
    term = workspace.scratch("cdf term", x.shape)
    point = workspace.scratch("cdf point", x.shape, np.intp)
    np.maximum(x, -REACH, out=h)
    np.minimum(h, REACH, out=h)
    np.multiply(h, STEPS, out=term)
    np.rint(term, out=term)
    with np.errstate(invalid="ignore"):  # a NaN becomes any point; h carries it on
        np.add(term, REACH * STEPS, out=point, casting="unsafe")
    np.multiply(term, 1 / STEPS, out=term)
    np.subtract(h, term, out=h)
    np.take(table[-1], point, out=cdf, mode="clip")
    for row in table[-2::-1]:
        np.multiply(cdf, h, out=cdf)
        np.take(row, point, out=term, mode="clip")
        np.add(cdf, term, out=cdf)
