"""The host device is as lazy as CUDA allows, and what a program forgets shows: an event, a wait, a copy's source."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.gpu.host.memory import HostMemory
from tests.gpu.host.runtime import HostRuntime
from tests.gpu.host.streams import HostEvent, HostStream

ROOT = Path(__file__).resolve().parents[2]
STEPS, SEEDS = 6, 200


class Counting:
    """Counting is a training in miniature: a copy stream brings batch n + 1 into one of two buffers, and the compute
    stream adds up batch n. `forgotten` names the event that is left out."""

    def __init__(self, seed: int, forgotten: str = ""):
        self.runtime = HostRuntime(seed, memory=1 << 20)
        self.copies, self.compute = self.runtime.stream(), self.runtime.stream()
        self.forgotten = forgotten
        self.slots = [self.runtime.pinned(32).view(np.float64) for _ in range(2)]
        self.buffers = [self.runtime.allocate(32).view(np.float64) for _ in range(2)]
        self.found: list[float] = []

    def wait(self, name: str, stream: HostStream, event: HostEvent | None) -> None:
        if event is not None and name != self.forgotten:
            stream.wait(event)

    def step(self, number: int, buffer: int) -> None:
        data = self.runtime.within(self.buffers[buffer])
        self.compute.enqueue(f"step {number}", lambda: self.found.append(float(data[3])))

    def run(self) -> list[float]:
        arrived: list[HostEvent | None] = [None, None]
        used: list[HostEvent | None] = [None, None]
        for number in range(STEPS):
            b = number % 2
            event = arrived[b]
            if event is not None and self.forgotten != "slot":
                event.synchronize()  # the slot may be written again
            self.slots[b][...] = number
            self.wait("used", self.copies, used[b])
            self.runtime.copy(self.copies, self.buffers[b], self.slots[b])
            arrived[b] = self.copies.record()
            self.wait("arrived", self.compute, arrived[b])
            self.step(number, b)
            used[b] = self.compute.record()
        self.compute.synchronize()
        return self.found


@pytest.mark.parametrize("forgotten", ["", "used", "arrived", "slot"])
def test_a_forgotten_event_gives_wrong_numbers(forgotten: str) -> None:
    wanted = [float(n) for n in range(STEPS)]
    wrong = sum(Counting(seed, forgotten).run() != wanted for seed in range(SEEDS))
    assert wrong == 0 if not forgotten else wrong > SEEDS / 2, wrong


def test_nothing_runs_before_somebody_waits() -> None:
    runtime = HostRuntime(next(seed for seed in range(99) if HostRuntime(seed, memory=4096).order.haste == 0))
    stream, done = runtime.stream(), list[int]()
    for number in range(5):
        stream.enqueue("append", lambda number=number: done.append(number))
    assert done == []
    event = stream.record()
    stream.enqueue("append", lambda: done.append(5))
    event.synchronize()
    assert done[:5] == list(range(5))
    stream.synchronize()
    assert done == list(range(6))


def test_a_loop_that_asks_an_event_ends() -> None:
    for seed in range(20):
        stream = HostRuntime(seed, memory=4096).stream()
        for _ in range(50):
            stream.enqueue("nothing", lambda: None)
        event, asked = stream.record(), 0
        while not event.done():
            asked += 1
            assert asked < 10_000


def test_work_that_waits_for_ever_is_named() -> None:
    runtime = HostRuntime(3, memory=4096)
    first, second = runtime.stream(), runtime.stream()
    first.enqueue("never", lambda: None, ready=lambda: False)
    second.wait(first.record())
    second.enqueue("behind it", lambda: None)
    with pytest.raises(RuntimeError, match=r"stream 0 at 'never', 1 left; stream 1 at 'wait for stream 0 .*', 2 left"):
        second.synchronize()


@pytest.mark.parametrize("background", [False, True])
def test_work_of_other_ranks_is_waited_for_and_runs_in_the_background(background: bool) -> None:
    since = time.monotonic()

    def later() -> bool:
        return time.monotonic() > since + 0.1

    done = list[str]()
    stream = HostRuntime(3, memory=4096, background=background).stream()
    stream.enqueue("receive", lambda: done.append("receive"), ready=later, remote=True)
    if background:
        while not done:
            time.sleep(0.01)
            assert time.monotonic() < since + 10
    else:
        stream.synchronize()
    assert done == ["receive"]
    assert later()


def test_the_background_ends_with_its_device() -> None:
    others = set(threading.enumerate())

    def threads() -> int:
        return sum(thread.name == "host device" and thread not in others for thread in threading.enumerate())

    def wait_for(count: int) -> None:
        until = time.monotonic() + 20
        while threads() > count and time.monotonic() < until:
            gc.collect()
            time.sleep(0.02)
        assert threads() == count

    stopped, runtime = (HostRuntime(3, memory=4096, background=True) for _ in range(2))
    runtime.stream().enqueue("nothing", lambda: None)
    assert threads() == 2
    stopped.order.stop()
    wait_for(1)
    del runtime
    wait_for(0)


def test_a_failure_in_the_background_is_raised_where_the_host_waits() -> None:
    stream = HostRuntime(3, memory=4096, background=True).stream()
    stream.enqueue("divide", lambda: 1 // 0)
    time.sleep(0.2)
    with pytest.raises(ZeroDivisionError):
        stream.synchronize()


@pytest.mark.parametrize("seed", range(5))
def test_a_graph_is_replayed_with_what_memory_holds_then(seed: int) -> None:
    runtime = HostRuntime(seed, memory=1 << 20)
    stream, memory = runtime.stream(), runtime.allocate(8).view(np.float64)
    slot, data, found = runtime.pinned(8).view(np.float64), runtime.within(memory), list[float]()

    def work() -> None:
        runtime.copy(stream, memory, slot)
        stream.enqueue("read", lambda: found.append(float(data[0])))

    slot[0] = 1
    graph = runtime.capture(stream, work)
    stream.synchronize()
    assert found == []
    for number in (2, 3):
        slot[0] = number
        graph.launch(stream)
        stream.synchronize()
    assert found == [2, 3]


FORBIDDEN: dict[str, Callable[[HostRuntime, HostStream, HostStream, HostEvent], object]] = {
    "memory is allocated inside": lambda runtime, stream, other, event: runtime.allocate(8),
    "memory is pinned inside": lambda runtime, stream, other, event: runtime.pinned(8),
    "is recorded inside": lambda runtime, stream, other, event: stream.record(),
    "waits for an event inside": lambda runtime, stream, other, event: stream.wait(event),
    "is asked inside": lambda runtime, stream, other, event: event.done(),
    "the wait for stream 0 after its work number 0 inside": lambda runtime, stream, other, event: event.synchronize(),
    "stream 0 .* inside a capture": lambda runtime, stream, other, event: stream.synchronize(),
    "on another stream": lambda runtime, stream, other, event: other.enqueue("x", lambda: None),
    "a capture inside": lambda runtime, stream, other, event: runtime.capture(stream, lambda: None),
}


@pytest.mark.parametrize("told", FORBIDDEN)
def test_what_a_capture_forbids_is_told(told: str) -> None:
    runtime = HostRuntime(memory=1 << 20)
    stream, other = runtime.stream(), runtime.stream()
    event = stream.record()
    with pytest.raises(AssertionError, match=told):
        runtime.capture(stream, lambda: FORBIDDEN[told](runtime, stream, other, event))
    runtime.capture(stream, lambda: None).launch(stream)  # the capture has ended
    stream.synchronize()


def test_copies_want_contiguous_and_pinned_memory() -> None:
    runtime = HostRuntime(memory=1 << 20)
    stream, memory = runtime.stream(), runtime.allocate(64)
    with pytest.raises(AssertionError, match="not pinned"):
        runtime.copy(stream, memory, np.zeros(64, np.uint8))
    with pytest.raises(AssertionError, match="strided"):
        runtime.copy(stream, memory.reshape(8, 8)[:, :4], runtime.pinned(32))
    with pytest.raises(AssertionError, match="64, 32"):
        runtime.copy(stream, memory, runtime.pinned(32))
    runtime.copy(stream, memory[:0], runtime.pinned(0))
    stream.synchronize()


def test_memory_is_poisoned_and_used_again() -> None:
    memory = HostMemory(1 << 20)
    arrays = [memory.allocate(size) for size in (1000, 5, 0, 70_000)]
    for array in arrays:
        assert (memory.within(array) == 0xFF).all()
        assert array.size == 0 or array.ctypes.data % 256 == 0
        memory.within(array)[...] = 7
    with pytest.raises(MemoryError):
        memory.allocate(1 << 20)
    for array in arrays:
        memory.free(array)
    assert memory.free_bytes == 1 << 20
    again = memory.allocate((1 << 20) - 4096)
    assert (memory.within(again) == 0xFF).all()
    memory.free(again)


def test_work_that_writes_behind_its_memory_is_found() -> None:
    memory = HostMemory(1 << 20)
    array = memory.allocate(1000)
    memory.within(array.base)[array.ctypes.data - memory.start + 1000] = 0
    with pytest.raises(AssertionError, match="behind its memory"):
        memory.free(array)


@pytest.mark.parametrize("access", ["float(x[0])", "x[0] = 1", "x.sum()", "np.copyto(x, 0)", "x.tolist()", "x + x"])
def test_the_host_cannot_touch_the_device(access: str) -> None:
    program = f"""
import numpy as np
from tests.gpu.host.memory import HostMemory
x = HostMemory(1 << 20).allocate(80).view(np.float64).reshape(2, 5)[1]
print("made", x.shape, flush=True)
{access}
print("touched")
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == -signal.SIGSEGV, run.stderr
    assert run.stdout == "made (5,)\n"
