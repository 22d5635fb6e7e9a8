"""A rank's share of the model: blocks of arrays in global coordinates, in one flat buffer.

All trainable blocks of a rank lie one after another in one flat array, their gradients in another alike, so that sums
and updates are single passes over memory. The flat array is cut into segments by who holds the same block: with
cols = 1 there is one, held alike by all ranks of the swarm; with more, the blocks that are divided over the cols are
held by the ranks of the same col, and the few that are not (`Parameter.replicated_sum`) by the whole swarm.

Inside a segment each holder updates one part (a shard) of the elements and keeps the optimizer's state for these
alone; the holders then give each other their parts (ZeRO stage 1, Rajbhandari et al. 2020). An optimizer works element
by element, so this is the serial result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nettorrent_mpi.comm.mpi import Group
from nettorrent_mpi.nn.backend import Array, aligned
from nettorrent_mpi.nn.initial import initial_value
from nettorrent_mpi.nn.layer import Parameter
from nettorrent_mpi.nn.optimizers import Optimizer
from nettorrent_mpi.plan.blocks import Span, span
from nettorrent_mpi.plan.errors import DataError

LINE = 16  # blocks begin at multiples of this many elements: a cache line of float32


@dataclass
class Segment:
    """A stretch of the flat arrays that `group` holds alike; `counts` elements of it are each member's shard."""

    group: Group
    stretch: Span
    counts: list[int]
    shard: Span  # this rank's, in the flat arrays
    optimizer: dict[str, Array]  # this shard's state


class State:
    """Parameters, gradients, running statistics and optimizer state of one rank's stage.

    `params` and `grads` map "<layer>/<name>" to this rank's blocks: views of the flat arrays (running statistics are
    arrays of their own, not in `grads`).
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
        places: dict[str, Span] = {}
        first = _lay_out(divided, places, 0)
        total = _lay_out(replicated, places, first)
        self.flat = aligned(total, dtype)
        self.flat_grads = aligned(total, dtype)
        self.flat[...] = 0
        self.flat_grads[...] = 0
        for key, parameter in parameters:
            value = initial_value(parameter, seed, key.rpartition("/")[0])[parameter.index]
            if parameter.trainable:
                place = places[key]
                self.params[key] = self.flat[slice(*place)].reshape(parameter.local)
                self.grads[key] = self.flat_grads[slice(*place)].reshape(parameter.local)
                self.params[key][...] = value
            else:
                self.params[key] = value.astype(self.dtype)
        self.segments = [
            _segment(group, stretch, optimizer, self.dtype)
            for group, stretch in ((sums, Span(0, first)), (swarm, Span(first, total)))
            if stretch.size
        ]

    def load(self, whole: Mapping[str, Array]) -> None:
        """Take this rank's blocks from whole arrays "<layer>/<name>". Raises DataError where one does not fit."""
        for key, parameter in self.parameters.items():
            if key not in whole or whole[key].shape != parameter.shape:
                found = f"has shape {whole[key].shape}" if key in whole else "is missing"
                raise DataError(f"array {key} {found}, the network wants {parameter.shape}; is it another network's?")
        for key, parameter in self.parameters.items():
            self.params[key][...] = whole[key][parameter.index]

    def blocks(self) -> Iterator[tuple[str, Parameter, Array]]:
        """(key, parameter, this rank's block) of every array, running statistics too, in the network's order."""
        for key, parameter in self.parameters.items():
            yield key, parameter, self.params[key]


def _lay_out(parameters: Sequence[tuple[str, Parameter]], places: dict[str, Span], start: int) -> int:
    for key, parameter in parameters:
        size = int(np.prod(parameter.local, dtype=np.int64))
        places[key] = Span(start, start + size)
        start += -(-size // LINE) * LINE
    return start


def _segment(group: Group, stretch: Span, optimizer: Optimizer, dtype: Any) -> Segment:
    lines = stretch.size // LINE
    counts = [LINE * span(lines, group.size, i).size for i in range(group.size)]
    start = stretch.start + sum(counts[: group.index])
    shard = Span(start, start + counts[group.index])
    return Segment(group, stretch, counts, shard, optimizer.init(shard.size, dtype))
