"""CuPy's binding of NCCL: its double has the same interface, and comm/nccl.py uses it as it is."""

from __future__ import annotations

import pytest

from tests.gpu.cuda_packages import each_version, run


@pytest.mark.long
@each_version
def test_the_binding(version: int) -> None:
    assert run(version, "nccl_binding.py") == "complete\n"
