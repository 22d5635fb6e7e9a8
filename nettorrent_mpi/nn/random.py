"""Random numbers that are a function of (seed, purpose, step, global row, index), never of who computes them."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu import passes
from nettorrent_mpi.device.cpu.loop import compiled
from nettorrent_mpi.nn.layer import Features
from nettorrent_mpi.plan import seeds
from nettorrent_mpi.plan.blocks import Span

BLOCK = 16384  # elements that are hashed together: they stay in the first-level cache


def generator(seed: int, purpose: str, *numbers: int | str) -> np.random.Generator:
    """A generator for one use of randomness, the same on every rank (see `plan.seeds.key`)."""
    return np.random.Generator(np.random.Philox(key=seeds.key(seed, purpose, *numbers)))


def place_codes(features: Features) -> Array:
    """uint32, flat: a hash of each local feature's index in the whole row. The first half of `keep_mask`'s hash.

    It depends on the layer alone, so it is computed once.
    """
    channels = features.shape[-1]
    places = int(np.prod(features.shape[:-1], dtype=np.int64))
    index = np.arange(places)[:, None] * channels + np.arange(*features.part)
    assert places * channels < 1 << 32, f"rows of {features.shape} are too long"
    code = index.reshape(-1).astype(np.uint32)
    work = np.empty_like(code)
    _mix(code, work, np.uint32(0))
    return code


def keep_mask(keep: Array, codes: Array, rate: float, key: int, rows: Span, workspace: Workspace) -> None:
    """keep (b, features), bool <- True with probability 1 - rate (rounded to 2^-32), for rows [start, stop).

    Each element is a hash of (key, its global row, its index in the whole row), whoever holds it: the row makes 64 bits
    with SplitMix64 (Steele, Lea, Flood 2014), of which half is added to the index's hash before, and half within,
    a second round of mixing.
    """
    row_keys = _row_keys(key, rows, workspace)
    threshold = np.uint32(round(rate * 2**32))
    if compiled():
        passes.keep_mask(keep, codes, row_keys, threshold)
        return
    columns = min(BLOCK, max(codes.size, 1))
    for first in range(0, rows.size, max(1, BLOCK // columns)):
        some = slice(first, min(first + max(1, BLOCK // columns), rows.size))
        for left in range(0, codes.size, columns):
            across = slice(left, min(left + columns, codes.size))
            shape = (some.stop - some.start, across.stop - across.start)
            number = workspace.scratch("random number", shape, np.uint32)
            work = workspace.scratch("random work", shape, np.uint32)
            np.bitwise_xor(codes[across], row_keys[some, :1], out=number)
            _mix(number, work, row_keys[some, 1:])
            np.greater_equal(number, threshold, out=keep[some, across])


def _mix(x: Array, work: Array, key: Array | np.uint32) -> None:
    """x <- a bijection of 32 bits: C. Wellons' lowbias32 (2018), with a key added halfway."""
    np.right_shift(x, 16, out=work)
    np.bitwise_xor(x, work, out=x)
    np.multiply(x, np.uint32(0x7FEB352D), out=x)
    np.add(x, key, out=x)
    np.right_shift(x, 15, out=work)
    np.bitwise_xor(x, work, out=x)
    np.multiply(x, np.uint32(0x846CA68B), out=x)
    np.right_shift(x, 16, out=work)
    np.bitwise_xor(x, work, out=x)


def _row_keys(key: int, rows: Span, workspace: Workspace) -> Array:
    """(rows, 2) uint32: SplitMix64's output number `row` when it begins with `key`."""
    golden, bits = 0x9E3779B97F4A7C15, (1 << 64) - 1
    z = workspace.scratch("row keys", (rows.size,), np.uint64)
    work = workspace.scratch("row keys work", (rows.size,), np.uint64)
    z[...] = golden
    np.add.accumulate(z, out=z)
    np.add(z, np.uint64((key + golden * rows.start) & bits), out=z)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        np.right_shift(z, shift, out=work)
        np.bitwise_xor(z, work, out=z)
        np.multiply(z, np.uint64(factor), out=z)
    return z.view(np.uint32).reshape(rows.size, 2)
