"""Replicas that train apart can be averaged, can show one of them, and can take another one's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device

TAG = 79


def nothing() -> None:
    """Do nothing: the shards are whole blocks, which have no other holders."""


@dataclass(frozen=True)
class Shards:
    """The flat arrays that one rank owns of its replica; its peers own the same elements of the other replicas.

    `optimizer` has, for each state of the optimizer by its name, an array like each of the `parameters`. `statistics`
    are arrays that no gradient changes (running means and variances). Where several ranks hold the same blocks and each
    owns a shard of them, `share` all-gathers the shards among these holders, and `fence` waits until all of them have
    come, before a shard changes that others read.
    """

    parameters: Sequence[Array]
    optimizer: Mapping[str, Sequence[Array]] = field(default_factory=dict)
    statistics: Sequence[Array] = ()
    share: Callable[[], None] = nothing
    fence: Callable[[], None] = nothing

    @property
    def weights(self) -> list[Array]:
        """All arrays that make up the replica's network."""
        return [*self.parameters, *self.statistics]

    @property
    def memories(self) -> list[Array]:
        """The optimizer's state."""
        return [array for arrays in self.optimizer.values() for array in arrays]


class Replicas:
    """Moves weights between replicas that have come to rest. All ranks of all replicas call every method, after the
    same step. `count` is the number of replicas with weights of their own.
    """

    def __init__(self, shards: Shards, peers: Group, device: Device):
        self.shards, self.peers, self.device = shards, peers, device
        self.count = peers.size

    @contextmanager
    def shown(self, best: int | None = None) -> Iterator[None]:
        """Inside, every replica has the average of all, or the weights of replica `best`; afterwards its own again.

        Takes memory for one copy of this rank's shards.
        """
        if self.count == 1:
            yield
            return
        self.settle()
        kept = [self.device.empty(array.shape, array.dtype) for array in self.shards.weights]
        for copy, array in zip(kept, self.shards.weights, strict=True):
            self.device.ops.copy(copy, array)
        self._all_take(best)
        yield
        self.shards.fence()
        for copy, array in zip(kept, self.shards.weights, strict=True):
            self.device.ops.copy(array, copy)
        self.shards.share()

    def become(self, best: int | None = None) -> None:
        """Every replica takes the average of all, or replica `best`'s weights and optimizer state, and keeps it."""
        if self.count == 1:
            return
        self.settle()
        if best is not None:
            for array in self.shards.memories:
                self.peers.broadcast(array, best)
        self._all_take(best)
        self.averaged()

    def adopt(self, takes: Sequence[int]) -> None:
        """Replica r takes the weights and optimizer state of replica takes[r], which keeps its own."""
        assert all(takes[source] == source for source in takes)
        self.settle()
        self.shards.fence()
        own = self.peers.index
        for array in (*self.shards.weights, *self.shards.memories):
            sends = [(array, to) for to, source in enumerate(takes) if source == own != to]
            receives = [(array, source) for to, source in enumerate(takes) if to == own != source]
            self.peers.trade(sends, receives, TAG)
        self.shards.share()

    def _all_take(self, best: int | None) -> None:
        self.shards.fence()
        if best is None:
            self.average()
        else:
            for array in self.shards.weights:
                self.peers.broadcast(array, best)
        self.shards.share()

    # -- what an exchange does otherwise ----------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until no message is under way between replicas, and merge all that have come."""

    def average(self) -> None:
        """This rank's parameters and statistics <- their mean over all replicas. Settled; the caller shares."""
        for array in self.shards.weights:
            self.peers.mean(array)

    def averaged(self) -> None:
        """The replicas are the same from now on, with the present parameters."""
