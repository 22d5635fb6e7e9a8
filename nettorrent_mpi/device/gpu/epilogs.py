"""Epilogs: what a library's product does with its sums before it writes them, here the bias and then the ReLU.

A ReLU keeps NaN, as on the CPU: what is not finite is searched for in outputs. A library may lose it, since a GPU's
maximum of NaN and 0 is 0 (PTX ISA, `max` without .NaN), and each of its algorithms may differ. So every product is
tried with a bias of NaN when it is prepared. Where a number comes out, the ReLU is left to a kernel behind the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.flat import flat
from nettorrent_mpi.device.gpu.operations import KernelOperations
from nettorrent_mpi.device.gpu.runtime import Product
from nettorrent_mpi.device.ops import FlatOps
from nettorrent_mpi.plan.errors import NoPlanError

Prepare = Callable[[Array | None, bool], Product]
"""prepare(bias, relu) prepares a product with this epilog."""


class GpuEpilogOperations(KernelOperations):
    """The base of operations whose products may have a ReLU in their epilog."""

    def with_epilog(self, prepare: Prepare, bias: Array | None, relu: bool, y: Array) -> tuple[Product, bool]:
        """Prepare a product that computes y. Return it, and whether `relu` is left to do behind it. Waits."""
        if relu:
            # Without a bias the trial could not make NaN, and cuDNN has no ReLU for float64.
            some = self.device.constant(np.zeros(y.shape[-1:], y.dtype)) if bias is None else bias
            try:
                if self._keeps_nan(prepare, y):
                    return prepare(some, True), False
            except NoPlanError:
                pass
        return prepare(bias, False), relu

    def _keeps_nan(self, prepare: Prepare, y: Array) -> bool:
        """Whether NaN comes out where the ReLU gets NaN. Overwrites y."""
        ops = cast("FlatOps", self)
        nan = self.scratch("nan", y.shape[-1:], y.dtype)
        ops.fill(nan.view(np.uint8), 255)  # NaN in every type
        prepare(nan, True).run(self.device.stream)
        found, told = self.scratch("a number", (1,), np.float64), np.zeros(1)
        ops.fill(found, 0)
        self.each_pack("find_number", y.dtype, flat(y), y, found, y.size)
        self.device.download(told, found)
        return not told[0]
