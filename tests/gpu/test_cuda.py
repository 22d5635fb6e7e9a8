"""CuPy's runtime: everything in device/gpu/cuda.py runs on CuPy's own arrays, over a driver that needs no GPU."""

from __future__ import annotations

import pytest

from tests.gpu.cuda_packages import each_version, run
from tests.gpu.host.build import compiler

pytestmark = [pytest.mark.long, pytest.mark.skipif(compiler() is None, reason="g++ is not installed")]


@each_version
def test_the_runtime_translates(version: int) -> None:
    assert run(version, "cuda_runtime.py") == "complete\n"
