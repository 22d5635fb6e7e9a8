"""Weight gradients are computed in parts, each from all rows, so that nothing remains to be reduced.

The gradient of a linear layer's weights is x_BI.T @ dy_Bo over all rows B of the mini-batch. Ranks that divide the rows
can each multiply their own rows and add up the results: every rank then writes a matrix of the size of the weights and
reads a part of everybody's. Or each computes its shard of the matrix from all rows: the same number of operations, in
taller products, while only x and dy are written and read. Where the ranks share memory and the mini-batch is small for
the layer, that moves much less data (`plan.sizes.in_parts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from nettorrent_mpi.comm.reducers import Reducer
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.nn.layer import Context, Operands
from nettorrent_mpi.plan.blocks import Span


class SharedOperands(Operands):
    """SharedOperands are x_BI and dy_Bo of a weight gradient for the rows B of a mini-batch, in memory shared by the
    weights' holders."""

    def __init__(self, device: Device, x_BI: Array, dy_Bo: Array):
        self._device, self._x, self._dy = device, x_BI, dy_Bo
        self._pieces: list[_Piece] = []
        self._views: dict[int, tuple[Array, list[Array]]] = {}

    def put(self, x_bI: Array, dy_bo: Array, ctx: Context) -> None:
        ctx.ops.copy(self._x[slice(*ctx.rows)], x_bI)
        ctx.ops.copy(self._dy[slice(*ctx.rows)], dy_bo)

    def own(self, part: Span, out: Array) -> None:
        """Make these elements of the flat matrix this rank's part of the gradient; `multiply` writes it to `out`."""
        units = self._dy.shape[1]
        full = Span(-(-part.start // units), part.stop // units)  # whole rows of the matrix: one for each input
        cuts = sorted({part.start, *(cut * units for cut in full if part.start < cut * units < part.stop), part.stop})
        self._pieces = [
            _Piece(self._device, start, stop, units, out[start - part.start : stop - part.start])
            for start, stop in pairwise(cuts)
        ]

    def multiply(self, count: int) -> None:
        """Compute this rank's part for a mini-batch of `count` rows, once all holders have put theirs."""
        views = self._views.get(count)
        if views is None:
            x, dy = self._x[:count], self._dy[:count]
            views = self._views[count] = dy, [x[:, slice(*piece.inputs)] for piece in self._pieces]
        dy, xs = views
        for piece, x in zip(self._pieces, xs, strict=True):
            piece.multiply(x, dy)


class _Piece:
    """A _Piece has the elements from start to stop of the flat matrix: whole rows, or a part of one row."""

    def __init__(self, device: Device, start: int, stop: int, units: int, out: Array):
        self.inputs = Span(start // units, -(-stop // units))
        self._ops, self._out, self._skip = device.ops, out, start % units
        self._whole = out.size == self.inputs.size * units
        self._into = (out if self._whole else device.empty((units,), out.dtype)).reshape(-1, units)

    def multiply(self, x: Array, dy: Array) -> None:
        self._ops.matmul(x, dy, self._into, turn_a=True)
        if not self._whole:
            self._ops.copy(self._out, self._into[0, self._skip : self._skip + self._out.size])


class PartsReducer(Reducer):
    """A PartsReducer computes each holder's shard of the gradients from everyone's operands, in memory that the holders
    share."""

    def __init__(self, operands: Sequence[SharedOperands]):
        self._operands = operands

    def multiply(self, rows: int) -> None:
        for each in self._operands:
            each.multiply(rows)
