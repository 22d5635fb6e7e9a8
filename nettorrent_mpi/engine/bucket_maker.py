"""A BucketMaker divides a stage's trainable blocks into buckets, and chooses the reducer of each.

On one node there is one bucket for each group of holders (engine/buckets.py), in shared memory, and one more for the
matrices whose gradients are computed in parts. Between nodes there are several, in the order in which the backward pass
completes them: the gradients of one travel while the backward pass continues with the others. Replicas that differ have
the same buckets, wherever their ranks lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.reducers import PIECES, RingReducer
from nettorrent_mpi.comm.ring import can_carry
from nettorrent_mpi.comm.shared import Ask, SharedMemory
from nettorrent_mpi.device.arrays import Array, Shape, as_dtype
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.engine.buckets import Bucket, divisible, round_up
from nettorrent_mpi.engine.operands import SharedOperands
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.nn.layer import Parameter
from nettorrent_mpi.nn.optimizers import Optimizer
from nettorrent_mpi.plan.sizes import in_parts, rows_shared

FULL = 1 << 20  # bytes at which a bucket is full, where buckets travel in messages
LEAST_SHARD = 16 << 10  # bytes: below, many short messages one after the other take longer than MPI's own algorithms


def cut(sizes: Mapping[str, int], full: int, least: int) -> list[list[str]]:
    """Cut the blocks, given in layer order, into buckets in the order in which the backward pass completes them.

    A bucket with `full` elements is complete; one of fewer than `least` joins the one before. The blocks of a layer
    stay in one bucket.
    """
    made: list[list[str]] = []
    filled, layer = full, ""
    for key in reversed(list(sizes)):
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


class BucketMaker:
    """A BucketMaker makes the buckets of a stage's trainable blocks, `parameters`. All holders make the same."""

    def __init__(
        self,
        plan: Plan,
        wiring: Wiring,
        device: Device,
        parameters: Mapping[str, Parameter],
        optimizer: Optimizer,
        versions: int,
    ):
        self._wiring, self._device, self._optimizer = wiring, device, optimizer
        self._dtype, self._weights_dtype, self._versions = as_dtype(plan.options.dtype), plan.weights_dtype, versions
        self._gradients_dtype = plan.gradients_dtype
        self._rows = rows_shared(plan.topology, plan.options.batch_size, plan.exact)
        self._number = {key: i for i, key in enumerate(parameters)}

    def make(self, held: Sequence[tuple[Group, Mapping[str, Parameter]]]) -> list[Bucket]:
        """Return the buckets of the blocks that each of the groups holds alike. All ranks of the world call.

        Peers exchange shards, so they have to have the same ones: there is one bucket of all blocks only if all peers
        share memory with their holders.
        """
        wiring = self._wiring
        together = [each[0].size > 1 and each[0].on_one_node and self._device.kind == "cpu" for each in held]
        asks = {i: self._ask(*each) for i, each in enumerate(held) if together[i]}
        memories = dict(zip(asks, wiring.share(wiring.everyone, list(asks.values())), strict=False))
        mine = [i in memories or group.size == 1 or self._device.kind == "gpu" for i, (group, _) in enumerate(held)]
        whole = [all(peers) for peers in zip(*wiring.peers.gather_objects(mine), strict=True)]
        return [
            bucket
            for i, (group, blocks) in enumerate(held)
            for bucket in self._buckets(group, blocks, memories.get(i), whole=whole[i])
        ]

    def _ask(self, group: Group, blocks: Mapping[str, Parameter]) -> Ask:
        """Return what `group` asks to share: parameters, everyone's gradients, operands of gradients in parts."""
        shapes = self._in_parts(group, blocks)
        sizes = {key: round_up(math.prod(parameter.local)) for key, parameter in blocks.items()}
        whole = divisible(sum(sizes[key] for key in shapes), group.size)
        own = sum(self._sizes(group, {key: size for key, size in sizes.items() if key not in shapes}))
        size, copies = whole + own, 1 + self._versions
        operands = sum(round_up(self._rows * length) for shape in shapes.values() for length in shape)
        wide = self._gradients_dtype.itemsize // self._dtype.itemsize
        alone = (copies + wide) * size * self._dtype.itemsize
        return Ask(group, wide * own, copies * size + operands, self._dtype, alone)

    def _buckets(
        self, group: Group, blocks: Mapping[str, Parameter], memory: SharedMemory | None, *, whole: bool
    ) -> list[Bucket]:
        """Return the buckets of one group: of all blocks, if `whole`, or cut."""
        made: list[Bucket] = []
        operands = {} if memory is None else self._operands(group, blocks, memory)
        if operands:
            made.append(self._bucket(group, blocks, list(operands), memory, operands))
        rest = {key: round_up(math.prod(blocks[key].local)) for key in blocks if key not in operands}
        if not rest:
            return made
        parts = [list(rest)] if whole else self._cut(group, rest)
        made += [self._bucket(group, blocks, keys, memory) for keys in parts]
        if memory is not None or group.size == 1:
            return made
        if self._device.kind == "cpu" and all(
            can_carry(bucket.counts, self._gradients_dtype.itemsize, LEAST_SHARD) for bucket in made
        ):
            apart = self._wiring.channel(group)
            for i, bucket in enumerate(made):
                arrays = bucket.params, bucket.grads, bucket.reduced
                bucket.reducer = RingReducer(self._wiring.rings, apart, i * PIECES, bucket.counts, *arrays)
        return made

    def _cut(self, group: Group, sizes: Mapping[str, int]) -> list[list[str]]:
        """Return the buckets that these blocks are cut into where they are not one."""
        least = LEAST_SHARD * group.size // self._gradients_dtype.itemsize
        return cut(sizes, max(FULL // self._gradients_dtype.itemsize, least), least)

    def _sizes(self, group: Group, sizes: Mapping[str, int]) -> list[int]:
        """Return the elements of these buckets; one of all blocks has at most as many as they have together."""
        return [divisible(sum(sizes[key] for key in keys), group.size) for keys in self._cut(group, sizes)]

    def _bucket(
        self,
        group: Group,
        blocks: Mapping[str, Parameter],
        keys: Sequence[str],
        memory: SharedMemory | None,
        operands: Mapping[str, SharedOperands] | None = None,
    ) -> Bucket:
        return Bucket(
            self._device,
            self._wiring.channels[group],
            {key: blocks[key] for key in keys},
            self._optimizer,
            self._dtype,
            weights_dtype=self._weights_dtype,
            gradients_dtype=self._gradients_dtype,
            first=min(self._number[key] for key in keys),
            versions=self._versions,
            memory=memory,
            operands=operands,
        )

    def _in_parts(self, group: Group, blocks: Mapping[str, Parameter]) -> dict[str, Shape]:
        """Return the shapes of the matrices whose gradients the holders compute in parts, where they share memory."""
        return {
            key: parameter.local
            for key, parameter in blocks.items()
            if parameter.product and in_parts(self._rows, group.size, parameter.local[0], parameter.local[1])
        }

    def _operands(
        self, group: Group, blocks: Mapping[str, Parameter], memory: SharedMemory
    ) -> dict[str, SharedOperands]:
        """Make the shared operands of these matrices."""

        def array(length: int) -> Array:
            whole = memory.take_common(round_up(self._rows * length))
            return whole[: self._rows * length].reshape(self._rows, length)

        shapes = self._in_parts(group, blocks)
        return {key: SharedOperands(self._device, array(shape[0]), array(shape[1])) for key, shape in shapes.items()}
