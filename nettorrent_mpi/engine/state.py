"""A rank's share of the model: blocks of arrays in global coordinates, in few flat arrays.

All trainable blocks of a rank lie in segments, by who holds the same block: with cols = 1 all ranks of the swarm hold
them alike; with more, the blocks that are divided over the cols are held by the ranks of the same col, and the few that
are not (`Parameter.replicated_sum`) by the whole swarm. (Where the exchange is not exact, replicas differ: then the
holders are of one team.) A segment is one flat array of parameters and one of gradients, so that sums and updates are
single passes over memory. In shared memory there is one for each of these groups of holders. Between nodes there are
several, in the order in which backward completes them: sums of one travel while backward is still at the others.
Running statistics lie in flat arrays of their own.

Inside a segment each holder updates one part (a shard) of the elements and keeps the optimizer's state for these
alone; the holders then give each other their parts (ZeRO stage 1, Rajbhandari et al. 2020). An optimizer works element
by element, so this is the serial result. Holders on one node keep one array of parameters in shared memory and read
each other's gradients there: nothing is sent or copied. As every element has one owner, what its owner alone does to it
(an average with other replicas) leaves all holders bitwise alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.ring import Rings, can_carry
from nettorrent_mpi.comm.shared import SharedMemory, by_nodes, fits, whole_on_one_node
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.engine.operands import SharedOperands
from nettorrent_mpi.engine.segments import Flat, Segment, round_up
from nettorrent_mpi.nn.initial import initial_value
from nettorrent_mpi.nn.layer import Parameter
from nettorrent_mpi.nn.optimizers import Optimizer
from nettorrent_mpi.plan.cost import in_parts

BUCKET = 1 << 20  # bytes of a segment at which it is full, where segments travel in messages
LEAST_SHARD = 16 << 10  # bytes: below, many short messages one after the other take longer than MPI's own algorithms


def buckets(sizes: dict[str, int], full: int, least: int) -> list[list[str]]:
    """The blocks, given in the order of the layers, cut into groups in the order in which backward completes them. One
    with so many elements is full; one of fewer than `least` joins the one before. A layer's blocks stay together."""
    made: list[list[str]] = []
    filled, layer = full, ""
    for key in reversed(sizes):
        above, layer = layer, key.partition("/")[0]
        if filled >= full and layer != above:
            made.append([])
            filled = 0
        made[-1].insert(0, key)
        filled += sizes[key]
    if len(made) > 1 and filled < least:
        last = made.pop()
        made[-1] = last + made[-1]
    return made


