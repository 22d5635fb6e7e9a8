"""The parts of `make bench-gpu`, in their order: limits add up to less than eight minutes."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """A Part is the function `run` of a module, or another one of its functions, that has `limit` seconds."""

    name: str
    module: str
    limit: float
    shows: str
    function: str = "run"


PARTS = (
    Part("machine", "benchmarks.gpu.machine", 20, "versions of everything, and the properties of the GPU"),
    Part("kernels", "benchmarks.gpu.kernels", 70, "all kernels against NumPy"),
    Part("sanitizer", "benchmarks.gpu.kernels", 55, "the same under compute-sanitizer", "sanitize"),
    Part("products", "benchmarks.gpu.products", 40, "cublasLt with all epilogs, in three types, captured"),
    Part(
        "convolution",
        "benchmarks.gpu.convolutions",
        45,
        "cuDNN against float64: KRSC, HWIO, strict, tf32, bfloat16, captured",
    ),
    Part("nccl", "benchmarks.gpu.collectives", 35, "NCCL on one rank, and on two where two may share the GPU"),
    Part("parity", "benchmarks.gpu.parity", 70, "20 steps on 1, 2 and 4 ranks against the CPU"),
    Part("launches", "benchmarks.gpu.launches", 20, "what a launch of each kind costs"),
    Part("steps", "benchmarks.gpu.steps", 110, "the time of a step against PyTorch, eager and compiled"),
)
