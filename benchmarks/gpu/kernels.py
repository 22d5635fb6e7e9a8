"""All kernels against NumPy: the tests of kernels in tests/gpu, on the GPU, and again under compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.record import Record, Skipped
from nettorrent_mpi.device import gpu as package

ROOT = Path(__file__).resolve().parents[2]
CUDA = "/usr/local/cuda/bin"  # where the toolkit usually lies
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|deselected|errors?)\b")
TOLD = 40  # failed tests that are named
ERRORS = 86  # the exit code of compute-sanitizer where it has found something
REFUSALS = ("Device not supported", "not supported on", "Unable to find injection", "unsupported", "error 999")


class TestsFailed(Exception):  # noqa: N818
    """Raised with the end of pytest's output."""


def run(record: Record) -> None:
    """Compile the kernels in each type, then run the test modules one by one."""
    for real in () if record.host else ("float32", "float64", "bfloat16"):
        with record.case(f"compiled for {real}") as figures:
            figures["first_launch"], figures["second_launch"] = compiled(real)
    for module in modules():
        with record.case(module.stem) as figures:
            tested(figures, [], module, record)


def sanitize(record: Record) -> None:
    """The same in float32 under compute-sanitizer: first memory, then races, as far as time allows."""
    if record.host:
        raise Skipped("compute-sanitizer needs a GPU")
    path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA)
    if path is None:
        raise Skipped("there is no compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        for module in modules():
            with record.case(f"{tool}: {module.stem}") as figures:
                if record.left < 5:
                    raise Skipped("no time is left")
                words = [path, "--tool", tool, "--error-exitcode", str(ERRORS), "--print-limit", "5"]
                tested(figures, words, module, record)


def modules() -> list[Path]:
    """Return the test modules of kernels."""
    from tests.gpu.on_gpu import modules as known

    return known()


def compiled(real: str) -> tuple[float, float]:
    """Return the seconds of the first launch of a kernel, which compiles all of them or finds them in CuPy's cache, and
    of the second."""
    if real == "bfloat16":
        import ml_dtypes

        dtype: Any = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = np.dtype(real)
    device = package.Gpu(package.open_runtime(0))
    x = device.empty((1000,), dtype)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        device.ops.fill(x, 1.0)
        device.synchronize()
        seconds.append(time.perf_counter() - began)
    device.close()
    return seconds[0], seconds[1]


def tested(figures: dict[str, Any], before: Sequence[str], module: Path, record: Record) -> None:
    """Run a test module behind the words `before`; under a checker in float32 alone."""
    words = [*before, sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short"]
    words += ["-m", "not slow and not long", str(module.relative_to(ROOT))]
    if not record.host:
        words += ["-p", "tests.gpu.on_gpu"]
    if before:
        words += ["-k", "not float64 and not bfloat16"]
    try:
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=max(record.left, 1), check=False
        )
    except subprocess.TimeoutExpired:
        if before:
            raise Skipped("no time is left") from None
        raise
    text = done.stdout + done.stderr
    refusal = next((line for line in text.splitlines() if any(word in line for word in REFUSALS)), None)
    if before and done.returncode and refusal:
        raise Skipped(f"compute-sanitizer refuses: {refusal.strip()}")
    figures |= {name: int(number) for number, name in COUNTS.findall(done.stdout)}
    figures["failures"] = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))][:TOLD]
    if not figures["failures"]:
        del figures["failures"]
    if done.returncode:
        raise TestsFailed(text[-4000:])
