"""Metrics are sums that a rank accumulates over its rows, in an array on the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device

LOSS, CORRECT, ROWS, UNKNOWN, EXTRA, NONFINITE, FIRST = range(7)
SUMS = NONFINITE  # how many are sums
_HEAD = 64  # bytes of an envelope, which are not used
_SIZE = 8 * (FIRST + 1)

Sums: TypeAlias = tuple[float, float, float, float, float]
_NOTHING: Sums = (0.0, 0.0, 0.0, 0.0, 0.0)


class Metrics:
    """A Metrics object has one rank's sums. `values` holds the sum of the losses, the number of correct answers, the
    number of rows, how often an answer could not be judged, what the rows weigh in the loss beyond 1 each, the number
    of micro-batches whose outputs were not finite, and the step (from 0) of the first of these.

    Only ranks of the last stage count rows, and of a team's cols only the first, so that sums over all ranks are right;
    the losses of the other cols go to `ignored`.
    """

    def __init__(self, device: Device):
        self._device = device
        self.values: Array = device.zeros((FIRST + 1,), "float64")
        self.ignored: Array = device.zeros((FIRST + 1,), "float64")
        self.nonfinite: int | None = None  # the step of the first value that was not finite, once it is known here
        self._before = _NOTHING  # what was read since the last call of `take`
        self._envelope = device.envelope(_HEAD, _SIZE)
        self._reading = False
        self._recent = (0.0, 0.0)
        self._kept = self._before, np.zeros(SUMS)

    def take(self, *, wait: bool = True) -> Sums:
        """Return (loss, right, rows, unknown, extra) and set them to zero. Without `wait` only what the host knows
        already (`follow`) is taken, and the rest follows later."""
        if wait:
            self.recent()
            self._add(self.look())
            self._device.ops.fill(self.values[:NONFINITE], 0)
        taken, self._before = self._before, _NOTHING
        return taken

    def sums(self) -> list[float]:
        """Return what was added since `take`, in the parts in which it is added up. The host waits for the device."""
        self.recent()
        return [*self._before, *self.look()]

    def restore(self, sums: Sequence[float]) -> None:
        """Continue with these `sums` of the same rank, which were found before an evaluation or a resume."""
        a, b, c, d, e, *values = sums
        self._before = a, b, c, d, e
        self._device.upload(self.values[:NONFINITE], np.array(values))

    def keep(self) -> None:
        """Keep the sums, which the step that begins will change, on a CPU."""
        self.recent()
        self._kept = self._before, self._kept[1]
        np.copyto(self._kept[1], self.values[:NONFINITE])

    def kept(self) -> list[float]:
        """Return the sums that were kept last."""
        before, values = self._kept
        return [*before, *values[:NONFINITE].tolist()]

    def begin(self) -> None:
        """Begin to read what was added since it was last read. The host does not wait."""
        self.recent()
        self._device.ops.copy(self._envelope.body.view("float64"), self.values)
        self._envelope.collect(_SIZE)
        self._device.ops.fill(self.values[:NONFINITE], 0)
        self._reading = True

    def follow(self) -> None:
        """Read on what was added, as far as that needs no waiting."""
        if not self._reading or self.done():
            self.begin()

    def done(self) -> bool:
        """Whether what `begin` has begun is complete."""
        return self._envelope.done()

    def recent(self) -> tuple[float, float]:
        """Return (loss, weight of the rows) as `begin` has found them; the host waits until the device has come
        there."""
        if self._reading:
            while not self._envelope.done():
                os.sched_yield()
            self._reading = False
            now = self._understood(self._envelope.whole[_HEAD:].view("float64").tolist())
            self._add(now)
            self._recent = now[LOSS], now[ROWS] + now[EXTRA]
        return self._recent

    def _add(self, now: list[float]) -> None:
        loss, correct, rows, unknown, extra = (a + b for a, b in zip(self._before, now, strict=True))
        self._before = loss, correct, rows, unknown, extra

    def look(self) -> list[float]:
        """Return (loss, correct, rows, unknown, extra) at present, and learn of values that are not finite. The host
        waits for the device."""
        return self._understood(self._device.on_host(self.values).tolist())

    def _understood(self, now: list[float]) -> list[float]:
        if self.nonfinite is None and now[NONFINITE]:
            self.nonfinite = int(now[FIRST])
        return now[:NONFINITE]

    def forget_nonfinite(self) -> None:
        """Forget what was not finite."""
        self.nonfinite = None
        for values in (self.values, self.ignored):
            self._device.ops.fill(values[NONFINITE:], 0)
