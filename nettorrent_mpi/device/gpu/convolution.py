"""Convolutions are computed by the runtime's library.

A GPU's filters lie in memory as (outputs, height, width, inputs): the weights of device.ops, (height, width, inputs,
outputs), are a transposed view of that.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu.epilogs import GpuEpilogOperations
from nettorrent_mpi.device.gpu.operations import Owner
from nettorrent_mpi.device.gpu.runtime import Product
from nettorrent_mpi.device.ops import FlatOps, LayerOps

# Prepared convolutions: see products.
REMEMBERED = 1 << 16
ALIGNED = 16  # bytes: cuDNN's frontend says so of all tensors


class Prepared(NamedTuple):
    """A convolution that is Prepared: `filters` are those that it uses or computes, `kept` arrays live as long; `relu`:
    whether a ReLU is left to do."""

    product: Product
    filters: Array
    kept: tuple[Array | None, ...]
    relu: bool = False


class GpuConvolutionOperations(GpuEpilogOperations):
    """Convolutions of images and their gradients: see device.ops. They are prepared once for the same arrays, as
    products are."""

    def __init__(self, device: Owner):
        super().__init__(device)
        self._convolutions: dict[tuple[int, ...], Prepared] = {}

    def convolve(
        self, x: Array, weight: Array, bias: Array | None, y: Array, geometry: Geometry, relu: bool = False
    ) -> None:
        if not y.size:
            return
        key = id(x), id(weight), id(bias), id(y), int(relu)
        known = self._convolutions.get(key)
        if known is None:

            def prepare(bias: Array | None, relu: bool) -> Product:
                return self._convolution("forward", x, filters(weight), y, geometry, bias, relu)

            product, left = self.with_epilog(prepare, bias, relu, y)
            known = Prepared(product, weight, (x, weight, bias, y), left)  # their ids are unique
            self._remember_convolution(key, known)
        known.product.run(self.device.stream)
        if known.relu:
            cast("LayerOps", self).relu(y, y)

    def convolve_grad_x(self, weight: Array, dy: Array, dx: Array, geometry: Geometry) -> None:
        if not dy.size:
            cast("FlatOps", self).fill(dx, 0.0)
            return
        key = id(weight), id(dy), id(dx)
        known = self._convolutions.get(key)
        if known is None:
            product = self._convolution("grad_x", dx, filters(weight), dy, geometry)
            known = Prepared(product, weight, (weight, dy, dx))
            self._remember_convolution(key, known)
        known.product.run(self.device.stream)

    def convolve_grad_w(self, x: Array, dy: Array, dw: Array, geometry: Geometry, accumulate: bool) -> None:
        flat = cast("FlatOps", self)
        if not dy.size:
            if not accumulate:
                flat.fill(filters(dw), 0.0)
            return
        direct = not accumulate and dw.dtype == x.dtype  # cuDNN neither adds to dw nor writes another type
        key = id(x), id(dy), id(dw), int(direct)
        known = self._convolutions.get(key)
        if known is None:
            total = filters(dw)
            out = total if direct else self.scratch("weight gradient", total.shape, x.dtype)
            known = Prepared(self._convolution("grad_w", x, out, dy, geometry), out, (x, dy, dw))
            self._remember_convolution(key, known)
        known.product.run(self.device.stream)
        if not direct:
            more = known.filters
            if dw.dtype != x.dtype:
                more = self.scratch("wide weight gradient", more.shape, dw.dtype)
                flat.copy(more, known.filters)
            flat.store(filters(dw), more, accumulate)

    def _convolution(
        self,
        kind: str,
        x: Array,
        weight: Array,
        y: Array,
        geometry: Geometry,
        bias: Array | None = None,
        relu: bool = False,
    ) -> Product:
        for array in (x, weight, y) if bias is None else (x, weight, y, bias):
            assert self.device.runtime.address(array) % ALIGNED == 0, f"{kind}: {array.shape} is not aligned"
        return self.device.runtime.convolution(
            kind, x, weight, y, geometry, bias=bias, relu=relu, tf32=self.device.tf32, workspace=self._bytes
        )

    def _remember_convolution(self, key: tuple[int, ...], known: Prepared) -> None:
        if len(self._convolutions) == REMEMBERED:
            self._convolutions.clear()
        self._convolutions[key] = known

    def _bytes(self, size: int) -> Array:
        return self.scratch("convolution", (size,), np.uint8)


def filters(weight: Array) -> Array:
    """Return the memory of weights (height, width, inputs, outputs) as (outputs, height, width, inputs)."""
    memory = weight.transpose(3, 0, 1, 2)
    assert memory.flags.c_contiguous, f"filters {weight.shape} with the strides {weight.strides} do not lie as KRSC"
    return memory
