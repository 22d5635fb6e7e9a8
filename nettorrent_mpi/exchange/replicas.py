"""Replicas that train apart: averaging them, showing one of them, and copying the weights of one to others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field

from nettorrent_mpi.comm.channels import Channel
from nettorrent_mpi.comm.failures import survivable
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.placing import channel_of
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.records import dataclass


def nothing() -> None:
    """Do nothing: the shards are whole blocks, which have no other holders."""


@dataclass(frozen=True)
class Shards:
    """The flat arrays that one rank owns of its replica; its peers own the same elements of the other replicas.

    `optimizer` maps each state of the optimizer to arrays like the `parameters`. `statistics` are arrays without
    gradients (running means and variances). `gaps` are the elements of each of the parameters' arrays that belong to
    nothing, and are zeros. `replaced` is called when all of them have been replaced by other
    replicas', by all ranks.
    """

    parameters: Sequence[Array]
    optimizer: Mapping[str, Sequence[Array]] = field(default_factory=dict)
    statistics: Sequence[Array] = ()
    gather: Callable[[], None] = nothing
    fence: Callable[[], None] = nothing
    replaced: Callable[[], None] = nothing
    gaps: Sequence[Sequence[Span]] = ()

    @property
    def weights(self) -> list[Array]:
        """All arrays that make up the replica's network."""
        return [*self.parameters, *self.statistics]

    @property
    def memories(self) -> list[Array]:
        """The optimizer's state."""
        return [array for arrays in self.optimizer.values() for array in arrays]


class Replicas:
    """Moves weights between replicas at rest. All ranks of all replicas call every method, after the same step.

    Where several ranks hold the same blocks and each owns a shard of them, `gather` all-gathers the shards among these
    holders, and `fence` waits until all of them have come, before a shard changes that others read. `count` is the
    number of replicas with weights of their own. Arrays of the shards travel on `channel`; without one, through the
    host's memory.
    """

    def __init__(self, shards: Shards, peers: Group, device: Device, channel: Channel | None = None):
        self.shards, self.peers, self.device = shards, peers, device
        self.channel = channel_of(device, peers) if channel is None else channel
        self.count = peers.size
        self._memory = device.workspace("float32")
        self._depth = 0  # of blocks with copies
        self.torn = False  # see `_replacing`

    def mean(self, arrays: Iterable[Array]) -> None:
        """Set arrays to their mean over all peers, bitwise the same everywhere. All peers call."""
        if self.count > 1:
            for array in arrays:
                self.channel.all_reduce(array)
                self.device.ops.scale(array, 1 / self.count)

    @contextmanager
    def shown(self, best: int | None = None) -> Iterator[None]:
        """Give every replica the average of all, or the weights of replica `best`, inside the `with` block; afterwards
        its own again.

        Takes memory for one copy of this rank's shards.
        """
        if self.count == 1:
            yield
            return
        self.settle()
        with self._copies(self.shards.weights) as kept:
            try:
                self._all_take(best)
                yield
                self.shards.fence()
            finally:  # also where other replicas lose ranks
                for copy, array in zip(kept, self.shards.weights, strict=True):
                    self.device.ops.copy(array, copy)
        self.shards.gather()

    @contextmanager
    def _copies(self, arrays: Sequence[Array]) -> Iterator[list[Array]]:
        """Give copies of arrays inside the `with` block, in memory that is allocated once for each depth of such
        blocks: a GPU gives none back."""
        self._depth += 1
        try:
            found = []
            for number, array in enumerate(arrays):
                found.append(self._memory.keep(f"{self._depth} {number}", array.shape, array.dtype))
                self.device.ops.copy(found[-1], array)
            yield found
        finally:
            self._depth -= 1

    def become(self, best: int | None = None) -> None:
        """Give every replica the average of all, or replica `best`'s weights and optimizer state, for good."""
        if self.count == 1:
            return
        self.settle()
        with self._replacing():
            if best is not None:
                for array in self.shards.memories:
                    self.channel.broadcast(array, best)
            self._all_take(best)
            self.shards.replaced()
            self.averaged()

    def adopt(self, takes: Sequence[int]) -> None:
        """Give replica r the weights and optimizer state of replica takes[r]."""
        assert all(takes[source] == source for source in takes)
        self.settle()
        self.shards.fence()
        own = self.peers.index
        with self._replacing():
            for array in (*self.shards.weights, *self.shards.memories):
                sends = [(array, to) for to, source in enumerate(takes) if source == own != to]
                receives = [(array, source) for to, source in enumerate(takes) if to == own != source]
                self.channel.exchange(sends, receives)
            self.shards.gather()
            self.shards.replaced()

    @contextmanager
    def _replacing(self) -> Iterator[None]:
        """Replace the shards for good inside the `with` block. If ranks are lost in it, this rank's are as before, and
        `torn`: other ranks of its replica may have the new ones."""
        self.torn = True
        arrays = [*self.shards.weights, *self.shards.memories] if survivable() else []
        with self._copies(arrays) as kept:
            try:
                yield
            except BaseException:
                for copy, array in zip(kept, arrays, strict=True):
                    self.device.ops.copy(array, copy)
                raise
        self.torn = False

    def _all_take(self, best: int | None) -> None:
        self.shards.fence()
        if best is None:
            self.average()
        else:
            for array in self.shards.weights:
                self.channel.broadcast(array, best)
        self.shards.gather()

    # -- overridden by exchanges ------------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep all messages between replicas from being in flight inside the `with` block. If a run is to be repeated
        bit for bit, they are sent anew afterwards, and the pause has changed nothing."""
        self.settle()
        yield

    def release(self) -> None:
        """Let this rank's shards have all of its own steps. Not collective."""

    def settle(self) -> None:
        """Wait until no message between replicas is in flight, and merge all that have come."""

    def average(self) -> None:
        """Set this rank's parameters and statistics to their mean over all replicas. Settled; the caller
        all-gathers."""
        self.mean(self.shards.weights)

    def averaged(self) -> None:
        """Take note that the replicas are equal from now on, with the present parameters."""
