"""Every kernel compiles to machine code for every architecture and type, and keeps its numbers in registers."""

from __future__ import annotations

import json

import pytest

from nettorrent_mpi.device.gpu import source
from tests.gpu.cuda_packages import each_version, run

pytestmark = pytest.mark.long


@each_version
@pytest.mark.parametrize("real", source.REALS)
def test_every_kernel_compiles_without_spills(version: int, real: str) -> None:
    """NVRTC is called as CuPy calls it, and its assembler tells of each kernel; no GPU is needed."""
    found = json.loads(run(version, "compile_kernels.py", real))[real]
    assert list(found) == ["75", "80", "90", "100", "120"]
    for architecture, kernels in found.items():
        assert set(kernels) == set(source.signatures())
        spilling = {name: numbers for name, numbers in kernels.items() if any(numbers[:3])}
        assert not spilling, f"sm_{architecture}: bytes of stack, spill stores, spill loads; registers: {spilling}"
        assert all(numbers[3] <= 128 for numbers in kernels.values()), kernels  # two blocks of 256 threads at least
