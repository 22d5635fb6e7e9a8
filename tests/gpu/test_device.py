"""The GPU device over the host device: memory, transfers, numbers that change from step to step, captures."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device import gpu as package
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.device.gpu import Gpu, arena, host_copies, numbers
from nettorrent_mpi.plan.errors import DeviceMemoryError, UserError
from tests.gpu.host.runtime import HostRuntime

SEEDS = 20
BLOCK_BYTES = 1 << 20


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "BLOCK_BYTES", BLOCK_BYTES)


@pytest.fixture
def gpu() -> Gpu:
    return Gpu(HostRuntime(seed=1))


def runtime_of(device: Gpu) -> HostRuntime:
    assert isinstance(device.runtime, HostRuntime)
    return device.runtime


# -- memory -----------------------------------------------------------------------------------------------------------


def test_arrays_are_aligned_and_lie_apart(gpu: Gpu) -> None:
    shapes = ((), (3, 5), (1000,), (2, 0, 3))
    arrays = [gpu.empty(shape, dtype) for shape in shapes for dtype in ("u1", "f4", "f8", "?")]
    spans = sorted((runtime_of(gpu).address(a), a.nbytes) for a in arrays if a.size)
    assert all(start % 256 == 0 for start, _ in spans)
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))
    assert [a.shape for a in arrays[::4]] == list(shapes)
    assert runtime_of(gpu).allocations == 1
    assert all(a.flags.c_contiguous for a in arrays)


def test_a_right_estimate_is_one_allocation() -> None:
    device = Gpu(HostRuntime())
    sizes = [BLOCK_BYTES // 3 + 17, 1, 300, 2 * BLOCK_BYTES]
    device.arena.reserve(sum(-(-size // 256) * 256 for size in sizes))
    for size in sizes:
        device.empty((size,), np.uint8)
    assert runtime_of(device).allocations == 1
    assert device.arena.used == device.arena.reserved
    device.arena.reserve(0)
    assert runtime_of(device).allocations == 1
    device.empty((1,), np.uint8)  # the estimate was too small
    device.empty((BLOCK_BYTES + 1,), np.uint8)
    device.empty((100,), np.uint8)
    assert runtime_of(device).allocations == 3
    device.close()
    assert runtime_of(device).memory.free_bytes == runtime_of(device).memory.size
    device.close()


def test_too_little_memory_is_told_with_what_lowers_it() -> None:
    device = Gpu(HostRuntime(memory=5 << 20))
    device.empty((1000,), np.float64)
    with pytest.raises(DeviceMemoryError) as error:
        device.empty((1 << 19,), np.float64)
    text = str(error.value)
    assert isinstance(error.value, UserError)
    assert text.startswith("host device: this rank needs 4.0 MiB more than the 1.0 MiB that it holds")
    assert "only 4.0 MiB of 5.0 MiB are free" in text
    assert all(word in text for word in ("batch_size", "micro_batches", "ranks", "replicas", "--dry-run"))
    device.empty((BLOCK_BYTES - 8192,), np.uint8)  # what is there can still be used
    device.empty((3 << 20,), np.uint8)
    device.empty((1 << 19,), np.uint8)  # in a block that is smaller than others
    with pytest.raises(DeviceMemoryError):
        device.empty((1 << 19,), np.uint8)


def test_a_device_is_made_over_the_runtime_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[int]()

    def open_runtime(index: int) -> HostRuntime:
        opened.append(index)
        return HostRuntime(memory=1 << 20)

    monkeypatch.setattr(package, "open_runtime", open_runtime)
    device = make_device("gpu", index=3, tf32=True)
    assert isinstance(device, Gpu)
    assert (opened, device.kind, device.tf32, device.names) == ([3], "gpu", True, ["the host device"])


def test_workspaces_make_their_memory_on_the_device(gpu: Gpu) -> None:
    shared = gpu.workspace(np.float32)
    workspace = gpu.workspace(np.float32, shared)
    large = workspace.keep("y", (7, 30))
    small = workspace.keep("y", (3, 30))
    memory = runtime_of(gpu).memory
    assert memory.holds(large)
    assert runtime_of(gpu).address(large) == runtime_of(gpu).address(small)
    assert workspace.keep("y", (7, 30)) is large
    dx = workspace.gradient((7, 30), large)
    other = workspace.child("inner").gradient((7, 20), dx)
    assert not np.may_share_memory(dx, other)
    assert np.may_share_memory(workspace.gradient((7, 10), other), dx)
    assert memory.holds(workspace.child("inner").keep("mean", (5,), np.float64))
    assert workspace.bytes == 7 * 30 * 4 + 5 * 8
    assert shared.bytes == 7 * 30 * 4 + 7 * 20 * 4
    assert workspace.reshaped(large, (210,)) is workspace.reshaped(large, (210,))


# -- transfers --------------------------------------------------------------------------------------------------------

VIEWS: dict[str, Any] = {
    "whole": lambda x: x,
    "filters": lambda x: x.transpose(1, 2, 3, 0),
    "columns": lambda x: x[:, :, :, 1:3],
    "filters' inputs": lambda x: x.transpose(1, 2, 3, 0)[:, :, 2:4],
    "filters' outputs": lambda x: x.transpose(1, 2, 3, 0)[:, :, :, 3:5],
    "one": lambda x: x[2, 1, 0, 3:4].reshape(()),
    "axis of one": lambda x: x[:, 1:2, :, 4:5],
    "nothing": lambda x: x[:, 2:2],
    "nothing in filters": lambda x: x.transpose(1, 2, 3, 0)[:, :, :, :0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("room", [1 << 24, 96, 16])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bool"])
def test_arrays_of_any_strides_travel(
    view: str, room: int, dtype: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copies, "STAGING_BYTES", room)
    rng = np.random.default_rng(5)
    whole = gpu.empty((6, 3, 4, 5), dtype)
    start, values = (rng.integers(0, 2 if dtype == "bool" else 100, whole.shape).astype(dtype) for _ in range(2))
    gpu.upload(whole, start)
    np.testing.assert_array_equal(gpu.on_host(whole), start)
    gpu.upload(VIEWS[view](whole), VIEWS[view](values))
    wanted = start.copy()
    VIEWS[view](wanted)[...] = VIEWS[view](values)
    np.testing.assert_array_equal(gpu.on_host(whole), wanted)
    np.testing.assert_array_equal(gpu.on_host(VIEWS[view](whole)), VIEWS[view](wanted))
    out = np.zeros(VIEWS[view](whole).shape)
    gpu.download(out.T.T, VIEWS[view](whole))  # into another type, too
    np.testing.assert_array_equal(out, VIEWS[view](wanted))


def test_uploaded_values_are_converted_and_may_be_changed_at_once(gpu: Gpu) -> None:
    array, values = gpu.empty((5, 7), np.float32), np.arange(70.0).reshape(7, 10).T[::2]
    wanted = values.astype(np.float32)
    gpu.upload(array, values)
    values[...] = -1
    np.testing.assert_array_equal(gpu.on_host(array), wanted)
    with pytest.raises(AssertionError):
        gpu.upload(array, values[0])


def test_zeros_are_zeros(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (1 << 24, 16):
        monkeypatch.setattr(host_copies, "STAGING_BYTES", room)
        for dtype in (np.float32, np.bool_, np.int64):
            for shape in ((), (3, 5), (0, 2)):
                assert not gpu.on_host(gpu.zeros(shape, dtype)).any()


def test_what_is_downloaded_waits_for_both_streams() -> None:
    for seed in range(SEEDS):
        device = Gpu(HostRuntime(seed))
        array, slot = device.zeros((4,), np.float64), runtime_of(device).pinned(32).view(np.float64)
        for stream in (device.compute, device.copies, device.make_stream()):
            slot[...] += 1
            device.runtime.copy(stream, array, slot)
            np.testing.assert_array_equal(device.on_host(array), slot)


def test_operations_go_to_the_present_stream(gpu: Gpu) -> None:
    assert gpu.stream is gpu.compute
    with gpu.on(gpu.copies):
        assert gpu.stream is gpu.copies
        with gpu.on(gpu.compute):
            assert gpu.stream is gpu.compute
        assert gpu.stream is gpu.copies

    def fail() -> None:
        with gpu.on(gpu.copies):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert gpu.stream is gpu.compute


# -- numbers ----------------------------------------------------------------------------------------------------------


class Reader:
    """A Reader launches work that reads numbers, and keeps what it found."""

    def __init__(self, device: Gpu, array: Array):
        self.device, self.found = device, list[tuple[float, ...]]()
        self._data = runtime_of(device).within(array)

    def launch(self) -> None:
        stream: Any = self.device.stream
        stream.enqueue("read", lambda: self.found.append(tuple(self._data.tolist())))


def test_every_step_reads_its_own_numbers() -> None:
    steps = 3 * numbers.SLOTS + 5
    for seed in range(SEEDS):
        device = Gpu(HostRuntime(seed))
        given = device.numbers(3)
        reader = Reader(device, given.array)
        reader.launch()
        for step in range(steps):
            given.set((step, 2.5, -step))
            reader.launch()
            reader.launch()
        device.synchronize()
        wanted = [(0.0, 0.0, 0.0)] + [(float(n), 2.5, float(-n)) for n in range(steps) for _ in range(2)]
        assert reader.found == wanted


def test_the_host_waits_for_numbers_only_when_it_is_a_ring_ahead() -> None:
    device = Gpu(HostRuntime(next(seed for seed in range(99) if HostRuntime(seed, memory=4096).order.haste == 0)))
    given = device.numbers(2)
    reader = Reader(device, given.array)
    for step in range(numbers.SLOTS):
        given.set((step, step))
        reader.launch()
    assert reader.found == []
    given.set((-1, -1))
    assert reader.found == []  # as far as the first copy
    given.set((-1, -1))
    assert reader.found == [(0, 0)]


def test_a_ring_without_events_gives_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ring's events are for: without them most orders of work are wrong."""
    steps, wrong = 3 * numbers.SLOTS, 0
    for seed in range(SEEDS):
        device = Gpu(HostRuntime(seed))
        given = device.numbers(1)
        reader = Reader(device, given.array)
        for step in range(steps):
            monkeypatch.setattr(given, "_copied", [None] * numbers.SLOTS)
            given.set((step,))
            reader.launch()
        device.synchronize()
        wrong += reader.found != [(float(n),) for n in range(steps)]
    assert wrong > SEEDS / 2


