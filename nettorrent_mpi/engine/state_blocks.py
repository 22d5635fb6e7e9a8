"""A rank gives and takes all that it keeps of a training as blocks in global coordinates, which outlive its layout.

That is the state (engine/state.py), what the exchange remembers, and the rank's own numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.engine.rank_numbers import RankNumbers
from nettorrent_mpi.engine.resharding import of_replica, takes
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.update import Update
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.exchange.base import Exchange
from nettorrent_mpi.plan.moves import Holding

# read(prefix, wanted) fills the wanted arrays with those whose names begin with the prefix.
ReadBlocks: TypeAlias = Callable[[str, Mapping[Holding, Array]], None]


class StateBlocks:
    """The StateBlocks of a rank are the blocks of the training state that it holds or owns.

    Where replicas differ, the names of each one's own begin with `of_replica`; those without are their average.
    """

    def __init__(
        self, wiring: Wiring, device: Device, state: State, exchange: Exchange, update: Update, numbers: RankNumbers
    ):
        self._wiring, self._device, self._state = wiring, device, state
        self._exchange, self._update, self._numbers = exchange, update, numbers

    def owned(self) -> dict[Holding, Array]:
        """Return all that this rank owns of its replica's training state after the present step: views of the live
        arrays (`State.owned_blocks`), and its numbers. Disjoint over the ranks of a replica, and complete. All ranks of
        a replica call, after the same step."""
        return self._state.owned_blocks(self._exchange.memories()) | self._numbers.now()

    def live(self) -> dict[Holding, Array]:
        """Return what this rank owns of its replica, where others are lost: in host memory. Of the exchange's memories
        it has those that all replicas have in common. Not collective.

        The others begin anew with the replicas that are left, because they are about peers, and what was under way
        between them is lost (see `GossipExchange.memories`).
        """
        self._exchange.release()
        own = self._state.owned_blocks(self._exchange.common())
        return {holding: self._device.on_host(array) for holding, array in own.items()}

    def held(self) -> dict[Holding, Array]:
        """Return the blocks that this rank holds, in host memory. Collective over all ranks, at rest.

        Where all replicas are equal they may be views of the live arrays; where replicas differ, a copy of their
        average and each one's own besides (`resharding.Blocks` describes the names).
        """
        on_host, state, exchange = self._device.on_host, self._state, self._exchange
        with exchange.paused():
            average: dict[Holding, Array] = {}
            if exchange.count > 1:
                with exchange.shown():
                    average = {holding: np.array(on_host(block)) for holding, block in state.blocks().items()}
                for holding, shard in state.shards(exchange.common()).items():
                    average[holding] = np.array(on_host(shard))
                    self._wiring.peers.all_reduce(average[holding])
                    np.divide(average[holding], exchange.count, out=average[holding])
        own = state.blocks() | state.version_blocks() | state.shards(exchange.memories())
        own |= self._numbers.now()
        own = {holding: on_host(array) for holding, array in own.items()}
        if exchange.count == 1:
            return own
        replica = self._wiring.place.replica
        return average | {Holding(of_replica(replica, h.name), h.box): array for h, array in own.items()}

    def restore(self, read: ReadBlocks, steps: int, replicas: int) -> None:
        """Continue after `steps` steps of a training in which `replicas` replicas differed (1: none did). All ranks
        call.

        `read` is called READS times for each prefix. Replicas that differ first become their average; if there are as
        many as before, each then takes its own weights.
        """
        state, exchange = self._state, self._exchange
        own = of_replica(self._wiring.place.replica, "")
        self._update.restore(None)
        for prefix in ("", own)[: takes(replicas, exchange.count)]:
            numbers = self._numbers.wanted()
            read(prefix, numbers)
            self._numbers.restore(numbers)
            memories = exchange.memories() if prefix or exchange.count == 1 else exchange.common()
            for bucket, *shards in zip(state.buckets, *memories.values(), strict=True):
                for shard in shards:
                    bucket.clear_gaps(shard)  # `read` leaves them as they are, and a mass is a part's largest
            self.fill(partial(read, prefix), state.blocks())
            if not prefix:
                exchange.averaged()  # before its memories are known: it begins them anew
            self.fill(partial(read, prefix), state.shards(memories))
            state.forget_versions()
            self.fill(partial(read, prefix), state.version_blocks())
        exchange.recall(steps)
        self._update.restore(steps)

    def load(self, read: Callable[[Mapping[Holding, Array]], None]) -> None:
        """Let `read` write new values into host memory of all blocks of parameters. All ranks call, at rest."""
        step = self._update.whole
        self._update.restore(None)
        self.fill(read, self._state.blocks())
        self._state.forget_versions()
        self._update.restore(step)

    def fill(self, read: Callable[[Mapping[Holding, Array]], None], arrays: Mapping[Holding, Array]) -> None:
        """Let `read` write new values into host memory of these arrays of this state. All ranks call, at rest."""
        self._state.fence()
        wanted = {holding: self._device.on_host(array) for holding, array in arrays.items()}
        read(wanted)
        for holding, array in arrays.items():
            if wanted[holding] is not array:
                self._device.upload(array, wanted[holding])
        if any(bucket.rounded for bucket in self._state.buckets):
            self._state.gather()
        self._state.fence()
