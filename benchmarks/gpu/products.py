"""Matrix products by cublasLt against float64: every epilogue in every type, launched and captured; and their rates."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from benchmarks.gpu.on_device import ROUNDING, TYPES, OnDevice, check, error_of
from benchmarks.gpu.record import Record
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.runtime import Matrix

SIZES = ((64, 784, 1024), (77, 33, 130), (5, 1, 3), (1024, 1024, 10))  # rows, inner, columns
FAST = {"float32": 4096, "tf32": 8192, "float64": 2048, "bfloat16": 8192}
WORKSPACE = 32 << 20


class Epilogue(NamedTuple):
    """An Epilogue is what the library does with a product before it writes it."""

    accumulate: bool
    bias: bool
    relu: bool

    def __str__(self) -> str:
        return " + ".join(name for name, on in self._asdict().items() if on) or "plain"


EPILOGUES = [Epilogue(*words) for words in product((False, True), repeat=3)]


def run(record: Record) -> None:
    for name in TYPES:
        bench = OnDevice(name)
        for epilogue in EPILOGUES:
            with record.case(f"{name}, {epilogue}") as figures:
                worst = 0.0
                for (m, k, n), turn_a, turn_b in product(SIZES, (False, True), (False, True)):
                    worst = max(worst, compared(bench, m, k, n, turn_a, turn_b, epilogue))
                figures |= {"error": worst, "of": "a rounding of the type, relative to the sum of magnitudes"}
                check(worst, limit(bench))
        bench.device.close()
    for name, size in FAST.items():
        with record.case(f"rate in {name}") as figures:
            figures["size"] = size if not record.host else 64
            figures.update(rate(name, figures["size"]))


def limit(bench: OnDevice) -> float:
    """Return the largest error in units of the type's rounding: that of two factors (which
    hardware may cut instead), of the result, and of sums in an order that the library chooses."""
    return 4.5 if bench.name in ("tf32", "bfloat16") else 16.0


def compared(bench: OnDevice, m: int, k: int, n: int, turn_a: bool, turn_b: bool, epilogue: Epilogue) -> float:
    """Return the error of one product, in units of the type's rounding relative to the sum of the magnitudes. Raises
    WrongNumbers if a graph of it differs in any bit."""
    rng = np.random.default_rng(m + k + n)
    a, b = (bench.rounded(rng.standard_normal(shape)) for shape in ((m, k), (k, n)))
    before, bias = bench.rounded(rng.standard_normal((m, n))), bench.rounded(rng.standard_normal(n))
    on_a = bench.up(a.T if turn_a else a)
    on_b = bench.up(b.T if turn_b else b)
    added = bench.up(bias) if epilogue.bias else None
    found: list[Array] = []
    for captured in (False, True):
        out = bench.up(before)
        ready = bench.device.runtime.product(
            Matrix(on_a, turn_a),
            Matrix(on_b, turn_b),
            out,
            accumulate=epilogue.accumulate,
            bias=added,
            relu=epilogue.relu,
            tf32=bench.device.tf32,
            workspace=bench.workspace(WORKSPACE),
        )
        bench.device.upload(out, before.astype(bench.dtype))  # a trial of algorithms may have written there
        if captured:
            bench.captured(lambda ready=ready: ready.run(bench.device.stream))()
        else:
            ready.run(bench.device.stream)
        found.append(bench.down(out))
    check(float(not np.array_equal(*found)), 0)
    wanted, terms = a @ b, np.abs(a) @ np.abs(b)
    if epilogue.accumulate:
        wanted, terms = wanted + before, terms + np.abs(before)
    if epilogue.bias:
        wanted, terms = wanted + bias, terms + np.abs(bias)
    if epilogue.relu:
        wanted = np.maximum(wanted, 0)
    return error_of(found[0], wanted, terms) / ROUNDING[bench.name]


def rate(name: str, size: int) -> dict[str, float]:
    """Return the time and the rate of a square product of random numbers, replayed as a graph."""
    bench, rng = OnDevice(name), np.random.default_rng(1)
    a, b = (bench.up(rng.standard_normal((size, size), np.float32)) for _ in range(2))
    out = bench.device.empty((size, size), bench.dtype)
    ready = bench.device.runtime.product(
        Matrix(a), Matrix(b), out, tf32=bench.device.tf32, workspace=bench.workspace(WORKSPACE)
    )
    seconds = bench.seconds(bench.captured(lambda: ready.run(bench.device.stream)), 0.1)
    bench.device.close()
    return {"seconds_each": seconds, "teraflops": 2 * size**3 / seconds / 1e12}
