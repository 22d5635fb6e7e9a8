"""Matrix products are computed by the runtime's library, with the fastest algorithm for their shapes."""

from __future__ import annotations

from typing import cast

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.operations import Operations, Owner
from nettorrent_mpi.device.gpu.runtime import Matrix, Product
from nettorrent_mpi.device.ops import FlatOps

# Prepared products: three per layer and micro-batch in flight, and room for more than any network has: nothing can be
# prepared inside a capture.
REMEMBERED = 1 << 16
WORKSPACE = 32 << 20  # bytes: what cuBLAS itself takes on an H100


class ProductOperations(Operations):
    """Matrix products: see device.ops.

    The arrays of the steady state are the same objects in every step. So what the library needs (its descriptors and
    the algorithm) is prepared once for the same objects, which are kept. Preparing may wait for the stream, so the
    first step must not be captured.
    """

    def __init__(self, device: Owner):
        super().__init__(device)
        self._products: dict[tuple[int | bool, ...], tuple[Product, tuple[Array | None, ...]]] = {}

    def matmul(
        self, a: Array, b: Array, out: Array, turn_a: bool = False, turn_b: bool = False, accumulate: bool = False
    ) -> None:
        key = id(a), id(b), id(out), turn_a, turn_b, accumulate
        known = self._products.get(key)
        if known is None:
            if not (out.size and a.size):  # libraries require sizes above 0
                if not accumulate:
                    cast("FlatOps", self).fill(out, 0.0)
                return
            known = self._prepare_product(key, Matrix(a, turn_a), Matrix(b, turn_b), out, accumulate, None)
        known[0].run(self.device.stream)

    def linear(self, x: Array, weight: Array, bias: Array | None, y: Array) -> None:
        key = id(x), id(weight), id(bias), id(y)
        known = self._products.get(key)
        if known is None:
            if not (y.size and x.size):
                if bias is None:
                    cast("FlatOps", self).fill(y, 0.0)
                else:
                    cast("FlatOps", self).copy(y, bias)
                return
            known = self._prepare_product(key, Matrix(x), Matrix(weight), y, False, bias)
        known[0].run(self.device.stream)

    def _prepare_product(
        self, key: tuple[int | bool, ...], a: Matrix, b: Matrix, out: Array, accumulate: bool, bias: Array | None
    ) -> tuple[Product, tuple[Array | None, ...]]:
        if len(self._products) == REMEMBERED:
            self._products.clear()
        workspace = self.scratch("product", (WORKSPACE,), np.uint8)
        product = self.device.runtime.product(
            a, b, out, accumulate=accumulate, bias=bias, tf32=self.device.tf32, workspace=workspace
        )
        known = self._products[key] = product, (a.array, b.array, out, bias)  # their ids are unique while they live
        return known
