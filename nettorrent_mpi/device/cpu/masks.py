"""Dropout masks are a hash of (key, global row, index in the whole row), the same on whichever rank holds the
element."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array, Shape, Workspace
from nettorrent_mpi.device.cpu.flat import Operations
from nettorrent_mpi.device.cpu.loop import Loop
from nettorrent_mpi.device.random import mix, place_codes
from nettorrent_mpi.plan.blocks import Span

BLOCK = 16384  # elements hashed at a time: they stay in the first-level cache


class MaskOperations(Operations):
    """Masks for dropout: see device.ops.

    SplitMix64 (Steele, Lea, Flood 2014) makes a key from the step, and from that 64 bits from the row; half of them is
    added to the index's hash before a second round of mixing, and half within it.
    """

    def place_codes(self, shape: Shape, part: Span) -> Array:
        return place_codes(shape, part)

    def keep_mask(self, keep: Array, codes: Array, rate: float, key: int, step: Array, rows: Span) -> None:
        memory = self.memory(np.uint32)
        row_keys = _row_keys(_step_key(key, int(step[0])), rows, memory)
        threshold = np.uint32(round(rate * 2**32))
        if self._tuning.compiled:
            keep_mask(keep, codes, row_keys, threshold)
            return
        columns = min(BLOCK, max(codes.size, 1))
        for first in range(0, rows.size, max(1, BLOCK // columns)):
            some = slice(first, min(first + max(1, BLOCK // columns), rows.size))
            for left in range(0, codes.size, columns):
                across = slice(left, min(left + columns, codes.size))
                shape = (some.stop - some.start, across.stop - across.start)
                number, work = memory.scratch("random number", shape), memory.scratch("random work", shape)
                np.bitwise_xor(codes[across], row_keys[some, :1], out=number)
                mix(number, work, row_keys[some, 1:])
                np.greater_equal(number, threshold, out=keep[some, across])


@Loop
def keep_mask(keep_bf: Array, codes_f: Array, keys_b: Array, threshold: int) -> None:
    """Compute keep <- whether the hash is at least the threshold; keys_b (b, 2) uint32."""
    for b in range(keep_bf.shape[0]):
        before, within = keys_b[b, 0], keys_b[b, 1]
        keep = keep_bf[b]
        for i in range(codes_f.size):
            x = np.uint32(codes_f[i] ^ before)
            x = np.uint32(x ^ (x >> np.uint32(16)))
            x = np.uint32(x * np.uint32(0x7FEB352D))
            x = np.uint32(x + within)
            x = np.uint32(x ^ (x >> np.uint32(15)))
            x = np.uint32(x * np.uint32(0x846CA68B))
            x = np.uint32(x ^ (x >> np.uint32(16)))
            keep[i] = x >= threshold


GOLDEN, BITS = 0x9E3779B97F4A7C15, (1 << 64) - 1
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def _step_key(key: int, step: int) -> int:
    """Return SplitMix64's output number `step` when it starts with `key`."""
    z = key + GOLDEN * (step + 1) & BITS
    for shift, factor in ROUNDS:
        z = (z ^ z >> shift) * factor & BITS
    return z


def _row_keys(key: int, rows: Span, workspace: Workspace) -> Array:
    """Return (rows, 2) uint32: SplitMix64's output number `row` when it starts with `key`."""
    z = workspace.scratch("row keys", (rows.size,), np.uint64)
    work = workspace.scratch("row keys work", (rows.size,), np.uint64)
    z[...] = GOLDEN
    np.add.accumulate(z, out=z)
    np.add(z, np.uint64((key + GOLDEN * rows.start) & BITS), out=z)
    for shift, factor in ROUNDS:
        np.right_shift(z, shift, out=work)
        np.bitwise_xor(z, work, out=z)
        np.multiply(z, np.uint64(factor), out=z)
    return z.view(np.uint32).reshape(rows.size, 2)
