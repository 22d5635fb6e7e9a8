"""The interface of a device on which mini-batches are gathered: its rows of the data set lie in its memory, or are
uploaded a little ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from nettorrent_mpi.device.arrays import Array, DType, Shape


class RowOps(Protocol):
    """Operations on rows. Row numbers are int64, and nothing here depends on a host value that changes from step to
    step, so that all of it can be captured."""

    def gather(
        self,
        stored: Array,
        numbers_b: Array | None,
        x: Array,
        factor: Array,
        offset: Array,
        key: Array | None = None,
        flip: bool = False,
        crop: bool = False,
        in_place: bool = False,
    ) -> None:
        """x[i] <- row numbers_b[i] of `stored`, scaled: row * factor - offset, in x's type; with `flip` or `crop`
        (data.augment), images are changed at random by (key[0], numbers_b[i]) first.

        `stored` (rows, *shape) is uint8 or floating; `factor` and `offset` are float64, one number or one per channel;
        `key` is uint64. With `in_place` row i is stored[i] itself, and numbers_b[i] only its name,
        needed where images are changed.
        """

    def take_rows(self, stored: Array, numbers_b: Array, out: Array) -> None:
        """out[i] <- row numbers_b[i] of `stored`, of out's type."""

    def rows_of_step(
        self, orders: Array, keys: Array, step: Array, training_rows: int, batch_size: int, numbers: Array, key: Array
    ) -> None:
        """numbers[:size] <- the row numbers of the mini-batch of step[0] (float64), and key[0] <- its epoch's key.

        Epoch e has ceil(training_rows / batch_size) steps, its order in orders[e % len(orders), :training_rows], and
        its key in keys[e % len(keys)]. The last mini-batch of an epoch may be smaller than `batch_size`.
        """


class Staging(Protocol):
    """A Staging is a ring of buffers for what the host uploads ahead of the computation: `count` positions, each in
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

    def staging(self, count: int, size: int) -> Staging:
        """Make a ring of `count` positions of at most `size` bytes."""

    def has_room(self, size: int) -> bool:
        """Whether there is room for so many bytes of data besides what training needs."""
