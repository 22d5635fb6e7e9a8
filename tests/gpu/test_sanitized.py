"""No kernel touches a byte beyond its arrays: their tests run under AddressSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ["codecs", "flat_kernels", "gather", "loss_kernels", "masks", "norms", "pools", "update_kernels"]
FAULT = "tests/gpu/test_norms.py::test_faults_in_sums_are_found[a column too far]"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest under AddressSanitizer (tests/gpu/sanitized.py)."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("g++ is not installed")
    asked = subprocess.run([gxx, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    library = asked.stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ has no AddressSanitizer")
    environment = os.environ | {
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.sanitized", "-p", "no:faulthandler", "-q", "-s"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1800
    )


@pytest.mark.long
@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_stay_within_their_arrays(kernels: str) -> None:
    done = run(f"tests/gpu/test_{kernels}.py", "-k", "not faults")
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])


@pytest.mark.long
def test_a_column_too_far_is_found() -> None:
    done = run(FAULT)
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr
    assert "kernels.cu" in done.stderr
