"""Buckets are flat arrays of blocks that the same ranks hold alike and that are reduced and gathered as one.

With cols = 1 all ranks of the swarm hold a stage's blocks alike. With more cols, blocks that are divided over the cols
are held by the ranks of the same col, and the few that are not (`Parameter.replicated_sum`) by the whole swarm. (Where
the exchange is not exact, replicas differ, and the holders are ranks of one team.)

Each holder updates one part (a shard) of a bucket's elements and keeps the optimizer state of that shard only.
Optimizers work element by element, so the result is that of the serial run. Since every element has one owner, changes
that the owner makes on its own (averaging with other replicas) leave all holders bitwise alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nettorrent_mpi.comm.channels import Channel
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.reducers import ChannelReducer, Reducer, SharedReducer
from nettorrent_mpi.comm.shared import SharedMemory
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.engine.operands import PartsReducer, SharedOperands
from nettorrent_mpi.nn.layer import Parameter
from nettorrent_mpi.nn.optimizers import Optimizer
from nettorrent_mpi.plan.blocks import Span, overlap
from nettorrent_mpi.plan.moves import Box, boxes_of_range

LINE = 16  # blocks begin at multiples of this many elements: a cache line of float32


def round_up(length: int) -> int:
    """Return the number of elements that a block of this length occupies."""
    return -(-length // LINE) * LINE


def divisible(size: int, members: int) -> int:
    """Return the size of a flat array of at least `size` elements whose shards, of whole lines, are all equal."""
    return -(-size // (LINE * members)) * LINE * members


class Flat:
    """A Flat has an array `params` of blocks that all members of `group` hold alike, one after another.

    `counts` gives the elements that each member owns, which are equal: GPUs reduce equal parts only. `shard` are this
    rank's, and `weights` their values; `places` gives the position of each block "<layer>/<name>".
    """

    def __init__(self, device: Device, group: Group, blocks: Mapping[str, Parameter], dtype: Any):
        self.device, self.group, self.parameters, self.dtype = device, group, blocks, np.dtype(dtype)
        self.places: dict[str, slice] = {}
        size = 0
        for key, parameter in blocks.items():
            length = math.prod(parameter.local)
            self.places[key] = slice(size, size + length)
            size += round_up(length)
        self.size = divisible(size, group.size)
        self.counts = [self.size // group.size] * group.size
        self.shard = self.shard_of(group.index)
        self.params: Array
        self.weights: Array

    def _axes(self, key: str) -> tuple[int, ...]:
        """Return the axes of a block in their order in memory."""
        parameter = self.parameters[key]
        return self.device.filter_axes if parameter.filters else tuple(range(len(parameter.shape)))

    def blocks(self, flat: Array) -> dict[str, Array]:
        """Return the blocks in `flat` as views of their shapes; filters may be turned views."""
        return {
            key: _view(flat[place], self.parameters[key].local, self._axes(key)) for key, place in self.places.items()
        }

    def shard_of(self, member: int) -> slice:
        """Return the elements that this member owns."""
        start = sum(self.counts[:member])
        return slice(start, start + self.counts[member])

    def shard_boxes(self, shard: Array, member: int | None = None) -> Iterator[tuple[str, Box, Array]]:
        """Yield the parts of blocks in `shard`, an array of this rank's elements, or of this `member`'s: (key, box of
        the whole array, view)."""
        owned = self.shard if member is None else self.shard_of(member)
        for key, place in self.places.items():
            start, stop = max(place.start, owned.start), min(place.stop, owned.stop)
            axes, whole = self._axes(key), self.parameters[key].box
            in_memory = tuple(whole[axis] for axis in axes)
            for begin, part in boxes_of_range(in_memory, start - place.start, stop - place.start):
                at = place.start + begin - owned.start
                box = tuple(part[axes.index(axis)] for axis in range(len(axes)))
                shape = [each.size for each in box]
                yield key, box, _view(shard[at : at + math.prod(shape)], shape, axes)

    def gaps(self) -> list[Span]:
        """Return the elements of this rank's shard that belong to no block."""
        ends = [0, *(place.stop for place in self.places.values())]
        starts = [*(place.start for place in self.places.values()), self.size]
        shard = Span(self.shard.start, self.shard.stop)
        found = [overlap(Span(*each), shard) for each in zip(ends, starts, strict=True)]
        return [Span(gap.start - shard.start, gap.stop - shard.start) for gap in found if gap.size]

    def clear_gaps(self, shard: Array) -> None:
        """Set the `gaps` to zero in an array of this rank's elements. At rest."""
        for gap in self.gaps():
            self.device.ops.fill(shard[slice(*gap)], 0)


