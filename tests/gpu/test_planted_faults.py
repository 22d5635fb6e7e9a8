"""Faults planted into kernels.cu are found: by wrong numbers, by what nobody may write, or by the host device."""

from __future__ import annotations

import multiprocessing
import os
import re

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.device.gpu import source
from tests.gpu.host import build

pytestmark = [pytest.mark.long, pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")]

CPU = make_device("cpu", "numpy").ops
GUARD = 32  # elements on both sides of every array
SEEDS = range(4)
FAULTS = {  # what is wrong -> (expression for what is replaced at its first place, what replaces it)
    "a sum that does not wait for its parts": (r"part\[threadIdx.x / 32\] = v;\n    __syncthreads\(\);", None),
    "a sum that does not wait before the next": (r"    __syncthreads\(\);  // part may", "    // part may"),
    "a sum that reads what nobody has written": (
        r"threadIdx.x % 32 < blockDim.x / 32 \? (part\[.*?\]) : T\(0\)",
        r"\1",
    ),
    "a sum of half a warp": (r"int d = 16; d; d >>= 1\) v \+=", "int d = 8; d; d >>= 1) v +="),
    "the last block is not waited for": (
        r"    \}\n    __syncthreads\(\);\n    return last;",
        "    }\n    return last;",
    ),
    "every block takes itself for the last": (r"== blocks - 1;", "== 0 * blocks;"),
    "a counter that is not cleared": (r"if \(last\) \*done = 0;", ""),
    "blocks write over each other's sums": (r"partial\[blockIdx.x\] = v", "partial[blockIdx.x / 2] = v"),
    "blocks write over each other's several sums": (r"partial\[N \* blockIdx.x", "partial[blockIdx.x"),
    "a weight of another class": (r"weights\[place\] \*", "weights[0] *"),
    "a loop that goes too far": (r"i < \(n\); i \+=", "i <= (n); i +="),
    "a loop that misses the first": (r"\(i64\)blockIdx.x \* blockDim.x \+ threadIdx.x;", "1 + \\g<0>"),
    "a pack too many": (r"\? n / PACK : 0", "? (n + PACK - 1) / PACK : 0"),
    "packs of addresses that are not aligned": (r"\(\(u64\)a.p & 15\) == 0", "((u64)a.p & 7) == 0"),
    "a pack that is not written": (r"(?s)void store\(InOut<T>& a, i64 k\) \{.*?\}", "void store(InOut<T>&, i64) {}"),
    "the last of the largest": (r"at < where\)\)", "at > where))"),
    "NaN is not the largest": (r"if \(v != v\) return most == most \|\| at < where;", ""),
}


def planted(fault: str) -> str:
    pattern, replacement = FAULTS[fault]
    found = re.search(pattern, source.text())
    assert found, "the source has changed"
    new = found.expand(replacement) if replacement is not None else found[0].replace("    __syncthreads();", "")
    text = source.text()[: found.start()] + new + source.text()[found.end() :]
    assert text != source.text()
    return text


class Trial:
    """A Trial runs kernels on arrays between guards, and compares their results with the CPU's."""

    def __init__(self, text: str, seed: int):
        self.library = build.load("float32", seed, text)
        self.rng = np.random.default_rng(seed)
        self.guarded: list[Array] = []

    def array(self, values: Array, shift: int = 0) -> Array:
        """A copy of the values, aligned to 16 bytes or `shift` elements beyond, with guards on both sides."""
        whole = np.full(values.size + 2 * GUARD + 16, 77, values.dtype)
        start = GUARD + (-whole[GUARD:].ctypes.data % 16) // values.itemsize + shift
        self.guarded.append(whole[:start])
        self.guarded.append(whole[start + values.size :])
        inner = whole[start : start + values.size]
        inner[:] = values.reshape(-1)
        return inner.reshape(values.shape)

    def random(self, *shape: int, shift: int = 0) -> Array:
        return self.array(self.rng.standard_normal(shape).astype(np.float32), shift)

    def launch(self, kernel: str, grid: int, block: int, *arguments: object) -> None:
        signature = self.library.signatures[kernel]
        self.library.call(kernel, grid, block, signature.values("float32", arguments, lambda a: int(a.ctypes.data)))

    def passes(self) -> bool:
        try:
            right = [
                self.sums(),
                self.losses(),
                *(self.elements(size, shift) for size, shift in ((1003, 0), (1001, 2))),
            ]
        except build.HostError:
            return False
        return all(right) and all((guard == 77).all() for guard in self.guarded)

    def sums(self) -> bool:
        x, partial, done = self.random(20_011), self.array(np.zeros(14)), self.array(np.zeros(1, np.uint32))
        total = self.array(np.zeros(1))
        for _ in range(2):
            self.launch("sum_of_squares", 7, 192, x, total, partial, done, x.size)
        return bool(np.isclose(total[0], 2 * np.square(x.astype(np.float64)).sum(), rtol=1e-12))

    def losses(self) -> bool:
        y, labels = self.random(33, 50), self.array(self.rng.integers(0, 50, 33))
        y[3] = 1.5
        y[4, 7] = y[4, 40] = 9
        labels[3], labels[4] = 0, 7
        y[5, 9], labels[5] = np.nan, 9
        weights, total = self.array(self.rng.uniform(0, 2, 50).astype(np.float32)), self.array(np.array([40.0]))
        metrics, wanted = self.array(np.zeros(5)), np.zeros(5)
        with np.errstate(all="ignore"):
            CPU.count_right(y, labels, wanted)
            CPU.cross_entropy(
                y[6:].astype(np.float64), labels[6:], 0.1, total, None, wanted, weights.astype(np.float64)
            )
        partial, done = self.array(np.zeros(9)), self.array(np.zeros(1, np.uint32))
        self.launch("count_right", 3, 96, y, labels, 10, metrics, partial, done, 33, 50)
        rest = y[6:], labels[6:], 10, None, metrics, weights, total, partial, done, 0.002, 0.9, 27, 50
        self.launch("cross_entropy", 3, 96, *rest)
        return bool(np.allclose(metrics, wanted, rtol=1e-5))

    def elements(self, size: int, shift: int) -> bool:
        p, g, b = (self.random(size, shift=shift) for _ in range(3))
        numbers = self.array(np.array([0.1, 0.9, 0.7, 0.8]))
        q, c = p.copy(), b.copy()
        CPU.momentum(q, g, c, numbers, True)
        self.launch("momentum", 3, 64, p, g, b, numbers, True, None, 0.0, size)
        y = self.array(np.zeros(size, np.float32), shift)
        self.launch("relu", 1, 32, p, y, size)
        return bool((p == q).all() and (b == c).all() and (y == np.maximum(q, 0)).all())


def passes(text: str) -> bool:
    """Whether all trials pass, in a process of their own: a fault may end it."""
    build.compiled(text, "float32")

    def run() -> None:
        os._exit(0 if all(Trial(text, seed).passes() for seed in SEEDS) else 1)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode == 0


def test_without_a_fault_all_is_right() -> None:
    assert passes(source.text())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    assert not passes(planted(fault))
