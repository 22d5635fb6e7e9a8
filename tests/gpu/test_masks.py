"""Dropout on a GPU makes the CPU's choice."""

from __future__ import annotations

import numpy as np
import pytest

from nettorrent_mpi.device.gpu.masks import GpuMaskOperations
from nettorrent_mpi.plan.blocks import Span
from tests.gpu.compared import CPU
from tests.gpu.host import build
from tests.gpu.kernel_cases import Bench, planted, same, some, typed, wide

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")

KEY = 0xFEDCBA9876543210


@pytest.mark.parametrize(
    ("shape", "part"), [((7, 5, 6), Span(0, 6)), ((129,), Span(60, 129)), ((1,), Span(0, 1)), ((9,), Span(4, 4))]
)
@pytest.mark.parametrize("rows", [Span(0, 1), Span(1_000_003, 1_000_036), Span(5, 5), Span(1 << 40, (1 << 40) + 300)])
@pytest.mark.parametrize("step", [0, 17, 3_000_000_000])
def test_masks(shape: tuple[int, ...], part: Span, rows: Span, step: int) -> None:
    bench = Bench(GpuMaskOperations, seed=1 + step % 5)
    codes, wanted_codes = bench.ops.place_codes(shape, part), CPU.place_codes(shape, part)
    same(bench.down(codes), wanted_codes)
    wanted = np.zeros((rows.size, wanted_codes.size), np.bool_)
    keep, number = bench.like(wanted), np.array([float(step)])
    for rate, key in ((0.3, KEY), (0.0, 1), (1 - 1e-7, KEY + 1)):
        bench.ops.keep_mask(keep, codes, rate, key, bench.up(number), rows)
        CPU.keep_mask(wanted, wanted_codes, rate, key, number, rows)
        same(bench.down(keep), wanted)


@typed
@pytest.mark.parametrize("size", [0, 1, 129, 1000])
def test_drops(name: str, size: int) -> None:
    bench, x = Bench(GpuMaskOperations, seed=1), some(name, size)
    x[size // 2 :][:1] = np.nan
    keep = np.random.default_rng(2).random(size) > 0.5
    y, wanted = bench.up(x), wide(x)
    bench.ops.drop(y, bench.up(keep), 1 / 0.7)
    CPU.drop(wanted, keep, 1 / 0.7)
    same(bench.down(y), wanted)


FAULTS = {
    "a barrier left out": ("        __syncthreads();\n        for (i64 row", "        for (i64 row"),
    "memory used again too early": ("        __syncthreads();  // keys is written again\n", ""),
    "the key of another step": ("((u64)step[0] + 1)", "((u64)step[0] + 2)"),
}


@pytest.mark.long
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_faults_in_masks_are_found(fault: str | None) -> None:
    # keep_mask works on tiles, which are in the section of norms.
    text = planted("Norms|Dropout", *FAULTS[fault]) if fault else None
    found = []
    for seed in range(4):
        bench, rows, step = Bench(GpuMaskOperations, seed, text), Span(0, 1100), np.zeros(1)
        codes = CPU.place_codes((45,), Span(0, 45))
        wanted = np.zeros((rows.size, codes.size), np.bool_)
        CPU.keep_mask(wanted, codes, 0.5, KEY, step, rows)
        keep = bench.like(wanted)
        wide, chunks = 45, 2  # so few that a block goes through several groups of rows
        arguments = (bench.up(codes), bench.up(step), KEY, 0, rows.size, codes.size, wide, 1 << 31)
        bench.ops.launch("keep_mask", np.float32, (1, chunks), 256, keep, *arguments)
        found.append(np.array_equal(bench.down(keep), wanted))
    assert all(found) == (fault is None)
