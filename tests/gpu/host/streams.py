"""Streams, events and graphs as lazy as CUDA allows: work runs when somebody waits, in any order that events allow.

The order is drawn from a seed. What lacks an event therefore shows as a wrong number in most orders, and work that can
never run as an error that names it.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nettorrent_mpi.device.arrays import Array
from tests.gpu.host.memory import HostMemory

HASTES = (0.0, 0.0, 0.1, 0.9)  # how probable it is that something runs when work is launched
PATIENCE = 60.0  # seconds for what waits for another rank
IDLE = 0.02  # seconds without a launch, after which a device in the background begins to work


@dataclass(frozen=True)
class Work:
    """Work is what a stream does next: `run`, once `ready` says so. `remote` says that other ranks make it ready.
    `entered` is called each time that the work is launched, alone or with a graph."""

    name: str
    run: Callable[[], None]
    ready: Callable[[], bool] | None = None
    remote: bool = False
    entered: Callable[[], None] | None = None


class Order:
    """The Order decides which stream's next work runs. One piece of work runs at a time, whole.

    `background`: a thread works, too, while nothing is launched: ranks that wait for each other on the device need it,
    as a rank may do so while its host waits for another rank's host.
    """

    def __init__(self, seed: int, background: bool = False):
        self.random = random.Random(seed)
        self.haste = self.random.choice(HASTES)
        self.streams: list[HostStream] = []
        self.capturing: HostStream | None = None
        self.error: BaseException | None = None  # of work in the background
        self.lock = threading.RLock()
        self._launched = time.monotonic()
        self._stopped = False
        if background:
            own = weakref.ref(self)
            threading.Thread(target=_in_background, args=(own,), name="host device", daemon=True).start()

    def stop(self) -> None:
        """End the thread, which also ends with this object."""
        self._stopped = True

    def stream(self, name: str = "") -> HostStream:
        """Make a stream."""
        self.streams.append(HostStream(self, name or f"stream {len(self.streams)}", len(self.streams) + 1))
        return self.streams[-1]

    def stream_of(self, handle: int) -> HostStream:
        """Return the stream of a handle."""
        return self.streams[handle - 1]

    def append(self, stream: HostStream, work: Work) -> None:
        """Append work to a stream. Some may run, as it may on a GPU."""
        with self.lock:
            self._launched = time.monotonic()
            if work.entered is not None:
                work.entered()
            stream.queue.append(work)
            self.hasten()

    def hasten(self, least: float = 0.0) -> None:
        """Let some work run, or none: the seed decides, one more piece with a probability of at least `least`."""
        with self.lock:
            while self.random.random() < max(self.haste, least) and self._step():
                pass

    def run(self, done: Callable[[], bool], waiting: str) -> None:
        """Let work run until it is `done`. Raises RuntimeError where that would wait for ever."""
        assert self.capturing is None, f"{waiting} inside a capture"
        until = None
        while not done():
            with self.lock:
                if self.error is not None:
                    raise self.error
                if done() or self._step():
                    until = None
                    continue
                local = not any(work.remote for work in self._heads())
            if until is None:
                until = time.monotonic() + PATIENCE
            if local or time.monotonic() > until:
                raise RuntimeError(f"the device waits for ever in {waiting}: {self}")
            time.sleep(0.0002)

    def __str__(self) -> str:
        parts = [f"{s.name} at {s.queue[0].name!r}, {len(s.queue)} left" for s in self.streams if s.queue]
        return "; ".join(parts) or "all streams are idle"

    def _heads(self) -> list[Work]:
        return [stream.queue[0] for stream in self.streams if stream.queue]

    def _step(self) -> bool:
        """Run the next work of one of the streams that can go on. Whether there was any."""
        ready = [s for s in self.streams if s.queue and ((head := s.queue[0]).ready is None or head.ready())]
        if not ready:
            return False
        stream = self.random.choice(ready)
        stream.queue[0].run()
        stream.queue.popleft()
        stream.complete += 1
        return True

    def work_if_idle(self) -> bool:
        """Let all work run that can, unless something was launched just now. Its error is kept for who waits. Whether
        there may be more."""
        with self.lock:
            try:
                if time.monotonic() - self._launched > IDLE and not self._stopped:
                    while self._step():
                        pass
            except BaseException as error:
                self.error = error
            return self.error is None and not self._stopped


def _in_background(own: weakref.ref[Order]) -> None:
    while (order := own()) is not None and order.work_if_idle():
        del order  # which may end meanwhile
        time.sleep(IDLE / 4)


class HostEvent:
    """A HostEvent is a point in a stream's work (device.gpu.runtime.Event)."""

    def __init__(self, stream: HostStream, behind: int):
        self._stream, self._behind = stream, behind

    @property
    def reached(self) -> bool:
        """Whether the stream is there."""
        return self._stream.complete >= self._behind

    def done(self) -> bool:
        assert self._stream.order.capturing is None, "an event is asked inside a capture"
        self._stream.order.hasten(0.3)  # a loop that asks again and again comes to an end
        return self.reached

    def synchronize(self) -> None:
        self._stream.order.run(lambda: self.reached, f"the wait for {self}")

    def __str__(self) -> str:
        return f"{self._stream.name} after its work number {self._behind}"


