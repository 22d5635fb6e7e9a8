"""A device's memory holds rows of a data set, all of them or those that are computed with next, and their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from nettorrent_mpi.data.rows import Inputs
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.feeding import Feeder, UploadRing

CHUNK = 1 << 24  # bytes that are read at a time while rows become resident
NUMBER = 8  # bytes of a row number and of a key


def resident_rows(device: Feeder, inputs: Inputs) -> Array:
    """Return all rows, as they are stored, in the device's memory."""
    rows = device.empty((inputs.rows, *inputs.shape), inputs.native)
    each = max(CHUNK // inputs.native_bytes, 1)
    for first in range(0, inputs.rows, each):
        stop = min(first + each, inputs.rows)
        chunk = np.empty((stop - first, inputs.native_bytes), np.uint8)
        inputs.stored(np.arange(first, stop), chunk)
        device.upload(rows[first:stop], chunk.view(inputs.native).reshape(stop - first, *inputs.shape))
    return rows


class StagedRows:
    """StagedRows are a ring of micro-batches: the host takes their rows, as they are stored, and uploads them ahead."""

    def __init__(self, device: Feeder, inputs: Inputs, most: int, mini_batches: int, micro_batches: int, name: str):
        """Make room for so many mini-batches, of so many micro-batches of at most `most` rows."""
        self.mini_batches, self.count = mini_batches, mini_batches * micro_batches
        self._inputs = inputs
        self._uploads = device.upload_ring(self.count, max(most * inputs.native_bytes, 1), name)
        self._names: list[tuple[int, int] | None] = [None] * self.count
        self._after: list[Any] = [None] * self.count
        self._used: list[int] = []

    def put(self, position: int, numbers: Array, name: tuple[int, int] | None) -> None:
        """Take the rows of these numbers and begin to upload them, unless what has this name lies there already."""
        if name is not None and self._names[position] == name:
            return
        inputs, self._names[position] = self._inputs, name

        def fill(host: Array) -> None:
            inputs.stored(numbers, host.reshape(len(numbers), inputs.native_bytes))

        self._uploads.stage(position, len(numbers) * inputs.native_bytes, fill, self._after[position])

    def arrive(self, position: int) -> None:
        """Let operations from now on wait for the rows of a position. They may use them until `release`."""
        self._uploads.arrive(position)
        self._used.append(position)

    def rows(self, position: int, count: int) -> Array:
        """Return the rows (count, *shape) that lie at a position."""
        inputs = self._inputs
        memory = self._uploads.memory[position, : count * inputs.native_bytes]
        return memory.view(inputs.native).reshape(count, *inputs.shape)

    def release(self) -> None:
        """Let later uploads overwrite, once the operations called so far are complete, what has arrived before."""
        if self._used:
            mark = self._uploads.mark()
            for position in self._used:
                self._after[position] = mark
            self._used.clear()


class EpochOrders:
    """EpochOrders hold on the device the orders and the augmentation keys of the epochs whose mini-batches are begun: a
    ring, one epoch longer than that, so that no upload waits for the step before."""

    def __init__(self, device: Feeder, sampler: Sampler, ahead: int):
        """Forward passes run up to `ahead` mini-batches ahead of the present one."""
        self._device, self._sampler = device, sampler
        self._count = (ahead + sampler.steps_per_epoch - 1) // sampler.steps_per_epoch + 2
        self._order_ring = device.upload_ring(self._count, NUMBER * len(sampler.training_rows))
        self._key_ring = device.upload_ring(self._count, NUMBER)
        self._orders = self._order_ring.memory.view("int64")
        self._keys = self._key_ring.memory.view("uint64").reshape(self._count)
        self._held: list[int | None] = [None] * self._count  # epochs
        self._after: list[Any] = [None] * self._count
        self._begun = range(0)

    def put(self, first: int, last: int) -> None:
        """Upload what is missing for the mini-batches of steps first..last."""
        sampler = self._sampler
        begun = range(sampler.epoch(first), sampler.epoch(last) + 1)
        if begun == self._begun:
            return
        mark = self._order_ring.mark()
        for epoch in self._begun:
            self._after[epoch % self._count] = mark
        self._begun = begun
        for epoch in begun:
            place = epoch % self._count
            if self._held[place] != epoch:
                order, key = sampler.order(epoch), sampler.augment_key(epoch * sampler.steps_per_epoch)
                for ring, values in ((self._order_ring, order), (self._key_ring, np.array([key], np.uint64))):
                    _stage_values(ring, place, values, self._after[place])
                    ring.arrive(place)
                self._held[place] = epoch

    def write(self, step: Array, numbers: Array, key: Array) -> None:
        """Write the row numbers of the mini-batch of a step, and its epoch's key."""
        sampler = self._sampler
        self._device.ops.rows_of_step(
            step,
            self._orders,
            self._keys,
            numbers,
            key,
            steps_per_epoch=sampler.steps_per_epoch,
            batch_size=sampler.batch_size,
        )


class GivenRows:
    """GivenRows are the row numbers of an evaluation, on the device."""

    def __init__(self, device: Feeder, name: str):
        self._device, self._name = device, name
        self._uploads: UploadRing | None = None
        self._room = 0

    def put(self, rows: Array) -> Array:
        """Upload the numbers and return them. All operations on earlier ones have been called."""
        if self._uploads is None or self._room < len(rows):
            self._room = len(rows)
            self._uploads = self._device.upload_ring(1, max(NUMBER * self._room, 1), self._name)
        _stage_values(self._uploads, 0, np.asarray(rows, np.int64), self._uploads.mark())
        self._uploads.arrive(0)
        return self._uploads.memory[0, : NUMBER * len(rows)].view("int64")


def _stage_values(ring: UploadRing, position: int, values: Array, after: Any) -> None:
    def fill(host: Array) -> None:
        host.view(values.dtype)[...] = values

    ring.stage(position, values.nbytes, fill, after)
