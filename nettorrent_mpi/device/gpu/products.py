"""Matrix products are computed by the runtime's library, with the fastest algorithm for their shapes.

A bias and a ReLU are part of the product (epilogs.py). GELU is not: the layer computes the exact one, by erf, and
cublasLt's is the approximation by tanh.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.epilogs import GpuEpilogOperations
from nettorrent_mpi.device.gpu.operations import Owner
from nettorrent_mpi.device.gpu.runtime import Matrix, Product
from nettorrent_mpi.device.ops import FlatOps, LayerOps

# Prepared products: three per layer and micro-batch in flight, and room for more than any network has: nothing can be
# prepared inside a capture.
REMEMBERED = 1 << 16
WORKSPACE = 32 << 20  # bytes: what cuBLAS itself takes on an H100


class Ready(NamedTuple):
    """A product that is Ready to run: whether a ReLU is left to do, and the arrays that live as long."""

    product: Product
    relu: bool
    kept: tuple[Array | None, ...]


class GpuProductOperations(GpuEpilogOperations):
    """Matrix products: see device.ops.

    The arrays of the steady state are the same objects in every step. So what the library needs (its descriptors and
    the algorithm) is prepared once for the same objects, which are kept. Preparing may wait for the stream, so the
    first step must not be captured.
    """

    def __init__(self, device: Owner):
        super().__init__(device)
        self._products: dict[tuple[int | bool, ...], Ready] = {}

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
            product = self._product(Matrix(a, turn_a), Matrix(b, turn_b), out, accumulate=accumulate)
            known = self._remember(key, Ready(product, False, (a, b, out)))
        known.product.run(self.device.stream)

    def linear(self, x: Array, weight: Array, bias: Array | None, y: Array, relu: bool = False) -> None:
        key = id(x), id(weight), id(bias), id(y), relu
        known = self._products.get(key)
        if known is None:
            if not (y.size and x.size):
                if bias is None:
                    cast("FlatOps", self).fill(y, 0.0)
                else:
                    cast("FlatOps", self).copy(y, bias)
                if relu:
                    cast("LayerOps", self).relu(y, y)
                return

            def prepare(bias: Array | None, relu: bool) -> Product:
                return self._product(Matrix(x), Matrix(weight), y, bias=bias, relu=relu)

            known = self._remember(key, Ready(*self.with_epilog(prepare, bias, relu, y), (x, weight, bias, y)))
        known.product.run(self.device.stream)
        if known.relu:
            cast("LayerOps", self).relu(y, y)

    def _product(
        self, a: Matrix, b: Matrix, out: Array, accumulate: bool = False, bias: Array | None = None, relu: bool = False
    ) -> Product:
        workspace = self.scratch("product", (WORKSPACE,), np.uint8)
        return self.device.runtime.product(
            a, b, out, accumulate=accumulate, bias=bias, relu=relu, tf32=self.device.tf32, workspace=workspace
        )

    def _remember(self, key: tuple[int | bool, ...], ready: Ready) -> Ready:
        """Keep a product for the arrays that it is ready for: their ids are unique as long as they live."""
        if len(self._products) == REMEMBERED:
            self._products.clear()
        self._products[key] = ready
        return ready
