"""What changes from step to step, for work on a GPU: kernels read it from the GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.runtime import Event, Runtime, Stream

SLOTS = 32  # by how many changes the host may be ahead of the GPU before it waits


class DeviceNumbers:
    """Numbers (device.device.Numbers) in a GPU's memory; `array` is float64.

    `set` writes into the next slot of a ring in pinned memory and has the stream copy it from there, so that work
    launched before still finds the earlier values. A slot is written again once its copy is complete, which the host
    waits for only if it is a whole ring ahead.
    """

    def __init__(self, runtime: Runtime, stream: Stream, array: Array):
        self.array = array
        self._runtime, self._stream = runtime, stream
        size = int(array.size)
        ring = runtime.pinned(SLOTS * size * 8).view(np.float64)
        self._slots = [ring[slot * size : (slot + 1) * size] for slot in range(SLOTS)]
        self._copied: list[Event | None] = [None] * SLOTS
        self._next = 0

    def set(self, values: Sequence[float]) -> None:
        """Let work launched from now on read these values. Not inside a capture, which would keep them."""
        slot, copied = self._slots[self._next], self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        slot[...] = values
        self._runtime.copy(self._stream, self.array, slot)
        self._copied[self._next] = self._stream.record()
        self._next = (self._next + 1) % SLOTS
