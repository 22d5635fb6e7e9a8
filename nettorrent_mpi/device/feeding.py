"""The interface of a device on which mini-batches are gathered: its rows of the data set lie in its memory, or are
uploaded a little ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from nettorrent_mpi.device.arrays import Array, DType, Shape


class RowOps(Protocol):
    """Operations on rows of a data set. None depends on a host value that changes from step to step, so that all of
    them can be captured."""

    def gather(
        self,
        images: Array,
        numbers: Array,
        out: Array,
        factor: Array,
        shift: Array,
        *,
        key: Array | None = None,
        flip: bool = False,
        crop: bool = False,
        resident: bool = True,
    ) -> None:
        """out[i] <- row numbers[i], augmented as by data/augment.py, times `factor` plus `shift`.

        The row lies at images[numbers[i]] if `resident`, otherwise at images[i]. `images` (rows, *shape) are uint8,
        float32 or float64; `numbers` (b,) int64; `factor` and `shift` one number, or one of each channel, float64 if
        `out` is, otherwise float32; `key` (1,) uint64, for augmentation.
        """

    def take_rows(self, source: Array, numbers: Array, out: Array) -> None:
        """out[i] <- source[numbers[i]]."""

    def rows_of_step(
        self,
        step: Array,
        orders: Array,
        keys: Array,
        numbers: Array,
        key: Array | None,
        *,
        steps_per_epoch: int,
        batch_size: int,
    ) -> None:
        """numbers (b,) int64 <- the row numbers of the mini-batch of step[0] (float64), which may be smaller: the rest
        are numbers of any rows; key[0] <- the augmentation's key of its epoch.

        orders (epochs, rows) int64 and keys (epochs,) uint64 have those of epoch e at e % epochs.
        """


class UploadRing(Protocol):
    """An UploadRing is a ring of buffers for what the host uploads ahead of the computation: `count` positions, each in
    pinned memory and on the device."""

    @property
    def memory(self) -> Array:
        """The memory on the device: (count, bytes), uint8, always the same."""

    def stage(self, position: int, size: int, fill: Callable[[Array], None], after: Any = None) -> None:
        """Let `fill` write `size` bytes (uint8) in host memory, and begin to upload them to a position. `after` is the
        `mark` after which its former contents are needed no more."""

    def arrive(self, position: int) -> None:
        """Let operations that are called from now on wait until what was staged last at a position has arrived."""

    def mark(self) -> Any:
        """Return a mark behind all operations called so far."""


class Feeder(Protocol):
    """A Feeder is such a device."""

    @property
    def ops(self) -> RowOps:
        """The operations."""

    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return an uninitialised array."""

    def upload(self, out: Array, values: Array) -> None:
        """out <- `values`, which lie in host memory and may be changed as soon as this returns."""

    def upload_ring(self, count: int, size: int, name: str = "") -> UploadRing:
        """Make a ring of `count` positions of at most `size` bytes. One with a name may be that of an earlier call,
        whose caller is done with it."""

    def constant(self, values: Array) -> Array:
        """Return these values on the device, which nothing may change."""

    def has_room(self, size: int) -> bool:
        """Whether there is room for so many bytes of data besides what training needs."""
