"""Products by cublasLt: what its descriptors say is what was wanted."""

from __future__ import annotations

import pytest

from tests.gpu.cuda_packages import each_version, run

pytestmark = pytest.mark.long


@each_version
def test_the_descriptors_say_what_is_wanted(version: int) -> None:
    """The descriptors are cublasLt's own; the products are computed from them on the CPU."""
    assert run(version, "cublaslt_products.py", libcuda=True).startswith("256 products")
