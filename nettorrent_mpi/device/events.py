"""Streams and events, which order the work of a device that goes on while the host does something else."""

from __future__ import annotations

from typing import Protocol


class Event(Protocol):
    """An Event is a point in a stream's work."""

    def done(self) -> bool:
        """Whether the stream has come there. Does not wait."""

    def synchronize(self) -> None:
        """Let the host wait until it has."""


class Stream(Protocol):
    """A Stream is work that the GPU does in the order in which it was launched. `handle` is what CUDA's libraries take
    for it."""

    @property
    def handle(self) -> int: ...

    def record(self) -> Event:
        """Return an event behind all work launched so far. Not inside a capture."""

    def wait(self, event: Event) -> None:
        """Let work launched from now on wait for the event. Not inside a capture."""

    def synchronize(self) -> None:
        """Let the host wait for all work launched so far."""
