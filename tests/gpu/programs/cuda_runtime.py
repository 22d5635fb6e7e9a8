"""Runs device/gpu/cuda.py, and the GPU device over it, on CuPy's own arrays, over a driver that needs no GPU."""

from __future__ import annotations

import cupy
import numpy as np
import pytest

from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu import Gpu
from nettorrent_mpi.plan.errors import DeviceMemoryError
from tests.gpu.host.driver import Driver, DriverError, install
from tests.gpu.host.runtime import HostRuntime

ROUNDS = 20


def main() -> None:
    driver = Driver(HostRuntime(1, memory=1 << 28, uuid="A"))
    install(driver)
    device = make_device("gpu", index=2)
    assert isinstance(device, Gpu)
    assert driver.index == 2
    about = device.runtime.properties
    assert (about.name, about.capability, about.processors) == ("NVIDIA H200", (9, 0), 132)
    assert about.uuid == "A, 0000:02:00.0 0102030405060708090a0b0c0d0e0f10"
    assert about.memory == 1 << 28
    assert about.runtime // 1000 in (12, 13)
    arrays(device)
    work(device, driver)
    with pytest.raises(DeviceMemoryError, match=r"NVIDIA H200: this rank needs 256\.0 MiB"):
        device.empty((1 << 28,), np.uint8)
    device.close()
    assert not driver.allocated
    print("complete")


def arrays(device: Gpu) -> None:
    """Arrays of all types and strides travel, and are views of the arena."""
    rng = np.random.default_rng(1)
    for dtype in (np.float32, np.float64, np.uint8, np.bool_, np.int64):
        array = device.empty((6, 3, 4, 5), dtype)
        assert isinstance(array, cupy.ndarray)
        assert array.flags.c_contiguous
        values = rng.integers(0, 2, array.shape).astype(dtype)
        device.upload(array, values)
        for x, y in (
            (array, values),
            (array.transpose(1, 2, 3, 0), values.transpose(1, 2, 3, 0)),
            (array[:, :, :, 1:3], values[:, :, :, 1:3]),
            (array[2, 1, 0, 3:4].reshape(()), values[2, 1, 0, 3:4].reshape(())),
            (array[:, 2:2], values[:, 2:2]),
        ):
            np.testing.assert_array_equal(device.on_host(x), y)
    workspace = device.workspace(np.float32)
    large, small = workspace.keep("x", (7, 9)), workspace.keep("x", (2, 9))
    assert np.may_share_memory(large, small)
    dx = workspace.gradient((7, 9), large)
    assert not np.may_share_memory(dx, workspace.gradient((7, 9), dx))
    assert device.runtime.address(device.empty((0, 3), np.float32)) == 0
    assert not device.on_host(device.zeros((3, 5), np.float64)).any()


def work(device: Gpu, driver: Driver) -> None:
    """Kernels, products, numbers, events and captures, in orders that events allow."""
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((5, 7)), rng.standard_normal((7, 3))
    first, second, out = (device.empty(x.shape, np.float64) for x in (a, b, a @ b))
    device.upload(first, a)
    device.upload(second, b)
    device.ops.matmul(first, second, out)
    np.testing.assert_allclose(device.on_host(out), a @ b, rtol=1e-12)
    geometry = Geometry.of((5, 4, 2), 3, (3, 3), (2, 1), "same")
    image, filters, bias = rng.standard_normal((6, 5, 4, 2)), rng.standard_normal((3, 3, 2, 3)), rng.standard_normal(3)
    wanted = np.empty((6, *geometry.output))
    make_device().ops.convolve(image, filters, bias, wanted, geometry)
    x, w, b3, y = (device.empty(shape, np.float64) for shape in (image.shape, (3, 3, 3, 2), (3,), wanted.shape))
    w = w.transpose(1, 2, 3, 0)
    for array, values in ((x, image), (w, filters), (b3, bias)):
        device.upload(array, values)
    device.ops.convolve(x, w, b3, y, geometry)
    np.testing.assert_allclose(device.on_host(y), wanted, rtol=1e-12, atol=1e-12)
    numbers, total, scale, g = device.numbers(1), *(device.zeros((1,), np.float64) for _ in range(3))
    device.upload(scale, np.ones(1))
    device.upload(g, -np.ones(1))

    captured = device.capture(lambda: device.ops.sgd(total, g, numbers.array, scale, 0.0))
    for number in range(ROUNDS):
        numbers.set((number,))
        captured()
    copied, event = device.empty((1,), np.float64), device.compute.record()
    device.copies.wait(event)
    with device.on(device.copies):
        device.runtime.copy(device.stream, copied, total)
        assert driver.current == device.copies.handle
    assert driver.current == device.compute.handle
    last = device.copies.record()
    while not last.done():
        pass
    driver.failure = 700  # cudaErrorIllegalAddress
    with pytest.raises(DriverError, match="700"):
        last.done()
    driver.failure = 0
    assert device.on_host(copied)[0] == sum(range(ROUNDS))
    with pytest.raises(ZeroDivisionError):
        device.runtime.capture(device.compute, lambda: 1 // 0)
    assert driver.host.order.capturing is None


if __name__ == "__main__":
    main()
