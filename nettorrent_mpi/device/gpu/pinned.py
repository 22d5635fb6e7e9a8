"""What the host uploads ahead of the computation, through pinned memory and a stream of its own."""

from __future__ import annotations

from collections.abc import Callable

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.operations import Owner
from nettorrent_mpi.device.gpu.runtime import Event, Stream


class PinnedRing:
    """A ring of buffers (device.feeding.UploadRing).

    Three waits keep it right. The host waits, before it fills a pinned buffer, until the last upload from there is
    complete; the upload waits until the computation has used what lies there on the device (`after`); and the
    computation waits for the upload.
    """

    def __init__(self, owner: Owner, stream: Stream, count: int, size: int):
        """Make the buffers; uploads go to `stream`."""
        self.memory = owner.empty((count, size), "uint8")
        self._owner, self._stream = owner, stream
        self._pinned = owner.runtime.pinned(count * size).reshape(count, size)
        self._arrived: list[Event | None] = [None] * count

    def stage(self, position: int, size: int, fill: Callable[[Array], None], after: Event | None = None) -> None:
        before = self._arrived[position]
        if before is not None:
            before.synchronize()
        host = self._pinned[position, :size]
        fill(host)
        if after is not None:
            self._stream.wait(after)
        self._owner.runtime.copy(self._stream, self.memory[position, :size], host)
        self._arrived[position] = self._stream.record()

    def arrive(self, position: int) -> None:
        arrived = self._arrived[position]
        assert arrived is not None, "nothing was staged there"
        self._owner.stream.wait(arrived)

    def mark(self) -> Event:
        return self._owner.stream.record()
