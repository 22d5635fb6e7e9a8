"""Activations. All may write over their input; what backward needs is their output, or kept beside it (gelu)."""

from __future__ import annotations

from abc import abstractmethod
from math import erf, exp, pi, sqrt
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu import passes
from nettorrent_mpi.device.cpu.blocking import blocks
from nettorrent_mpi.device.cpu.loop import compiled
from nettorrent_mpi.nn.layer import Layer, Params, Pass
from nettorrent_mpi.nn.layers.registry import Site, makes
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.errors import ConfigError


class Activation(Layer):
    """y = f(x), element by element: works on whatever part of the features is here."""

    elementwise = True
    reads_output = True

    def __init__(self, spec: specs.LayerSpec, site: Site):
        super().__init__(site.name, site.inputs, site.inputs)

    def forward(self, params: Params, x: Array, workspace: Workspace, step: Pass) -> tuple[Array, Any]:
        y = x if self.in_place else workspace.keep("y", x.shape)
        return y, self.apply(x.reshape(-1), y.reshape(-1), workspace, step).reshape(x.shape)

    def backward(
        self, params: Params, grads: Params, saved: Array, dy: Array, workspace: Workspace, step: Pass
    ) -> Array | None:
        if not self.needs_dx:
            return None
        self.differentiate(saved.reshape(-1), dy.reshape(-1), workspace)
        return dy

    @abstractmethod
    def apply(self, x: Array, y: Array, workspace: Workspace, step: Pass) -> Array:
        """y <- f(x), both flat and maybe the same memory; returns what backward needs."""

    @abstractmethod
    def differentiate(self, saved: Array, dy: Array, workspace: Workspace) -> None:
        """dy <- dy * f'(x), both flat, from what `apply` returned."""

    @property
    def operations(self) -> float:
        return 10.0 * float(np.prod(self.outputs.shape))


@makes(specs.Relu)
class Relu(Activation):
    """max(x, 0)."""

    def apply(self, x: Array, y: Array, workspace: Workspace, step: Pass) -> Array:
        if self.in_place and compiled():
            passes.relu(y)
        else:
            np.maximum(x, 0, out=y)
        return y

    def differentiate(self, saved: Array, dy: Array, workspace: Workspace) -> None:
        if compiled():
            passes.relu_back(saved, dy)
            return
        for block in blocks(dy.size):
            positive = workspace.scratch("positive", dy[block].shape, np.bool_)
            np.greater(saved[block], 0, out=positive)
            np.multiply(dy[block], positive, out=dy[block])

    @property
    def operations(self) -> float:
        return 2.0 * float(np.prod(self.outputs.shape))


@makes(specs.LeakyRelu)
class LeakyRelu(Activation):
    """x where it is positive, slope * x elsewhere; the slope is not negative: the output tells the input's sign."""

    def __init__(self, spec: specs.LeakyRelu, site: Site):
        if not 0 <= spec.slope <= 1:
            raise ConfigError(f"layer {site.name}: slope is {spec.slope}, but has to be between 0 and 1")
        super().__init__(spec, site)
        self.slope = spec.slope

    def apply(self, x: Array, y: Array, workspace: Workspace, step: Pass) -> Array:
        for block in blocks(x.size):
            scaled = workspace.scratch("scaled", x[block].shape)
            np.multiply(x[block], self.slope, out=scaled)
            np.maximum(x[block], scaled, out=y[block])
        return y

    def differentiate(self, saved: Array, dy: Array, workspace: Workspace) -> None:
        for block in blocks(dy.size):
            positive = workspace.scratch("positive", dy[block].shape, np.bool_)
            factor = workspace.scratch("factor", dy[block].shape)
            np.greater(saved[block], 0, out=positive)
            np.maximum(positive, dy.dtype.type(self.slope), out=factor)
            np.multiply(dy[block], factor, out=dy[block])


