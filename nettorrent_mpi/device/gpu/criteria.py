"""The losses and their gradients; nn.losses names their sources.

Sums of losses and counts are added to `metrics` on the device, in an order that depends on the sizes alone. Suffixes: b
rows of a micro-batch, O outputs.
"""

from __future__ import annotations

from typing import Any

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.flat import contiguous, flat
from nettorrent_mpi.device.gpu.operations import SUM_BLOCKS, KernelOperations
from nettorrent_mpi.device.gpu.views import type_code

ROWS = 4  # of a block of the kernels that give a warp to each row


class GpuCriterionOperations(KernelOperations):
    """Losses: see device.ops."""

    def cross_entropy(
        self, y_bO: Array, labels_b: Array, smoothing: float, total_1: Array, dy_bO: Array | None, metrics: Array,
        weights_O: Array | None = None,
    ) -> None:  # fmt: skip
        assert dy_bO is None or contiguous(dy_bO)
        memory = dy_bO, metrics, weights_O, total_1, *self.partial_sums()
        self._rows("cross_entropy", y_bO, labels_b, *memory, smoothing / y_bO.shape[1], 1.0 - smoothing, *y_bO.shape)

    def binary_cross_entropy(
        self, y_bO: Array, wanted_bO: Array, total_1: Array, dy_bO: Array | None, metrics: Array
    ) -> None:
        self._elements("binary_cross_entropy", 1.0, y_bO, wanted_bO, total_1, dy_bO, metrics)

    def squared_error(self, y_bO: Array, wanted_bO: Array, total_1: Array, dy_bO: Array | None, metrics: Array) -> None:
        self._elements("squared_error", 2.0, y_bO, wanted_bO, total_1, dy_bO, metrics)

    def one_hot(self, labels_b: Array, out_bO: Array) -> None:
        assert contiguous(labels_b)
        self.each(
            "one_hot", out_bO.dtype, flat(out_bO), labels_b, type_code(labels_b), out_bO, out_bO.size, out_bO.shape[1]
        )

    def count_right(self, y_bO: Array, labels_b: Array, metrics: Array) -> None:
        self._rows("count_right", y_bO, labels_b, metrics, *self.partial_sums(), *y_bO.shape)

    def count_same_side(self, y_bO: Array, wanted_bO: Array, metrics: Array) -> None:
        count = flat(y_bO, wanted_bO)
        self.sum("count_same_side", y_bO.dtype, count, y_bO, wanted_bO, metrics, *self.partial_sums(), count)

    def _rows(self, kernel: str, y_bO: Array, labels_b: Array, *more: Any) -> None:
        assert contiguous(y_bO, labels_b)
        grid = min(-(-len(y_bO) // ROWS), SUM_BLOCKS)
        self.launch(kernel, y_bO.dtype, grid, 32 * ROWS, y_bO, labels_b, type_code(labels_b), *more)

    def _elements(
        self,
        kernel: str,
        factor: float,
        y_bO: Array,
        wanted_bO: Array,
        total_1: Array,
        dy_bO: Array | None,
        metrics: Array,
    ) -> None:
        count = flat(y_bO, wanted_bO) if dy_bO is None else flat(y_bO, wanted_bO, dy_bO)
        memory = y_bO, wanted_bO, dy_bO, metrics, total_1, *self.partial_sums()
        self.sum(kernel, y_bO.dtype, count, *memory, factor, count, y_bO.shape[1])
