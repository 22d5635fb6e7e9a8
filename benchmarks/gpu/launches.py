"""This part measures what a launch of each kind costs: the host's time for a call, and the GPU's for many of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from benchmarks.gpu.on_device import OnDevice
from benchmarks.gpu.record import Record
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu.runtime import Matrix

MANY = 1000


def run(record: Record) -> None:
    bench = OnDevice()
    count = 20 if record.host else MANY
    for name, prepare in KINDS.items():
        with record.case(name) as figures:
            figures.update(cost(bench, prepare(bench), count))
    for length in (10, 100):
        with record.case(f"graph of {length} small kernels") as figures:
            kernel = small_kernel(bench)
            graph = bench.captured(lambda kernel=kernel, length=length: [kernel() for _ in range(length)] and None)
            figures.update(cost(bench, graph, max(count // length, 1)))
            figures["each_kernel_us"] = figures["each_us"] / length


def cost(bench: OnDevice, run: Callable[[], None], count: int) -> dict[str, float]:
    """Return microseconds: `host_us` of a call while the GPU is behind, `each_us` until all are done."""
    run()
    bench.device.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        run()
    called = time.perf_counter()
    bench.device.synchronize()
    done = time.perf_counter()
    return {"host_us": (called - began) / count * 1e6, "each_us": (done - began) / count * 1e6, "calls": count}


def small_kernel(bench: OnDevice) -> Callable[[], None]:
    x = bench.up(np.zeros(256))
    return lambda: bench.device.ops.scale(x, 1.0)


def large_kernel(bench: OnDevice) -> Callable[[], None]:
    x = bench.up(np.zeros(1 << 16))
    return lambda: bench.device.ops.scale(x, 1.0)


def numbers(bench: OnDevice) -> Callable[[], None]:
    held = bench.device.numbers(4)
    return lambda: held.set((1.0, 2.0, 3.0, 4.0))


def upload(bench: OnDevice, size: int = 1 << 20) -> Callable[[], None]:
    out, pinned = bench.device.empty((size,), np.uint8), bench.device.runtime.pinned(size)
    return lambda: bench.device.runtime.copy(bench.device.stream, out, pinned)


def events(bench: OnDevice) -> Callable[[], None]:
    device = bench.device
    return lambda: device.copies.wait(device.stream.record())


def synchronize(bench: OnDevice) -> Callable[[], None]:
    return bench.device.stream.synchronize


def product(bench: OnDevice) -> Callable[[], None]:
    a, b, out = (bench.up(np.zeros((64, 64))) for _ in range(3))
    ready = bench.device.runtime.product(Matrix(a), Matrix(b), out, workspace=bench.workspace(1 << 22))
    return lambda: ready.run(bench.device.stream)


def remembered_product(bench: OnDevice) -> Callable[[], None]:
    a, b, out = (bench.up(np.zeros((64, 64))) for _ in range(3))
    return lambda: bench.device.ops.matmul(a, b, out)


def convolution(bench: OnDevice) -> Callable[[], None]:
    geometry = Geometry.of((8, 8, 4), 4, (3, 3), (1, 1), "same")
    x, y, weight = (bench.up(np.zeros(shape)) for shape in ((2, 8, 8, 4), (2, 8, 8, 4), (4, 3, 3, 4)))
    ready = bench.device.runtime.convolution("forward", x, weight, y, geometry, workspace=bench.workspace)
    return lambda: ready.run(bench.device.stream)


KINDS: dict[str, Callable[[OnDevice], Callable[[], None]]] = {
    "small kernel (256 numbers)": small_kernel,
    "kernel of 65,536 numbers": large_kernel,
    "numbers of a step (4)": numbers,
    "upload of 1 MiB": upload,
    "event recorded and waited for": events,
    "synchronize an idle stream": synchronize,
    "product of 64 x 64, prepared": product,
    "product of 64 x 64, by its arrays": remembered_product,
    "convolution of 8 x 8 x 4, prepared": convolution,
}