@makes(specs.Sigmoid)
class Sigmoid(Activation):
    """1 / (1 + exp(-x)). Where exp overflows to infinity, the result is 0, as it should be."""

    def apply(self, x: Array, y: Array, workspace: Workspace, step: Pass) -> Array:
        if compiled() and x.dtype == np.float32:
            if not self.in_place:
                np.copyto(y, x)
            passes.sigmoid(y)
            return y
        with np.errstate(over="ignore"):
            for block in blocks(x.size):
                part = y[block]
                np.negative(x[block], out=part)
                np.exp(part, out=part)
                np.add(part, 1, out=part)
                np.reciprocal(part, out=part)
        return y

    def differentiate(self, saved: Array, dy: Array, workspace: Workspace) -> None:
        if compiled():
            passes.sigmoid_back(saved, dy)
            return
        for block in blocks(dy.size):
            y = saved[block]
            slope = workspace.scratch("slope", y.shape)
            np.subtract(1, y, out=slope)
            np.multiply(slope, y, out=slope)
            np.multiply(dy[block], slope, out=dy[block])


@makes(specs.Tanh)
class Tanh(Activation):
    """tanh(x)."""

    def apply(self, x: Array, y: Array, workspace: Workspace, step: Pass) -> Array:
        np.tanh(x, out=y)
        return y

    def differentiate(self, saved: Array, dy: Array, workspace: Workspace) -> None:
        for block in blocks(dy.size):
            slope = workspace.scratch("slope", saved[block].shape)
            np.multiply(saved[block], saved[block], out=slope)
            np.subtract(1, slope, out=slope)
            np.multiply(dy[block], slope, out=dy[block])


@makes(specs.Gelu)
class Gelu(Activation):
    """x * Phi(x), Phi the normal distribution function (1 + erf(x / sqrt 2)) / 2 (Hendrycks, Gimpel: arXiv:1606.08415).

    In training the derivative Phi(x) + x * phi(x) is kept instead of x.
    """

    reads_output = False

    def apply(self, x: Array, y: Array, workspace: Workspace, step: Pass) -> Array:
        slope = workspace.keep("slope", x.shape) if step.training else None
        for block in blocks(x.size):
            cdf = workspace.scratch("cdf", x[block].shape)
            normal_cdf(x[block], cdf, workspace)
            if slope is not None:
                np.multiply(x[block], x[block], out=slope[block])
                slope[block] *= -0.5
                np.exp(slope[block], out=slope[block])
                slope[block] *= 1 / sqrt(2 * pi)
                slope[block] *= x[block]
                slope[block] += cdf
            np.multiply(x[block], cdf, out=y[block])
        return y if slope is None else slope

    def differentiate(self, saved: Array, dy: Array, workspace: Workspace) -> None:
        np.multiply(dy, saved, out=dy)

    @property
    def operations(self) -> float:
        return 60.0 * float(np.prod(self.outputs.shape))


REACH = 9.0  # beyond, Phi is 0 or 1 to the last bit of a float64 near 1 (Phi(-9) = 1e-19)
STEPS = 32  # points of the table in a unit of x


def _taylor_table(terms: int) -> Array:
    """(points, terms): the coefficients of Phi's Taylor series around -REACH, -REACH + 1/STEPS, ..., REACH.

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


# With |h| <= 1/64 the first term left out is below 1e-17 (float64) and 2e-9 (float32). One contiguous row per term.
_TAYLOR = {
    np.dtype(dtype): np.ascontiguousarray(_taylor_table(terms).T.astype(dtype))
    for dtype, terms in ((np.float64, 8), (np.float32, 4))
}


def normal_cdf(x: Array, cdf: Array, workspace: Workspace) -> None:
    """cdf <- Phi(x) to the last few bits of the dtype (float64: 3e-16 absolute), flat arrays of one block.

    NumPy has no erf. A Taylor series around the nearest point of a table needs no case distinction, so it runs as a
    handful of ufuncs over the block.
    """
    table = _TAYLOR[x.dtype]
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
