"""A rank's share of the model: blocks of arrays in global coordinates, in few flat arrays.

All trainable blocks of a rank lie in segments, by who holds the same block: with cols = 1 there is one segment, held
alike by all ranks of the swarm; with more, the blocks that are divided over the cols are held by the ranks of the same
col, and the few that are not (`Parameter.replicated_sum`) by the whole swarm. A segment is one flat array of
parameters and one of gradients, so that sums and updates are single passes over memory.

Inside a segment each holder updates one part (a shard) of the elements and keeps the optimizer's state for these
alone; the holders then give each other their parts (ZeRO stage 1, Rajbhandari et al. 2020). An optimizer works element
by element, so this is the serial result. Holders on one node keep one array of parameters in shared memory and read
each other's gradients there: nothing is sent or copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nettorrent_mpi.comm.mpi import Group
from nettorrent_mpi.comm.shared import SharedMemory, fits, whole_on_one_node
from nettorrent_mpi.nn.backend import Array, aligned
from nettorrent_mpi.nn.initial import initial_value
from nettorrent_mpi.nn.layer import Parameter
from nettorrent_mpi.nn.optimizers import Optimizer
from nettorrent_mpi.plan.blocks import span

LINE = 16  # blocks begin at multiples of this many elements: a cache line of float32


class Segment:
    """Blocks that all members of `group` hold alike, one after another.

    `params` and `grads` are flat; `counts` of their elements are each member's shard, `shard` is this rank's. `sums`
    is for the summed gradients of the shard, `optimizer` holds its state. In shared memory (`shared` is not None) there
    is one `params` for all members, and `all_grads` holds everyone's gradients.
    """

    def __init__(self, group: Group, size: int, optimizer: Optimizer, dtype: Any):
        self.group = group
        self.places: dict[str, slice] = {}  # "<layer>/<name>" -> where the block lies
        self.counts = [LINE * span(size // LINE, group.size, i).size for i in range(group.size)]
        start = sum(self.counts[: group.index])
        self.shard = slice(start, start + self.counts[group.index])
        self.optimizer = optimizer.init(self.counts[group.index], dtype)
        self.shared: SharedMemory | None = None
        if group.size > 1 and whole_on_one_node(group) and fits(group, (group.size + 1) * size * dtype.itemsize):
            self.shared = SharedMemory(group, [2 * size, *[size] * (group.size - 1)], dtype)
            self.params = self.shared.parts[0][size:]
            self.all_grads = [part[:size] for part in self.shared.parts]
        else:
            self.params = aligned(size, dtype)
            self.all_grads = []
        self.grads = self.all_grads[group.index] if self.all_grads else aligned(size, dtype)
        self.sums = aligned(self.counts[group.index], dtype) if group.size > 1 else self.grads
        self.grads[...] = 0
        self.params[self.shard] = 0  # the gaps between the blocks, too

    def meet(self) -> None:
        """Wait until all members have come here, where they share memory."""
        if self.shared is not None:
            self.shared.meet()


class State:
    """Parameters, gradients, running statistics and optimizer state of one rank's stage.

    `params` and `grads` map "<layer>/<name>" to this rank's blocks: views of the segments' arrays (running statistics
    are arrays of their own, not in `grads`). Every holder makes one at the same time.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, Parameter]],
        optimizer: Optimizer,
        *,
        dtype: Any,
        seed: int,
        sums: Group,
        swarm: Group,
    ):
        self.parameters = dict(parameters)
        self.dtype = np.dtype(dtype)
        self.params: dict[str, Array] = {}
        self.grads: dict[str, Array] = {}
        trainable = [(key, p) for key, p in parameters if p.trainable]
        divided = [(key, p) for key, p in trainable if not p.replicated_sum]
        replicated = [(key, p) for key, p in trainable if p.replicated_sum]
        self.segments: list[Segment] = []
        for group, blocks in ((sums, divided), (swarm, replicated)):
            if blocks:
                self._add(group, blocks, optimizer, seed)
        for key, parameter in parameters:
            if not parameter.trainable:
                self.params[key] = _first_block(key, parameter, seed).astype(self.dtype)

    def _add(self, group: Group, blocks: Sequence[tuple[str, Parameter]], optimizer: Optimizer, seed: int) -> None:
        """Lay the blocks out in a new segment and give them their initial values."""
        places: dict[str, slice] = {}
        size = 0
        for key, parameter in blocks:
            length = int(np.prod(parameter.local, dtype=np.int64))
            places[key] = slice(size, size + length)
            size += -(-length // LINE) * LINE
        segment = Segment(group, size, optimizer, self.dtype)
        segment.places = places
        segment.meet()
        for key, parameter in blocks:
            self.params[key] = segment.params[places[key]].reshape(parameter.local)
            self.grads[key] = segment.grads[places[key]].reshape(parameter.local)
            if segment.shared is None or group.index == 0:
                self.params[key][...] = _first_block(key, parameter, seed)
        segment.meet()
        self.segments.append(segment)

    def meet(self) -> None:
        """Wait for all who hold the same blocks, after arrays were written by hand. Every holder calls."""
        for segment in self.segments:
            segment.meet()

    def free(self) -> None:
        """Give shared memory back. Every holder calls; the arrays may not be used any more."""
        self.params.clear()
        self.grads.clear()
        for segment in self.segments:
            if segment.shared is not None:
                segment.shared.free()
        self.segments.clear()


def _first_block(key: str, parameter: Parameter, seed: int) -> Array:
    """This rank's block of the initial value, which is the serial run's."""
    return initial_value(parameter, seed, key.rpartition("/")[0])[parameter.index]
