"""Runs the tests of kernels on a real GPU: `python -m pytest -p tests.gpu.on_gpu tests/gpu/test_flat_kernels.py`.

The same functions compare the same operations with the CPU device's; only the runtime is the GPU's instead of the host
device's. What a test asks of the host device alone (the order of its work, planted faults) is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from nettorrent_mpi.device import gpu as package
from nettorrent_mpi.device.gpu import Gpu, arena
from tests.gpu.host import build, runtime

HERE = Path(__file__).parent
SHARED = re.compile(r"from tests\.gpu\.(compared|kernel_cases) import|host_ops")  # by what tests of kernels are known


def modules() -> list[Path]:
    """Return the test modules whose tests run on a GPU, too."""
    return [path for path in sorted(HERE.glob("test_*.py")) if SHARED.search(path.read_text(encoding="utf-8"))]


@cache
def opened() -> Any:
    """Open the GPU, once for all tests: kernels are loaded once."""
    return package.open_runtime(0)


class OnGpu:
    """OnGpu stands where tests expect the host device's runtime."""

    def __init__(self, *_: Any, **__: Any):
        self._runtime = opened()

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self._runtime, name):
            pytest.skip(f"the host device alone has {name!r}")
        return getattr(self._runtime, name)


@pytest.fixture(autouse=True)
def _free_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Free the memory of the devices that a test has made."""
    made: list[Gpu] = []
    make = Gpu.__init__

    def remember(self: Gpu, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(Gpu, "__init__", remember)
    yield
    for device in made:
        device.close()


def pytest_configure() -> None:
    runtime.HostRuntime = OnGpu  # type: ignore[assignment,misc]
    there = build.compiler()
    build.compiler = lambda: there or "none is needed"
    arena.BLOCK_BYTES = 1 << 20