# -- captures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_captured_run_reads_numbers_anew_and_calls_its_function_three_times(seed: int) -> None:
    device = Gpu(HostRuntime(seed))
    given = device.numbers(1)
    reader, calls = Reader(device, given.array), list[int]()

    def run() -> None:
        calls.append(len(calls))
        if calls[-1] < 2:
            device.empty((BLOCK_BYTES,), np.uint8)  # the first two calls may allocate
        reader.launch()
        reader.launch()

    step = device.capture(run)
    for number in range(7):
        given.set((number,))
        step()
    device.synchronize()
    assert reader.found == [(float(n),) for n in range(7) for _ in range(2)]
    assert len(calls) == 3


def test_a_run_that_fails_is_not_captured(gpu: Gpu) -> None:
    calls = list[int]()

    def run() -> None:
        calls.append(1)
        if len(calls) in (1, 4):
            raise ZeroDivisionError

    step = gpu.capture(run)
    for _ in range(6):
        if len(calls) in (0, 3):
            with pytest.raises(ZeroDivisionError):
                step()
        else:
            step()
    assert len(calls) == 5


def test_numbers_are_not_set_inside_a_capture(gpu: Gpu) -> None:
    given = gpu.numbers(1)
    step = gpu.capture(lambda: given.set((1,)))
    step()
    step()
    with pytest.raises(AssertionError, match="inside a capture"):
        step()


# -- CuPy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writable", [True, False])
def test_kernels_are_kept_in_memory_where_no_folder_can_be(
    writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / ("kernels" if writable else "file/kernels")))
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    monkeypatch.setitem(sys.modules, "nettorrent_mpi.device.gpu.cuda", SimpleNamespace(Cuda=str))
    assert package.open_cuda(3) == "3"  # type: ignore[comparison-overlap]
    assert ("CUPY_CACHE_IN_MEMORY" in os.environ) != writable
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
