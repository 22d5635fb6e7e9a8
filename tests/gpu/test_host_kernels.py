"""Kernels on the CPU: signatures type every argument, and what no GPU allows is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu import source
from tests.gpu.host import build

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")


def address(array: Array) -> int:
    return int(array.ctypes.data)


def launch(library: build.Library, kernel: str, grid: int, block: int, *arguments: Any, real: str = "float32") -> None:
    values = library.signatures[kernel].values(real, arguments, address)
    library.call(kernel, grid, block, values)


# -- signatures -------------------------------------------------------------------------------------------------------


def test_signatures_are_those_of_the_source() -> None:
    found = source.signatures()
    assert len(found) == source.text().count('\nextern "C"')
    assert [(p.name, p.type, p.pointer) for p in found["move"].parameters] == [
        ("x", "REAL", True),
        ("share", "double", False),
        ("towards", "REAL", True),
        ("origin", "REAL", True),
        ("n", "i64", False),
    ]
    assert found["move"].parameters[1].dtype == "float64"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((np.zeros(3, "f4"), 2.0), "takes 3 arguments, not 2"),
        ((np.zeros(3, "f8"), 2.0, 3), "x (REAL*, REAL = float32) is of float64"),
        ((np.zeros(3, "f4"), 2.0, 3.0), "cannot be interpreted as an integer"),
        ((np.zeros(3, "f4"), None, 3), "NoneType"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(TypeError) as raised:
        source.signatures()["scale"].values("float32", arguments, address)
    assert told in str(raised.value)


def test_arguments_are_plain_values() -> None:
    x, n = np.zeros(3, "f4"), np.int64(3)
    values = source.signatures()["move"].values("float32", (x, np.float32(0.5), x, None, n), address)
    assert values == [x.ctypes.data, 0.5, x.ctypes.data, 0, 3]
    assert [type(value) for value in values] == [int, float, int, int, int]


def test_options_name_the_type() -> None:
    assert "-DREAL=double" in source.options("float64")


# -- what the host finds ----------------------------------------------------------------------------------------------

SUM = """
typedef long long i64;
extern "C" __global__ void total(const REAL* x, REAL* out, i64 n, i64 columns) {
    __shared__ REAL part[8][32];
    int lane = threadIdx.x / 32, column = blockIdx.x * 32 + threadIdx.x % 32;
    REAL sum = 0;
    if (column < columns)
        for (i64 i = lane; i < n; i += 8) sum += x[i * columns + column];
    part[lane][threadIdx.x % 32] = sum;
    __syncthreads();
    if (lane == 0 && column < columns) {
        sum = 0;
        for (int k = 0; k < 8; k++) sum += part[k][threadIdx.x];
        out[column] = sum;
    }
}
"""


def column_sums(text: str, seed: int) -> tuple[Array, Array]:
    x = np.random.default_rng(1).integers(-9, 9, (77, 45)).astype(np.float32)
    out = np.zeros(45, np.float32)
    launch(build.load("float32", seed, text), "total", 2, 256, x, out, 77, 45)
    return out, x.sum(axis=0)


@pytest.mark.parametrize("seed", range(4))
def test_sums_of_columns_are_right(seed: int) -> None:
    found, wanted = column_sums(SUM, seed)
    np.testing.assert_array_equal(found, wanted)


def planted(old: str, new: str) -> str:
    assert SUM.count(old) == 1
    return SUM.replace(old, new)


def test_a_barrier_left_out_is_found() -> None:
    text = planted("    __syncthreads();\n", "")
    wrong = [not np.array_equal(*column_sums(text, seed)) for seed in range(12)]
    assert sum(wrong) > 8  # right by luck where the threads that read come last


def test_memory_that_nobody_has_written_is_found() -> None:
    text = planted("part[lane][threadIdx.x % 32] = sum;", "if (lane) part[lane][threadIdx.x % 32] = sum;")
    assert np.isnan(column_sums(text, 0)[0]).all()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("    __syncthreads();", "    if (lane) return;\n    __syncthreads();", "have ended, others wait at __syncth"),
        ("__syncthreads();", "if (lane) __syncthreads(); else __syncwarp();", "have ended, others wait at __sync"),
        ("__syncthreads();", "if (threadIdx.x % 32 < 31) __shfl_xor_sync(~0u, sum, 1);", "not at its shuffle"),
        ("__syncthreads();", "__shfl_xor_sync(0xffffu, sum, 1);", "part of a warp"),
        (
            "__syncthreads();",
            "if (threadIdx.x & 1) __shfl_xor_sync(~0u, sum, 1); else __syncwarp();",
            "at different shuffles",
        ),
    ],
)
def test_threads_that_part_are_found(old: str, new: str, told: str) -> None:
    text = planted(old, new)
    for seed in (0, 1):
        with pytest.raises(build.HostError) as raised:
            column_sums(text, seed)
        assert told in str(raised.value)
    np.testing.assert_array_equal(*column_sums(SUM, 1))


def test_launches_of_impossible_sizes_are_found() -> None:
    library, x = build.load(), np.zeros(5, np.float32)
    for block in (0, 20, 2048):
        with pytest.raises(build.HostError):
            launch(library, "scale", 1, block, x, 2.0, 5)


def test_results_that_depend_on_the_order_differ_between_seeds() -> None:
    text = """
    typedef long long i64;
    extern "C" __global__ void last(REAL* out, i64 n) {
        for (i64 i = threadIdx.x; i < n; i += 32) out[0] = blockIdx.x * 32 + threadIdx.x;
    }
    extern "C" __global__ void last_of_fibers(REAL* out, i64 n) {
        __syncwarp();
        for (i64 i = threadIdx.x; i < n; i += 32) out[0] = blockIdx.x * 32 + threadIdx.x;
    }
    """
    assert build.waiting(text) == {"last_of_fibers"}
    for kernel in ("last", "last_of_fibers"):
        found = set()
        for seed in range(12):
            out = np.zeros(1, np.float32)
            launch(build.load("float32", seed, text), kernel, 3, 32, out, 32)
            found.add(float(out[0]))
        assert len(found) > 3


SANITIZED = """
import sys
import numpy as np
from tests.gpu.host import build
text, grid = sys.stdin.read(), 2
library = build.load("float32", 0, text, ("-fsanitize=address", "-g", "-O1"))
x, out = np.ones((77, 45), np.float32), np.zeros(45, np.float32)
library.call("total", 2, 256, [x.ctypes.data, out.ctypes.data, 77, 45])
print("sums", int(out.min()), int(out.max()))
"""


@pytest.mark.long
@pytest.mark.parametrize("fault", [False, True])
def test_an_index_too_far_is_found(fault: bool) -> None:
    gxx = shutil.which("g++")
    assert gxx is not None
    asked = subprocess.run([gxx, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    library = asked.stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ has no AddressSanitizer")
    text = planted("if (lane == 0 && column < columns)", "if (lane == 0)") if fault else SUM
    environment = {
        "PATH": "/usr/bin:/bin",
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED], input=text, capture_output=True, text=True, env=environment, timeout=120
    )
    if not fault:
        assert done.returncode == 0, done.stderr
        assert done.stdout == "sums 77 77\n"
        return
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "kernels.cu:14" in done.stderr, done.stderr
