"""GPUs that are known where none is: cuDNN plans convolutions for them, and says how much memory that takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nettorrent_mpi.device.arrays import DType
from nettorrent_mpi.device.geometry import Geometry

# As `cudnn.create_device_properties(0).serialize()` gives them on the GPU itself; these are from CUDA's public figures
# (deviceQuery; clocks in kHz). cuDNN's choice depends on the architecture and on the processors, less on the rest.
_HOPPER = {
    "maxGridSize": [2147483647, 65535, 65535],
    "maxBlockSize": [1024, 1024, 64],
    "regsPerBlock": 65536,
    "multiProcessorCount": 132,
    "warpSize": 32,
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448,
    "reservedSharedMemoryPerBlock": 1024,
    "maxRegistersPerSM": 65536,
    "maxCtasPerSM": 32,
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "pciDeviceId": 9013,
    "isTccDriver": 0,
    "supportCoopLaunch": 1,
    "totalGlobalMem": 150754820096,
    "smClockRateKHz": 1980000,
    "memClockRateKHz": 3201000,
    "memoryBusWidth": 6144,  # bits; asked for since cuDNN 9.28
    "l2CacheSize": 62914560,
    "cudaDeviceId": 0,
    "deviceVer": 900,
    "driverVer": 13000,
    "deviceName": "NVIDIA H200",
}
KNOWN: dict[str, dict[str, Any]] = {
    "H200": _HOPPER,
    "A100": {
        **_HOPPER,
        "deviceName": "NVIDIA A100-SXM4-80GB",
        "deviceVer": 800,
        "multiProcessorCount": 108,
        "maxSharedMemoryPerBlockOptin": 166912,
        "totalGlobalMem": 85899345920,
        "smClockRateKHz": 1410000,
        "memClockRateKHz": 1593000,
        "memoryBusWidth": 5120,
        "l2CacheSize": 41943040,
    },
    "B200": {
        **_HOPPER,
        "deviceName": "NVIDIA B200",
        "deviceVer": 1000,
        "multiProcessorCount": 148,
        "totalGlobalMem": 192265846784,
        "smClockRateKHz": 1965000,
        "memClockRateKHz": 3996000,
        "memoryBusWidth": 8192,
        "l2CacheSize": 132644864,
    },
}


def convolution_workspace(
    gpu: str, convolutions: Iterable[tuple[str, Geometry, bool, bool]], rows: int, dtype: DType, tf32: bool = False
) -> int:
    """Return the bytes that the neediest of these convolutions (kind, geometry, whether with a bias and with a ReLU)
    works in on a known GPU, for `rows` images. Needs cuDNN and its frontend (ImportError), and libcuda.so.1
    (RuntimeError), no GPU."""
    from nettorrent_mpi.device.gpu.cudnn import plan_workspace, properties_of

    properties = properties_of(KNOWN[gpu])
    sizes = (
        plan_workspace(properties, kind, geometry, rows, dtype, tf32, bias, relu)
        for kind, geometry, bias, relu in convolutions
    )
    return max(sizes, default=0)
