"""Mini-batches are gathered on a GPU, from rows that lie there or are uploaded ahead.

What lies where, for a split of R rows and mini-batches of B rows in M micro-batches:

    orders     the training rows in the order of an epoch, and the epoch's augmentation key: a ring of epochs
    numbers    (B,) the row numbers of the mini-batch whose forward passes are running, written by an operation,
               `rows_of_step`, that reads the step's number on the device; in an evaluation, the given rows
    rows       all R rows as they are stored (resident), or a ring of micro-batches that the host has taken (staged)
    targets    all R targets (last stage)

Nothing that `inputs` and `targets` begin depends on a host value that changes from step to step, so that it can be
recorded and repeated. One array of numbers suffices, though forward passes run ahead of the present mini-batch: a stage
runs them in the order of the micro-batches, and a GPU runs operations in the order of their calls. Staged rows are
uploaded while others are computed with, so they have a ring: as many mini-batches as are begun, and one more.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import cast

from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.data.rows import Allocate, Split
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.device.feeding import Feeder
from nettorrent_mpi.engine.batches import Batches, CheckTargets
from nettorrent_mpi.engine.device_rows import EpochOrders, GivenRows, StagedRows, resident_rows
from nettorrent_mpi.engine.wiring import Wiring
from nettorrent_mpi.plan.actions import Action


def open_batches(
    split: Split,
    wiring: Wiring,
    allocate: Allocate,
    device: Device,
    batch_size: int,
    micro_batches: int,
    *,
    ahead: int = 0,
    sampler: Sampler | None = None,
    augment: Augment | None = None,
    resident: bool | None = None,
    name: str = "",
) -> Batches:
    """Open the mini-batches of a split for a device: they have `batch_size` rows in `micro_batches` micro-batches, and
    forward passes run up to `ahead` mini-batches ahead. On a GPU rows are `resident` (None: where there is room); those
    of batches that are opened again and again have a `name`, by which they use the same memory of the device."""
    if device.kind == "cpu":
        return Batches(split, wiring, allocate, sampler=sampler, augment=augment)
    most = wiring.topology.batch_rows(wiring.place, batch_size, micro_batches, 0).size
    mini_batches = ahead + 2 if sampler else 2
    batches = DeviceBatches(split, wiring, allocate, cast("Feeder", device), most, sampler=sampler, augment=augment)
    batches.place(batch_size, mini_batches, micro_batches if sampler else 1, resident, name)
    return batches


class DeviceBatches(Batches):
    """DeviceBatches are batches whose inputs and targets a device gathers from its own memory."""

    def __init__(
        self,
        split: Split,
        wiring: Wiring,
        allocate: Allocate,
        device: Feeder,
        most: int,
        *,
        sampler: Sampler | None,
        augment: Augment | None,
    ):
        """Open the inputs. This rank has at most `most` rows of a micro-batch."""
        super().__init__(split, wiring, allocate, sampler=sampler, augment=augment)
        self._device, self._most = device, most
        self._resident: Array | None = None
        self._ring: StagedRows | None = None
        self._orders: EpochOrders | None = None
        self._given_numbers: GivenRows | None = None
        self._key_of_epoch: Array | None = None
        self._stored_targets: Array | None = None
        self._uploads = 0  # of targets to memory of their own
        self._present: Array | None = None  # the numbers of the mini-batch whose forward passes are running
        self._key_now: Hashable | None = ()

    def place(self, batch_size: int, mini_batches: int, micro_batches: int, resident: bool | None, name: str) -> None:
        """Decide where the rows lie, and upload them where they are resident. A ring of staged rows has room for so
        many mini-batches of so many micro-batches."""
        device, inputs, self._mini_batches = self._device, self._inputs, mini_batches
        if inputs is not None:
            size = inputs.rows * inputs.native_bytes
            if device.has_room(size) if resident is None else resident:
                self._resident = resident_rows(device, inputs)
            else:
                self._ring = StagedRows(device, inputs, self._most, mini_batches, micro_batches, name)
            work = "float64" if self._wiring.x(0, 0).dtype == "float64" else "float32"
            factor, offset = inputs.scale
            self._factor, self._shift = (device.constant(values.astype(work)) for values in (factor, -offset))
        if inputs is None and not self._wiring.is_last:
            return
        if self._sampler is not None:
            self._orders = EpochOrders(device, self._sampler, mini_batches - 2)
            self._step_numbers = device.empty((batch_size,), "int64")
            self._key_of_epoch = device.empty((1,), "uint64")
        self._given_numbers = GivenRows(device, name and f"{name}: numbers")

    def read_targets(self, check: CheckTargets, split: Split | None = None) -> None:
        super().read_targets(check, split)
        if self._targets is not None:
            targets, self._targets = self._targets, None
            stored = self._stored_targets
            if stored is None or (stored.shape, stored.dtype) != (targets.shape, targets.dtype):
                stored = self._stored_targets = self._device.empty(targets.shape, targets.dtype)
                self._out = self._device.empty((self._most, *targets.shape[1:]), targets.dtype)
                self._uploads += 1
            self._device.upload(stored, targets)

    # -- before the actions of a step -------------------------------------------------------------------------------

    def prepare(self, actions: Sequence[Action], steps: Sequence[Array] = ()) -> None:
        pieces, self._steps = self._micro_batches, steps
        forward = [a.micro_batch for a in actions if a.kind == "F" and a.micro_batch is not None]
        begun = max(forward, default=0) // pieces + 1  # mini-batches
        if self._ring is not None:
            self._ring.release()
        if self._given is not None:
            if self._given_numbers is not None:
                self._present = self._given_numbers.put(self._given)
            self._key_now = None if self._ring is not None else (len(self._given), pieces, self._alone)
            return
        sizes = tuple(self.batch_size(n * pieces) for n in range(begun))
        if self._orders is not None:
            self._present = self._step_numbers
            self._orders.put(self.step, self.step + begun - 1)
        if self._ring is not None:
            for m in forward:
                self._stage(m)
            for m in forward:
                if self.rows(m).mine.size:
                    self._ring.arrive(self._position(m))
        # The turn counts on ranks without staged rows, too, so that all ranks of a swarm record the same steps.
        self._key_now = (self.step % self._mini_batches, sizes, self._uploads)

    def key(self) -> Hashable | None:
        return self._key_now

    def load(self, m: int) -> None:
        """Take the inputs of a later training micro-batch, where the host does, and begin to upload them."""
        if self._ring is not None:
            self._stage(m)

    def _stage(self, m: int) -> None:
        part = self.rows(m).mine
        if self._ring is not None and part.size:
            name = self._name(m) if self._given is None else None
            self._ring.put(self._position(m), self._numbers(m)[slice(*part)], name)

    def _position(self, m: int) -> int:
        """Return the place of a micro-batch in the ring of staged rows."""
        assert self._ring is not None
        if self._given is not None:
            return m % self._ring.count
        number, piece = divmod(m, self._micro_batches)
        return (self.step + number) % self._ring.mini_batches * self._micro_batches + piece

    # -- micro-batch m ------------------------------------------------------------------------------------------------

    def inputs(self, m: int, g: int) -> Array:
        part = self.rows(m).mine
        x, inputs = self._wiring.x(g, part.size), self._inputs
        if inputs is None:
            return x
        self._begin(m)
        if not part.size:
            return x
        stored = self._resident
        if self._ring is not None:
            if self._given is not None:
                self._stage(m)
                self._ring.arrive(self._position(m))
            stored = self._ring.rows(self._position(m), part.size)
        augment = self._augment if self._given is None else None
        assert stored is not None
        assert self._present is not None
        self._device.ops.gather(
            stored,
            self._present[slice(*part)],
            x,
            self._factor,
            self._shift,
            key=self._key_of_epoch if augment else None,
            flip=augment is not None and augment.flip,
            crop=augment is not None and augment.crop,
            resident=self._ring is None,
        )
        if self._ring is not None and self._given is not None:
            self._ring.release()
        return x

    def targets(self, m: int) -> Array:
        assert self._stored_targets is not None
        assert self._present is not None
        if not self._wiring.is_first:
            self._begin(m)
        part = self.rows(m).mine
        out = self._out[: part.size]
        if part.size:
            self._device.ops.take_rows(self._stored_targets, self._present[slice(*part)], out)
        return out

    def _begin(self, m: int) -> None:
        """Let the device write the row numbers of a mini-batch of training when its first micro-batch begins."""
        number, piece = divmod(m, self._micro_batches)
        if self._given is None and piece == 0 and self._orders is not None:
            assert self._key_of_epoch is not None
            self._orders.write(self._steps[number], self._step_numbers, self._key_of_epoch)
