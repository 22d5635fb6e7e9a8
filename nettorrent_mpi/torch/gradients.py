"""The gradients of a model's parameters are averaged over a group of ranks during the backward pass.

A hook on each parameter copies its gradient into a flat array as soon as it is complete, and the array is all-reduced
(comm/all_reducers.py) while the backward pass goes on. When `backward()` returns, `p.grad` has the average, in the
array itself. PyTorch's DistributedDataParallel works likewise (Li et al. 2020, PyTorch Distributed); this needs no
wrapper around the model, weighs ranks by their rows, and goes on where ranks run out of mini-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.all_reducers import AllReducer, MpiAllReducer, RingAllReducer, SharedAllReducer
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.reducers import PIECES
from nettorrent_mpi.comm.ring import Rings, can_carry
from nettorrent_mpi.comm.shared import Ask, SharedMemory, share
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.bucket_maker import FULL, LEAST_SHARD, cut
from nettorrent_mpi.plan.errors import NetTorrentError, UserError
from nettorrent_mpi.torch.slots import carrier, length, slots

AVERAGING = "the average of gradients"


class _Bucket:
    """Parameters whose gradients are reduced together, as `array`, in which each has its slot. `missing` ones have no
    gradient yet in the present backward pass."""

    def __init__(self, numbers: list[int], reducer: AllReducer):
        self.numbers, self.reducer, self.missing, self.begun = numbers, reducer, len(numbers), False


class GradientAverage:
    """A GradientAverage averages the gradients of `parameters`, by name, over `group`, in every backward pass.

    `weight` is the factor on what this rank's next backward pass adds: its rows times the number of ranks, by the rows
    of all. Gradients that are there already, as of an earlier backward pass before the same optimizer step, keep their
    sum. A parameter without a gradient on some ranks counts as zero there; without one on any rank it stays without.

    All ranks of `world` make one, with groups that divide it; the members of a group do the same backward passes, or
    `join` those of others, where they may: not where members exchange parts of their weights in each step. Raises
    UserErrors on all members for gradients that cannot be averaged.
    """

    def __init__(
        self, world: World, group: Group, parameters: Mapping[str, torch.nn.Parameter], *, may_join: bool = True
    ):
        self.group, self.weight, self.steps, self._may_join = group, 1.0, 0, may_join
        self._names, self._parameters = list(parameters), list(parameters.values())
        self._memories: list[SharedMemory] = []
        self._rings, self._buckets = Rings(), list[_Bucket]()
        self._slots: list[torch.Tensor] = [None] * len(self._parameters)
        self._bucket_of: list[_Bucket] = [None] * len(self._parameters)  # type: ignore[list-item]
        self._came = [False] * len(self._parameters)
        self._mistake: str | None = None
        self._under_way = self._paused = False
        self._done_since_step = 0  # averages
        # How many ranks have a gradient of each parameter; how many average, have made a mistake; their steps.
        self._tally: Array = np.zeros(len(self._parameters) + 3, np.int32)
        self._hooks: list[Any] = []
        if group.size > 1:
            self._make(world)
            for number, parameter in enumerate(self._parameters):
                self._hooks += [
                    parameter.register_hook(self._weighed),
                    parameter.register_post_accumulate_grad_hook(partial(self._complete, number)),
                ]

    # -- set-up -----------------------------------------------------------------------------------------------------

    def _make(self, world: World) -> None:
        """Divide the parameters among flat arrays, those that are complete first in a backward pass first."""
        by_type: dict[str, list[int]] = {}
        for number, parameter in enumerate(self._parameters):
            by_type.setdefault(carrier(parameter.dtype) or "", []).append(number)
        sizes = {kind: length([self._parameters[i] for i in numbers]) for kind, numbers in by_type.items()}
        asks = [
            Ask(self.group, size, 0, kind, size * np.dtype(kind).itemsize)
            for kind, size in sizes.items()
            if self.group.on_one_node
        ]
        self._memories, _ = share(world, asks)
        for memory, kind in zip(self._memories, sizes, strict=False):
            self._add(by_type[kind], SharedAllReducer(self.group, memory, sizes[kind]))
        for kind, numbers in {} if self._memories else by_type.items():
            item = np.dtype(kind).itemsize
            counts = {self._names[i]: self._parameters[i].numel() for i in numbers}
            number_of = {self._names[i]: i for i in numbers}
            for names in cut(counts, FULL // item, LEAST_SHARD * self.group.size // item):
                part = [number_of[name] for name in names]
                self._add(part, self._by_messages(np.zeros(length([self._parameters[i] for i in part]), kind)))

    def _by_messages(self, array: Array) -> AllReducer:
        size = self.group.size
        if can_carry([-(-array.size // size)] * size, array.dtype.itemsize, LEAST_SHARD):
            return RingAllReducer(self._rings, self.group, PIECES * (1 + len(self._buckets)), array)
        return MpiAllReducer(self.group, array)

    def _add(self, numbers: list[int], reducer: AllReducer) -> None:
        bucket = _Bucket(numbers, reducer)
        self._buckets.append(bucket)
        for number, slot in zip(numbers, slots(reducer.array, [self._parameters[i] for i in numbers]), strict=True):
            self._slots[number], self._bucket_of[number] = slot, bucket

    # -- the backward pass ------------------------------------------------------------------------------------------

    def _weighed(self, grad: torch.Tensor) -> torch.Tensor | None:
        """Return what this rank adds to a gradient."""
        if self.weight == 1:
            return None
        return grad * self.weight if self.weight else torch.zeros_like(grad)

    def _complete(self, number: int, parameter: torch.Tensor) -> None:
        """Take note that the gradient of a parameter is complete in the present backward pass."""
        if self._paused:
            return
        if not self._under_way:
            self._under_way = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        if self._came[number]:
            self._mistake = self._mistake or (
                f"{self._names[number]} gets its gradient twice in one backward pass, as with checkpointing that has "
                "use_reentrant=True: give torch.utils.checkpoint use_reentrant=False"
            )
            return
        self._came[number] = True
        self._take(number, parameter)
        bucket = self._bucket_of[number]
        bucket.missing -= 1
        if not bucket.missing and self._mistake is None:
            bucket.begun = True
            bucket.reducer.begin()
        if self._rings:
            self._rings.progress()

    def _take(self, number: int, parameter: torch.Tensor) -> None:
        """Move a gradient into its slot, which takes its place where the type is the same."""
        slot, grad = self._slots[number], parameter.grad
        if grad is slot:
            return
        if grad.layout != torch.strided or grad.is_complex() or grad.device != slot.device or grad.requires_grad:
            self._mistake = self._mistake or self._unusable(number, grad)
            return
        with torch.no_grad():
            slot.copy_(grad)
        if grad.dtype == slot.dtype:
            parameter.grad = slot

    def _unusable(self, number: int, grad: torch.Tensor) -> str:
        name = self._names[number]
        if grad.layout != torch.strided:
            return f"{name} has a sparse gradient, which cannot be averaged: build its layer with sparse=False"
        if grad.is_complex():
            return f"{name} has a complex gradient, which cannot be averaged: use two real parameters"
        if grad.requires_grad:
            return f"the gradient of {name} has a graph: call backward without create_graph=True"
        return f"{name} was moved to {grad.device} after parallelize: move the model first"

    def _end_of_backward(self) -> None:
        self._under_way = False
        self.average()

    def average(self) -> None:
        """Average the gradients that there are. A backward pass does this by itself; a rank calls it that has none to
        do before an optimizer step that others do."""
        for number, parameter in enumerate(self._parameters):
            if not self._came[number]:
                if parameter.grad is None:
                    self._slots[number].zero_()
                else:
                    self._take(number, parameter)
            self._tally[number] = parameter.grad is not None
        self._tally[-3:] = 1, self._mistake is not None, self.steps + 1
        for bucket in self._buckets:
            if not bucket.begun:
                bucket.reducer.begin()
        self._finish()
        for number, parameter in enumerate(self._parameters):
            if self._tally[number] and parameter.grad is not self._slots[number]:
                self._give(number, parameter)

    def _give(self, number: int, parameter: torch.Tensor) -> None:
        slot = self._slots[number]
        if parameter.dtype == slot.dtype:
            parameter.grad = slot
        elif parameter.grad is None:
            parameter.grad = slot.to(parameter.dtype)
        else:
            with torch.no_grad():
                parameter.grad.copy_(slot)

    def join(self) -> None:
        """Take part, without gradients, in the backward passes that other members still do, until all members have
        called this."""
        while self.group.size > 1:
            self._tally.fill(0)
            self._meet()
            if not self._tally[-3]:
                return
            for bucket in self._buckets:
                bucket.reducer.array.fill(0)
                bucket.reducer.begin()
            self._reduce()

    def _finish(self) -> None:
        self._meet()
        self._reduce()

    def _meet(self) -> None:
        """Learn who has gradients of which parameters."""
        own = int(self._tally[-1])
        with NOW.during(AVERAGING):
            self.group.all_reduce(self._tally)
        active, mistakes, steps = self._tally[-3:].tolist()
        if mistakes:
            self._raise_mistake()
        if not self._may_join and 0 < active < self.group.size:
            raise self._agreed(
                UserError(
                    f"{self.group.size - active} of the {self.group.size} ranks that have one replica have no more "
                    "mini-batches, and the others do: take the mini-batches from run.batches(loader), which lets all "
                    "ranks do as many"
                )
            )
        if own and steps != active * own:
            self._mistake = None
            raise self._agreed(
                UserError(
                    f"ranks have done other numbers of backward passes before step {own}: all have to do the same, "
                    "or take them from run.batches()"
                )
            )

    def _reduce(self) -> None:
        factor = 1 / int(self._tally[-3])
        with NOW.during(AVERAGING):
            for bucket in self._buckets:
                bucket.reducer.turn(factor)
            for bucket in self._buckets:
                bucket.reducer.finish()
                bucket.missing, bucket.begun = len(bucket.numbers), False
        self._came = [False] * len(self._came)
        self._done_since_step += 1

    def _raise_mistake(self) -> None:
        found = self.group.gather_objects(self._mistake)
        index, text = next((i, each) for i, each in enumerate(found) if each is not None)
        rank = self.group.ranks[index]
        raise self._agreed(UserError(f"rank {rank}: {text}"))

    def _agreed(self, error: NetTorrentError) -> NetTorrentError:
        error.agreed = frozenset(self.group.ranks)
        return error

    # -- around ---------------------------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep gradients to this rank in backward passes inside the `with` block: they add up, and the next pass after
        it averages the sum."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def mean(self, loss: float) -> float:
        """Return the mean of the members' losses, weighed as their gradients are."""
        total = np.array([loss * self.weight if self.weight else 0.0])
        if self.group.size > 1:
            with NOW.during(AVERAGING):
                self.group.all_reduce(total)
        return float(total[0]) / self.group.size

    def before_step(self) -> None:
        """Take part in the average of others, if this rank has done no backward pass since the last step."""
        if self.group.size > 1 and not self._done_since_step and not self._paused:
            self.average()
        self._done_since_step = 0
        self.steps += 1

    def close(self) -> None:
        """Remove the hooks and free the memory; gradients become the parameters' own. All ranks of the world call."""
        for hook in self._hooks:
            hook.remove()
        for slot, parameter in zip(self._slots, self._parameters, strict=True):
            if parameter.grad is slot and slot is not None:
                parameter.grad = slot.clone()
        self._rings.free()
        for memory in self._memories:
            memory.free()
        self._memories.clear()
        self._buckets.clear()