def _view(flat: Array, shape: Sequence[int], axes: tuple[int, ...]) -> Array:
    """Return flat memory, in which the axes of an array follow each other in this order, as the array of `shape`."""
    if axes == tuple(range(len(axes))):
        return flat.reshape(shape)
    return flat.reshape([shape[axis] for axis in axes]).transpose([axes.index(axis) for axis in range(len(axes))])


class Statistics(Flat):
    """Statistics are the running ones of batch norm: no optimizer updates them, and every holder computes the same
    values."""

    def __init__(self, device: Device, channel: Channel, blocks: Mapping[str, Parameter], dtype: Any):
        group = channel.group
        super().__init__(device, group, blocks, dtype)
        self.params = device.zeros((self.size,), dtype)  # the gaps between the blocks, too
        self.weights = self.params[self.shard]
        self.reducer: Reducer = Reducer()
        if group.size > 1:
            self.reducer = ChannelReducer(channel, self.params, self.params, self.params)


class Bucket(Flat):
    """A Bucket has trainable blocks: `params`, their gradients `grads`, the shard's reduced gradients (`reduced`) and
    optimizer state. `versions` has room for earlier versions of `params`. The optimizer changes `weights`: the shard of
    `params`, or, where layers compute in a shorter type, what the shard is rounded from (`round`).

    `first` is the position of its earliest block among the stage's parameters: once the backward pass has come there,
    all its gradients are written. In shared memory (`memory`) all holders use one `params`. With `operands`, one for
    each block, there are no `grads`: each holder computes the gradient of its shard from all rows (engine/operands.py).
    """

    def __init__(
        self,
        device: Device,
        channel: Channel,
        blocks: Mapping[str, Parameter],
        optimizer: Optimizer,
        dtype: Any,
        *,
        weights_dtype: Any,
        gradients_dtype: Any,
        first: int,
        versions: int,
        memory: SharedMemory | None = None,
        operands: Mapping[str, SharedOperands] | None = None,
    ):
        group = channel.group
        super().__init__(device, group, blocks, dtype)
        self.first, self.memory, self.operands = first, memory, operands or {}
        self.optimizer = optimizer.init(device, self.counts[group.index], weights_dtype)
        self.rounded = weights_dtype != self.dtype
        self.reducer: Reducer = Reducer()
        size, copies = self.size, 1 + versions  # of params
        if memory is not None:
            self.params, *self.versions = (memory.take_common(size) for _ in range(copies))
            device.ops.fill(self.params[self.shard], 0)
            self.weights = self._weights(weights_dtype)
            taken = memory.take_own(0 if operands else size * gradients_dtype.itemsize // self.dtype.itemsize)
            all_grads = [each.view(gradients_dtype) for each in taken]
            self.grads = all_grads[group.index]
            device.ops.fill(self.grads, 0)
            self.reduced = device.zeros((self.counts[group.index],), gradients_dtype)  # gaps between blocks, too
            if operands:
                self.reducer = PartsReducer(list(operands.values()))
                for key, each in operands.items():
                    self._own(key, each)
            else:
                self.reducer = SharedReducer(device, [grads[self.shard] for grads in all_grads], self.reduced)
            return
        self.params, *self.versions = (device.zeros((size,), dtype) for _ in range(copies))
        self.weights = self._weights(weights_dtype)
        self.grads = device.zeros((size,), gradients_dtype)
        self.reduced = self.grads
        if group.size > 1:
            self.reduced = device.zeros((self.counts[group.index],), gradients_dtype)
        if group.size > 1:
            self.reducer = ChannelReducer(channel, self.params, self.grads, self.reduced)

    def _weights(self, dtype: Any) -> Array:
        """Return what the optimizer changes: a part of `params`, or an array of its own that these are rounded from."""
        if self.rounded:
            return self.device.zeros((self.counts[self.group.index],), dtype)
        return self.params[self.shard]

    def _own(self, key: str, operands: SharedOperands) -> None:
        """Let the operands write this rank's part of their block's gradient into `reduced`."""
        place = self.places[key]
        start = min(max(place.start, self.shard.start), self.shard.stop)
        stop = max(start, min(place.stop, self.shard.stop))
        into = self.reduced[start - self.shard.start : stop - self.shard.start]
        operands.own(Span(start - place.start, stop - place.start), into)

    def round(self) -> None:
        """Set the shard of `params` to the weights."""
        if self.rounded:
            self.device.ops.copy(self.params[self.shard], self.weights)

    def keep_version(self, number: int) -> None:
        """Copy the parameters to versions[number]. All holders call, before any of them changes its shard."""
        part = self.shard if self.memory is not None else slice(None)
        self.device.ops.copy(self.versions[number][part], self.params[part])