class HostStream:
    """A HostStream is a queue of work (device.gpu.runtime.Stream). `complete` counts what has run."""

    def __init__(self, order: Order, name: str, handle: int):
        self.order, self.name, self.handle = order, name, handle
        self.queue: deque[Work] = deque()
        self.complete = 0
        self.captured: list[Work] = []

    @property
    def launched(self) -> int:
        """How much work has been launched since the beginning."""
        with self.order.lock:
            return self.complete + len(self.queue)

    def enqueue(
        self,
        name: str,
        run: Callable[[], None],
        ready: Callable[[], bool] | None = None,
        remote: bool = False,
        entered: Callable[[], None] | None = None,
    ) -> None:
        """Append work, to the graph while this stream is captured."""
        work = Work(name, run, ready, remote, entered)
        if self.order.capturing is None:
            self.order.append(self, work)
        else:
            assert self.order.capturing is self, f"{name} is launched on another stream than the one that is captured"
            self.captured.append(work)

    def record(self) -> HostEvent:
        assert self.order.capturing is None, "an event is recorded inside a capture"
        return HostEvent(self, self.launched)

    def wait(self, event: HostEvent) -> None:
        assert self.order.capturing is None, "a stream waits for an event inside a capture"
        self.order.append(self, Work(f"wait for {event}", _nothing, lambda: event.reached))

    def synchronize(self) -> None:
        HostEvent(self, self.launched).synchronize()


class Exchanges:
    """Exchanges are work that other ranks make ready: the host device as its double of NCCL (nccl.py) knows it, by
    addresses and handles."""

    def __init__(self, order: Order, memory: HostMemory, uuid: str):
        self._order, self._memory, self.uuid = order, memory, uuid

    def memory(self, address: int, size: int) -> Array:
        """Return the bytes at an address of the device."""
        start = address - self._memory.start
        assert 0 <= start <= self._memory.size - size, "the address is not on the device"
        return self._memory.work[start : start + size]

    def enqueue(
        self, stream: int, name: str, entered: Callable[[], None], ready: Callable[[], bool], run: Callable[[], None]
    ) -> None:
        """Append work to a stream."""
        self._order.stream_of(stream).enqueue(name, run, ready, remote=True, entered=entered)


class HostGraph:
    """A HostGraph is a list of work (device.gpu.runtime.Graph)."""

    def __init__(self, work: list[Work]):
        self.work = work

    def launch(self, stream: HostStream) -> None:
        assert stream.order.capturing is None, "a graph is launched inside a capture"
        for work in self.work:
            stream.order.append(stream, work)


def capture(stream: HostStream, run: Callable[[], None]) -> HostGraph:
    """Collect what `run` launches on a stream, without running it."""
    order = stream.order
    assert order.capturing is None, "a capture inside a capture"
    order.capturing = stream
    try:
        run()
        return HostGraph(stream.captured)
    finally:
        order.capturing, stream.captured = None, []


def _nothing() -> None:
    pass
