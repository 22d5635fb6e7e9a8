"""A ChannelTeam is the team of a stage, as its layers see it, over channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from nettorrent_mpi.comm.channels import Channel
from nettorrent_mpi.device.arrays import Array, Shape, Workspace
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.plan.blocks import Span, span


class ChannelTeam:
    """A ChannelTeam implements nn.layer.Team: the collective operations of layers among the ranks of a stage, on any
    device.

    `holders` connects all ranks that hold other rows of the micro-batch: of the team, and of all replicas where they
    are exact; `cols` those that hold other neurons of the same rows.
    """

    def __init__(self, device: Device, holders: Channel, cols: Channel):
        self._ops, self._holders, self._cols = device.ops, holders, cols
        self.cols, self.col = cols.group.size, cols.group.index
        self.holders, self.holder = holders.group.size, holders.group.index

    def sum_over_rows(self, values: Array) -> None:
        """All-reduce over the holders."""
        self._holders.all_reduce(values)

    def gather_over_rows(self, parts: Array) -> None:
        """All-gather over the holders: everyone gets everyone's row of `parts`."""
        if self.holders > 1:
            self._holders.all_gather(parts[self.holder], parts.reshape(-1))

    def sum_over_cols(self, values: Array) -> None:
        """All-reduce over the cols."""
        self._cols.all_reduce(values)

    def gather_cols(self, part: Array, whole: Array, workspace: Workspace) -> None:
        """All-gather: whole_b..C <- part_b..c of all cols. Every col's part travels flat and is then put in place."""
        if self.cols == 1:
            self._ops.copy(whole, part)
            return
        counts = self._counts(whole.shape)
        flat = workspace.scratch("gather", (sum(counts),))
        own = part.reshape(-1)
        if own.size < counts[self.col]:
            own = self._section(flat, counts, self.col)
            self._ops.copy(own[: part.size].reshape(part.shape), part)
        self._cols.all_gather(own, flat, counts)
        for features, piece in self._pieces(flat, counts, whole.shape):
            self._ops.copy(whole[..., slice(*features)], piece)

    def scatter_cols(self, partial_whole: Array, part: Array, workspace: Workspace) -> None:
        """Reduce-scatter: part_b..c <- this col's slice of the sum over cols of partial_whole_b..C."""
        if self.cols == 1:
            self._ops.copy(part, partial_whole)
            return
        counts = self._counts(partial_whole.shape)
        flat = workspace.scratch("scatter", (sum(counts),))
        for features, piece in self._pieces(flat, counts, partial_whole.shape):
            self._ops.copy(piece, partial_whole[..., slice(*features)])
        own = part.reshape(-1)
        if own.size == counts[self.col]:
            self._cols.reduce_scatter(flat, own, counts)
            return
        own = self._section(flat, counts, self.col)
        self._cols.reduce_scatter(flat, own, counts)
        self._ops.copy(part, own[: part.size].reshape(part.shape))

    def _counts(self, shape: Shape) -> list[int]:
        """Return how many elements travel for each col: those of its features, or as many as for the widest col where
        parts have to be equal; what fills them up is never read."""
        widths = [span(shape[-1], self.cols, c).size for c in range(self.cols)]
        if self._cols.equal_parts:
            widths = [max(widths)] * self.cols
        return [prod(shape[:-1]) * width for width in widths]

    def _pieces(self, flat: Array, counts: Sequence[int], shape: Shape) -> Iterator[tuple[Span, Array]]:
        """Yield (features, their part of the flat array) for every col."""
        for c in range(self.cols):
            features = span(shape[-1], self.cols, c)
            inner = (*shape[:-1], features.size)
            yield features, self._section(flat, counts, c)[: prod(inner)].reshape(inner)

    @staticmethod
    def _section(flat: Array, counts: Sequence[int], col: int) -> Array:
        return flat[sum(counts[:col]) :][: counts[col]]
