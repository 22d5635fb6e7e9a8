"""An envelope whose body is used where its message lies."""

from __future__ import annotations

from nettorrent_mpi.device.arrays import Array, aligned


class HostEnvelope:
    """An envelope (device.device.Envelope) in host memory: nothing has to be copied."""

    def __init__(self, head: int, size: int):
        self.whole: Array = aligned(head + size, "uint8")
        self.whole.fill(0)
        self.body: Array = self.whole[head:]

    def collect(self, size: int) -> None:
        pass

    def deliver(self, size: int) -> None:
        pass

    def done(self) -> bool:
        return True

    def aside(self, size: int) -> HostEnvelope:
        head = self.whole.size - self.body.size
        other = HostEnvelope(head, size)
        other.whole[...] = self.whole[: head + size]
        return other

    def drop(self) -> None:
        pass
