"""The state of a rank is its part of the model during training: the blocks of its stage, in few flat arrays
(engine/buckets.py)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.shared import SharedMemory
from nettorrent_mpi.device.arrays import Array, as_dtype
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.engine.bucket_maker import BucketMaker
from nettorrent_mpi.engine.buckets import Bucket, Flat, Statistics
from nettorrent_mpi.engine.run_plan import Plan
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.exchange import Shards
from nettorrent_mpi.nn.initial import initial_value
from nettorrent_mpi.nn.layer import Operands, Parameter
from nettorrent_mpi.nn.optimizers import Optimizer
from nettorrent_mpi.plan.moves import Holding

# The first parts of arrays' names.
PARAMETERS, OPTIMIZER, EXCHANGE, VERSIONS = "parameters", "optimizer", "exchange", "versions"


class State:
    """A State has parameters, gradients, running statistics and optimizer state of one rank's stage.

    `params` maps "<layer>/<name>" to this rank's blocks, views of the flat arrays; `grads` likewise to the arrays
    into which the backward pass writes gradients (running statistics have none), and `versions[i]` to the blocks of
    an earlier version, which take turns (`version`). `buckets` are in the order in which the backward pass completes
    them. All holders construct their states at the same time.
    """

    def __init__(
        self,
        plan: Plan,
        wiring: Wiring,
        device: Device,
        parameters: Sequence[tuple[str, Parameter]],
        optimizer: Optimizer,
        *,
        versions: int,
    ):
        """Allocate the state. `versions` are kept besides the newest."""
        self.parameters = dict(parameters)
        self.dtype, self.weights_dtype = as_dtype(plan.options.dtype), plan.weights_dtype
        self._device, self._optimizer = device, optimizer
        self.statistics: list[Statistics] = []
        held: list[tuple[Group, dict[str, Parameter]]] = []
        for group, replicated in ((wiring.holders, False), (wiring.all_holders, True)):
            trainable = {key: p for key, p in parameters if p.trainable and p.replicated_sum == replicated}
            others = {key: p for key, p in parameters if not p.trainable and (p.axis is None) == replicated}
            if trainable:
                held.append((group, trainable))
            if others:
                self.statistics.append(Statistics(device, wiring.channels[group], others, self.weights_dtype))
        self.buckets = BucketMaker(plan, wiring, device, self.parameters, optimizer, versions).make(held)
        self.buckets.sort(key=lambda bucket: -bucket.first)
        fences: dict[Group, SharedMemory] = {}
        for bucket in self.buckets:
            if bucket.memory is not None:
                fences.setdefault(bucket.group, bucket.memory)
        self._fences = list(fences.values())
        self.params: dict[str, Array] = {}
        self.grads: dict[str, Array | Operands] = {}
        self.versions: list[dict[str, Array]] = []
        for flat in self.flats:
            self.params |= flat.blocks(flat.params)
        for bucket in self.buckets:
            self.grads |= bucket.operands or bucket.blocks(bucket.grads)
        for i in range(versions):
            blocks = dict(self.params)
            for bucket in self.buckets:
                blocks |= bucket.blocks(bucket.versions[i])
            self.versions.append(blocks)
        self.kept = 0  # the number of the version that was kept last
        self._statistics_before: dict[Flat, Array] = {}  # the step that has begun

    @property
    def flats(self) -> list[Flat]:
        """Return all flat arrays of parameters: the buckets and the running statistics."""
        return [*self.buckets, *self.statistics]

    def initialise(self, seed: int) -> None:
        """Set every block to its part of the initial values, which are those of the serial run."""
        self.fence()
        for flat in self.flats:
            writes = not isinstance(flat, Bucket) or flat.memory is None or flat.group.index == 0
            rounded = isinstance(flat, Bucket) and flat.rounded
            for key in flat.places if writes or rounded else ():
                parameter = self.parameters[key]
                value = initial_value(parameter, seed, key.rpartition("/")[0])
                if writes:
                    self._device.upload(self.params[key], value[parameter.index])
                for name, box, view in flat.shard_boxes(flat.weights) if rounded else ():
                    if name == key:
                        self._device.upload(view, value[tuple(slice(*part) for part in box)])
        self.fence()

    # -- collective over the holders --------------------------------------------------------------------------------

    def fence(self) -> None:
        """Fence the holders that share memory: afterwards all see what each wrote before. Every holder calls."""
        for memory in self._fences:
            memory.fence()

    def reduce(self) -> None:
        """Reduce-scatter the gradients: each bucket's `reduced` gets the sum over the holders for this rank's shard."""
        self.fence()  # until everyone's gradients, or operands, are complete
        for bucket in self.buckets:
            bucket.reducer.reduce()

    @property
    def in_parts(self) -> bool:
        """Whether there are gradients that the holders compute in parts (`multiply`)."""
        return any(bucket.operands for bucket in self.buckets)

    def multiply(self, rows: int) -> None:
        """Compute, after `reduce`, the gradients of the shards whose operands the holders share."""
        for bucket in self.buckets:
            bucket.reducer.multiply(rows)

    def gather(self, *, rounded: bool = False) -> None:
        """All-gather the trainable parameters, unless they are `rounded` from the weights after these; no gradients are
        read afterwards."""
        for bucket in self.buckets:
            if not rounded:
                bucket.round()
            bucket.reducer.gather()
        self.fence()

    def gather_all(self) -> None:
        """All-gather parameters and running statistics, after an exchange has changed shards of both."""
        self.gather()
        for flat in self.statistics:
            flat.reducer.gather()

    def keep_version(self) -> None:
        """Copy the parameters to the oldest version. All holders call, before any of them changes its shard."""
        self.kept = (self.kept + 1) % len(self.versions)
        for bucket in self.buckets:
            bucket.keep_version(self.kept)

    def version(self, age: int) -> dict[str, Array]:
        """Return the blocks of parameters as they were this number of updates ago."""
        return self.versions[(self.kept - age + 1) % len(self.versions)] if age else self.params

    def forget_versions(self) -> None:
        """Make all versions the present parameters. All holders call."""
        if self.versions:
            self.fence()
            for _ in self.versions:
                self.keep_version()
            self.fence()

    def keep_statistics(self) -> None:
        """Keep the running statistics, which the forward passes of the step that begins will change."""
        for flat in self.statistics:
            before = self._statistics_before.get(flat)
            if before is None:
                before = self._statistics_before[flat] = np.empty_like(flat.params)
            np.copyto(before, flat.params)

    # -- what this rank holds, in global coordinates ----------------------------------------------------------------

    def blocks(self) -> dict[Holding, Array]:
        """Return this rank's blocks of parameters and running statistics, as views of the live arrays; of parameters
        that are rounded weights, these."""
        found: dict[Holding, Array] = {}
        for flat in self.flats:
            if isinstance(flat, Bucket) and flat.rounded:
                boxes = flat.shard_boxes(flat.weights)
                found |= {Holding(f"{PARAMETERS}/{key}", box): view for key, box, view in boxes}
            else:
                places = {key: self.parameters[key].box for key in flat.places}
                found |= {Holding(f"{PARAMETERS}/{key}", box): self.params[key] for key, box in places.items()}
        return found

    def owned(self) -> Shards:
        """Return the shards that this rank owns of its replica, for the exchange."""
        return Shards(
            [bucket.weights for bucket in self.buckets],
            {name: [bucket.optimizer[name] for bucket in self.buckets] for name in self._optimizer.states},
            [flat.weights for flat in self.statistics],
            gather=self.gather_all,
            fence=self.fence,
            replaced=self.forget_versions,
            gaps=[bucket.gaps() for bucket in self.buckets],
        )

    def shards(self, memories: Mapping[str, Sequence[Array]]) -> dict[Holding, Array]:
        """Return what this rank alone keeps of each parameter, as views of the live arrays: the optimizer state of its
        shards, and the exchange's `memories`, which have for each name one array for each bucket."""
        return blocks_of(self._kept_alone(memories))

    def version_blocks(self) -> dict[Holding, Array]:
        """Return this rank's blocks of the earlier versions, as views of the live arrays."""
        return {
            Holding(f"{name}/{key}", self.parameters[key].box): block
            for name, bucket, flat in self._named_versions()
            for key, block in bucket.blocks(flat).items()
        }

    def _named_versions(self) -> Iterator[tuple[str, Bucket, Array]]:
        """Yield the name, the bucket and the array of each earlier version, by its age. Those of a type that files do
        not have are given as the bits of their numbers."""
        for age in range(1, len(self.versions) + 1):
            for bucket in self.buckets:
                flat = bucket.versions[(self.kept - age + 1) % len(self.versions)]
                if bucket.rounded:
                    yield f"{VERSIONS}/{age}_{self.dtype}", bucket, flat.view(np.uint16)
                else:
                    yield f"{VERSIONS}/{age}", bucket, flat

    def owned_blocks(self, memories: Mapping[str, Sequence[Array]]) -> dict[Holding, Array]:
        """Return what this rank owns of its replica, as views of the live arrays: its shards of the parameters that are
        updated, of their earlier versions and of the running statistics, and what it alone keeps of them (`shards`).

        The holders of a block own disjoint parts of it, which are the whole block together. Where all replicas are
        equal they are holders, too.
        """
        return blocks_of(self.owned_shards(memories))

    def owned_shards(self, memories: Mapping[str, Sequence[Array]]) -> list[Shard]:
        """Return the same as whole arrays, in an order that does not change."""
        weights = [Shard(PARAMETERS, flat, flat.weights) for flat in self.flats]
        versions = [Shard(name, bucket, flat[bucket.shard]) for name, bucket, flat in self._named_versions()]
        return weights + versions + self._kept_alone(memories)

    def blocks_left(self, silent: Collection[int], *, begun: bool) -> dict[Holding, Array]:
        """Return the blocks that this rank owns, and those parameters and running statistics of `silent` ranks of the
        world that it has, too, as the first of those that are left; as they were after the last complete step, where
        a further one has `begun` without an update. Not collective; in host memory."""
        found = blocks_of(self._kept_alone({}))
        for flat in self.flats:
            values, members = flat.params, flat.group.ranks
            if begun:
                values = self._statistics_before.get(flat, values)
            first = next(i for i, rank in enumerate(members) if rank not in silent)
            for i, rank in enumerate(members):
                if i == flat.group.index:
                    part = flat.weights if isinstance(flat, Bucket) else values[flat.shard]
                elif rank in silent and first == flat.group.index:
                    part = values[flat.shard_of(i)].astype(self.weights_dtype, copy=False)  # rounded, maybe
                else:
                    continue
                found |= {Holding(f"{PARAMETERS}/{key}", box): view for key, box, view in flat.shard_boxes(part, i)}
        return found

    def _kept_alone(self, memories: Mapping[str, Sequence[Array]]) -> list[Shard]:
        named = {f"{OPTIMIZER}/{name}": [b.optimizer[name] for b in self.buckets] for name in self._optimizer.states}
        named |= {f"{EXCHANGE}/{name}": list(shards) for name, shards in memories.items()}
        return [
            Shard(name, bucket, values)
            for name, shards in named.items()
            for bucket, values in zip(self.buckets, shards, strict=True)
        ]


class Shard(NamedTuple):
    """A Shard has the values of this rank's elements of a flat array of blocks, whose names begin with `name`."""

    name: str
    flat: Flat
    values: Array


def blocks_of(shards: Iterable[Shard]) -> dict[Holding, Array]:
    """Return the parts of blocks in these shards, as views."""
    return {
        Holding(f"{name}/{key}", box): view
        for name, flat, values in shards
        for key, box, view in flat.shard_boxes(values)
    }
