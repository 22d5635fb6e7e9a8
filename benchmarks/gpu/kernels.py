"""All kernels against NumPy: the tests of kernels in tests/gpu, on the GPU, and again under compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.record import Record, Skipped
from nettorrent_mpi.device import gpu as package

ROOT = Path(__file__).resolve().parents[2]
CUDA = "/usr/local/cuda/bin"  # where the toolkit usually lies
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|deselected|errors?)\b")
AT_ONCE = 4  # test modules, or types that are compiled
TOLD = 40  # failed tests that are named
ERRORS = 86  # the exit code of compute-sanitizer where it has found something
REFUSALS = ("Device not supported", "not supported on", "Unable to find injection", "unsupported", "error 999")


class TestsFailed(Exception):  # noqa: N818
    """Raised with the end of pytest's output."""


def run(record: Record) -> None:
    """Compile the kernels in each type, then run the test modules, a few at a time."""

    def compile_for(real: str) -> None:
        with record.case(f"compiled for {real}") as figures:
            figures["first_launch"], figures["second_launch"] = compiled(real)

    def run_module(module: Path) -> None:
        with record.case(module.stem) as figures:
            tested(figures, [], module, record)

    with ThreadPoolExecutor(1 if record.host else AT_ONCE) as threads:
        list(threads.map(compile_for, () if record.host else ("float32", "float64", "bfloat16")))
        list(threads.map(run_module, modules()))


def sanitize(record: Record) -> None:
    """The same in float32 under compute-sanitizer: first memory, then races, as far as time allows."""
    if record.host:
        raise Skipped("compute-sanitizer needs a GPU")
    path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=CUDA)
    if path is None:
        raise Skipped("there is no compute-sanitizer")

    def check(job: tuple[str, Path]) -> None:
        tool, module = job
        with record.case(f"{tool}: {module.stem}") as figures:
            if record.left < 5:
                raise Skipped("no time is left")
            words = [path, "--tool", tool, "--error-exitcode", str(ERRORS), "--print-limit", "5"]
            tested(figures, words, module, record)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        list(threads.map(check, product(("memcheck", "racecheck"), modules())))


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
    own = [line.lstrip("= ") for line in text.splitlines() if line.startswith("=====")]  # the checker's words
    refusal = next((line for line in own if any(word in line for word in REFUSALS)), None)
    if before and done.returncode and refusal:
        raise Skipped(f"compute-sanitizer refuses: {refusal}")
    figures |= {name: int(number) for number, name in COUNTS.findall(done.stdout)}
    figures["failures"] = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))][:TOLD]
    if not figures["failures"]:
        del figures["failures"]
    if done.returncode:
        raise TestsFailed(text[-4000:])
