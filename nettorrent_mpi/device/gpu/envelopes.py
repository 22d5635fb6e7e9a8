"""Envelopes carry messages between a GPU and host memory beside compute: nothing here lets the host wait."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType, Shape
from nettorrent_mpi.device.gpu.runtime import Event, Runtime, Stream


class Bearer(Protocol):
    """A Bearer is what envelopes need of their device."""

    runtime: Runtime
    stream: Stream

    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return an uninitialised array."""

    def make_stream(self) -> Stream:
        """Return a further stream."""


class _Spare(NamedTuple):
    body: Array
    free: list[Event]  # its last uses


class Envelopes:
    """The envelopes of one GPU, which share memory there for what lies between a copy and the operations on it.

    Copies to the host and to the GPU have a stream each: a message that has come does not wait behind a snapshot that
    is to be copied when the step's compute is complete.
    """

    def __init__(self, device: Bearer):
        self._device = device
        self._down, self._up = device.make_stream(), device.make_stream()
        self._spare: dict[int, list[_Spare]] = {}

    def make(self, head: int, size: int) -> GpuEnvelope:
        """Return a new envelope."""
        whole = self._device.runtime.pinned(head + size)
        whole[...] = 0
        return GpuEnvelope(self, whole, head)

    @property
    def present(self) -> Stream:
        """The stream of the operations that are called at present."""
        return self._device.stream

    def take(self, size: int, stream: Stream) -> Array:
        """Return memory on the GPU that work launched on this stream from now on may write."""
        spare = self._spare.get(size)
        if not spare:
            return self._device.empty((size,), np.uint8)
        body, free = spare.pop(0)  # the one that was last used longest ago
        for event in free:
            stream.wait(event)
        return body

    def give_back(self, body: Array, copied: Event | None) -> None:
        """Take memory back, which the present stream used last, and the copy at this event."""
        free = [self.present.record(), *([] if copied is None else [copied])]
        self._spare.setdefault(int(body.size), []).append(_Spare(body, free))

    def collect(self, to: Array, body: Array) -> Event:
        """Begin to copy to the host what the present stream makes of a body."""
        self._down.wait(self.present.record())
        return self._copy(self._down, to, body)

    def deliver(self, source: Array, size: int) -> tuple[Array, Event]:
        """Begin to copy from the host to a body for `size` bytes."""
        body = self.take(size, self._up)
        return body, self._copy(self._up, body[: source.size], source)

    def _copy(self, stream: Stream, to: Array, source: Array) -> Event:
        if to.size:
            self._device.runtime.copy(stream, to, source)
        return stream.record()


class GpuEnvelope:
    """An envelope (device.device.Envelope) between pinned host memory and a body on the GPU, which it has only while a
    message is written or read."""

    def __init__(self, owner: Envelopes, whole: Array, head: int, size: int | None = None):
        self.whole, self._head, self._owner = whole, head, owner
        self._size = int(whole.size) - head if size is None else size
        self._body: Array | None = None
        self._copied: Event | None = None
        self._arriving = False  # nobody has waited for what is copied to the body

    @property
    def body(self) -> Array:
        if self._body is None:
            self._body = self._owner.take(self._size, self._owner.present)
        if self._arriving and self._copied is not None:
            self._owner.present.wait(self._copied)
        self._arriving = False
        return self._body

    def collect(self, size: int) -> None:
        self._copied = self._owner.collect(self.whole[self._head : self._head + size], self.body[:size])

    def deliver(self, size: int) -> None:
        assert self._body is None, "a message arrives in an envelope that is still read"
        self._body, self._copied = self._owner.deliver(self.whole[self._head : self._head + size], self._size)
        self._arriving = True

    def done(self) -> bool:
        return self._copied is None or self._copied.done()

    def aside(self, size: int) -> GpuEnvelope:
        other = GpuEnvelope(self._owner, self.whole[: self._head].copy(), self._head, self._size)
        other._body, self._body = self._body, None
        other._copied, other._arriving, self._arriving = self._copied, self._arriving, False
        return other

    def drop(self) -> None:
        if self._body is not None:
            self._owner.give_back(self._body, self._copied)
        self._body, self._arriving = None, False
