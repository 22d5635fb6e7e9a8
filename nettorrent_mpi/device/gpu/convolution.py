"""Convolutions are computed by the runtime's library.

A GPU's filters lie in memory as (outputs, height, width, inputs): the weights of device.ops, (height, width, inputs,
outputs), are a transposed view of that.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu.operations import Operations, Owner
from nettorrent_mpi.device.gpu.runtime import Product
from nettorrent_mpi.device.ops import FlatOps

# Prepared convolutions: see products.
REMEMBERED = 1 << 16
ALIGNED = 16  # bytes: cuDNN's frontend says so of all tensors


class Prepared(NamedTuple):
    """A convolution that is Prepared: `filters` are those that it uses or computes, `kept` arrays live as long."""

    product: Product
    filters: Array
    kept: tuple[Array | None, ...]


class ConvolutionOperations(Operations):
    """Convolutions of images and their gradients: see device.ops. They are prepared once for the same arrays, as
    products are."""

    def __init__(self, device: Owner):
        super().__init__(device)
        self._convolutions: dict[tuple[int, ...], Prepared] = {}

    def convolve(self, x: Array, weight: Array, bias: Array | None, y: Array, geometry: Geometry) -> None:
        if y.size:
            key = id(x), id(weight), id(bias), id(y)
            known = self._convolutions.get(key)
            if known is None:
                known = self._prepare_convolution("forward", x, filters(weight), y, geometry, bias)
                self._convolutions[key] = known._replace(kept=(x, weight, bias, y))  # their ids are unique
            known.product.run(self.device.stream)

    def convolve_grad_x(self, weight: Array, dy: Array, dx: Array, geometry: Geometry) -> None:
        if not dy.size:
            cast("FlatOps", self).fill(dx, 0.0)
            return
        key = id(weight), id(dy), id(dx)
        known = self._convolutions.get(key)
        if known is None:
            known = self._prepare_convolution("grad_x", dx, filters(weight), dy, geometry)
            self._convolutions[key] = known._replace(kept=(weight, dy, dx))
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
            known = self._prepare_convolution("grad_w", x, out, dy, geometry)
            self._convolutions[key] = known._replace(kept=(x, dy, dw))
        known.product.run(self.device.stream)
        if not direct:
            more = known.filters
            if dw.dtype != x.dtype:
                more = self.scratch("wide weight gradient", more.shape, dw.dtype)
                flat.copy(more, known.filters)
            flat.store(filters(dw), more, accumulate)

    def _prepare_convolution(
        self, kind: str, x: Array, weight: Array, y: Array, geometry: Geometry, bias: Array | None = None
    ) -> Prepared:
        for array in (x, weight, y) if bias is None else (x, weight, y, bias):
            assert self.device.runtime.address(array) % ALIGNED == 0, f"{kind}: {array.shape} is not aligned"
        if len(self._convolutions) == REMEMBERED:
            self._convolutions.clear()
        product = self.device.runtime.convolution(
            kind, x, weight, y, geometry, bias=bias, tf32=self.device.tf32, workspace=self._bytes
        )
        return Prepared(product, weight, ())

    def _bytes(self, size: int) -> Array:
        return self.scratch("convolution", (size,), np.uint8)


def filters(weight: Array) -> Array:
    """Return the memory of weights (height, width, inputs, outputs) as (outputs, height, width, inputs)."""
    memory = weight.transpose(3, 0, 1, 2)
    assert memory.flags.c_contiguous, f"filters {weight.shape} with the strides {weight.strides} do not lie as KRSC"
    return memory