class State:
    """Parameters, gradients, running statistics and optimizer state of one rank's stage.

    `params` and `grads` map "<layer>/<name>" to this rank's blocks: views of the flat arrays (running statistics are
    not in `grads`). `stashed[i]` maps to the blocks of an earlier version. `flats` are all flat arrays: `segments` and
    `statistics`. Every holder makes one at the same time. `sums` holds the blocks that are divided over the cols alike,
    `whole` those that are not. The gradient of some (`Parameter.product`) is one product over the `rows` of a
    mini-batch (0: not all of them are the holders'): where `grads` has `operands` for it, holders compute it in parts.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, Parameter]],
        optimizer: Optimizer,
        *,
        dtype: Any,
        seed: int,
        sums: Group,
        whole: Group,
        stashes: int = 0,
        device: Device,
        rows: int = 0,
    ):
        self.parameters = dict(parameters)
        self.dtype = np.dtype(dtype)
        self.params: dict[str, Array] = {}
        self.grads: dict[str, Array | SharedOperands] = {}
        self.segments: list[Segment] = []
        self.statistics: list[Flat] = []
        self.rings = Rings()
        self._ring_groups: list[Group] = []
        self._device = device
        self.operands: dict[str, SharedOperands] = {}
        self._operands_memory: list[SharedMemory] = []
        self._rows = rows
        for group, replicated in ((sums, False), (whole, True)):
            trainable = {key: p for key, p in parameters if p.trainable and p.replicated_sum == replicated}
            others = {key: p for key, p in parameters if not p.trainable and (p.axis is None) == replicated}
            if trainable:
                self._make_segments(group, trainable, optimizer, stashes)
            if others:
                self.statistics.append(Flat(group, others, self.dtype))
        self.segments.sort(key=lambda segment: -segment.first)  # in the order in which backward completes them
        for flat in self.flats:
            self.params |= flat.blocks(self.parameters, flat.params)
        shared: list[Group] = []
        for segment in self.segments:
            self.grads |= segment.operands or segment.blocks(self.parameters, segment.grads)
            segment.meets = segment.group not in shared
            shared.append(segment.group)
        self.meet()
        for flat in self.flats:
            if not isinstance(flat, Segment) or flat.shared is None or flat.group.index == 0:
                for key in flat.places:
                    self.params[key][...] = _first_block(key, self.parameters[key], seed)
        self.meet()
        self.stashed: list[dict[str, Array]] = []
        for i in range(stashes):
            blocks = dict(self.params)
            for segment in self.segments:
                blocks |= segment.blocks(self.parameters, segment.stashes[i])
            self.stashed.append(blocks)

    def _make_segments(self, group: Group, blocks: Mapping[str, Parameter], optimizer: Optimizer, stashes: int) -> None:
        """One segment, or several where sums of one can travel while backward is still at others."""
        number = {key: i for i, key in enumerate(self.parameters)}

        def segment(keys: Sequence[str], operands: Mapping[str, SharedOperands] | None = None) -> Segment:
            chosen = {key: blocks[key] for key in keys}
            first = min(number[key] for key in keys)
            made = Segment(group, chosen, self.dtype, stashes, shared=shared, first=first, operands=operands)
            made.optimizer = optimizer.init(self._device, made.counts[group.index], self.dtype)
            return made

        sizes = {key: round_up(math.prod(parameter.local)) for key, parameter in blocks.items()}
        total = sum(sizes.values()) * self.dtype.itemsize
        shared = group.size > 1 and whole_on_one_node(group) and fits(group, (group.size + 1 + stashes) * total)
        least = LEAST_SHARD * group.size // self.dtype.itemsize
        operands = self._make_operands(group, blocks) if shared else {}
        if operands:
            self.segments.append(segment(list(operands), operands))
            self.operands |= operands
        rest = {key: size for key, size in sizes.items() if key not in operands}
        if not rest:
            return
        whole = shared or group.size == 1
        made = [list(rest)] if whole else buckets(rest, max(BUCKET // self.dtype.itemsize, least), least)
        segments = [segment(keys) for keys in made]
        self.segments += segments
        if (
            not shared
            and group.size > 1
            and all(can_carry(s.counts, self.dtype.itemsize, LEAST_SHARD) for s in segments)
        ):
            order, apart = by_nodes(group), group.duplicate()
            self._ring_groups.append(apart)
            tag = 0
            for each in segments:
                tag = each.join(self.rings, apart, order, tag)

    def _make_operands(self, group: Group, blocks: Mapping[str, Parameter]) -> dict[str, SharedOperands]:
        """For the weights whose gradient the members compute in parts. All of them call."""
        shapes = {
            key: parameter.local
            for key, parameter in blocks.items()
            if parameter.product and in_parts(self._rows, group.size, parameter.local[0], parameter.local[1])
        }
        sizes = [round_up(self._rows * length) for shape in shapes.values() for length in shape]
        if not sizes or not fits(group, sum(sizes) * self.dtype.itemsize):
            return {}
        memory = SharedMemory(group, [sum(sizes), *[0] * (group.size - 1)], self.dtype)
        self._operands_memory.append(memory)
        ends = np.cumsum(sizes)
        arrays = [
            memory.parts[0][end - size :][: self._rows * length].reshape(self._rows, length)
            for end, size, length in zip(ends, sizes, (n for shape in shapes.values() for n in shape), strict=True)
        ]
        return {key: SharedOperands(x, dy) for key, x, dy in zip(shapes, arrays[::2], arrays[1::2], strict=True)}

    @property
    def flats(self) -> list[Flat]:
        return [*self.segments, *self.statistics]

    def share(self) -> None:
        """All-gather the shards among all who hold the same blocks. Every holder calls."""
        for flat in self.flats:
            flat.share()

    def meet(self) -> None:
        """Wait for all who hold the same blocks, after arrays were written by hand. Every holder calls."""
        for segment in self.segments:
            segment.meet()

    def free(self) -> None:
        """Give shared memory back. Every holder calls; the arrays may not be used any more."""
        self.params.clear()
        self.grads.clear()
        self.stashed.clear()
        self.rings.free()
        for group in self._ring_groups:
            group.comm.Free()
        self._ring_groups.clear()
        for memory in self._operands_memory:
            memory.free()
        self._operands_memory.clear()
        for segment in self.segments:
            segment.free()
        self.segments.clear()


def _first_block(key: str, parameter: Parameter, seed: int) -> Array:
    """This rank's block of the initial value, which is the serial run's."""
    return initial_value(parameter, seed, key.rpartition("/")[0])[parameter.index]
