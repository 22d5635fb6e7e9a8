"""Operations on flat arrays, in blocks that stay in the second-level cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType, Workspace
from nettorrent_mpi.device.cpu.blocking import BLOCK, blocks
from nettorrent_mpi.device.cpu.loop import Loop
from nettorrent_mpi.device.cpu.tuning import Tuning

Run = Callable[[], object]

EXACT_BLOCK = 8192  # elements of float64 that are squared together


class Operations:
    """The base of all operations: they share the device's tuning, and scratch memory for each element type."""

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning
        self._memory: dict[DType, Workspace] = {}

    def memory(self, dtype: DType) -> Workspace:
        """Return scratch memory of a type, valid until the next operation."""
        found = self._memory.get(dtype)
        if found is None:
            found = self._memory[dtype] = Workspace(dtype)
        return found

    def prepared(self, operation: str, *arguments: Any, **named: Any) -> list[Run]:
        """Return calls that do the same, one after another, as this operation with these arguments does, each time that
        they are called; as far as it is known in short ones, which look nothing up any more. The arrays stay in
        place."""
        return [partial(getattr(self, operation), *arguments, **named)]

    @property
    def working_bytes(self) -> int:
        """The bytes of scratch memory."""
        return sum(workspace.bytes for workspace in self._memory.values())


class FlatOperations(Operations):
    """Operations on flat arrays: see device.ops."""

    def copy(self, out: Array, x: Array) -> None:
        np.copyto(out, x, casting="unsafe")

    def fill(self, out: Array, value: float) -> None:
        out.fill(value)

    def add(self, a: Array, b: Array, out: Array) -> None:
        np.add(a, b, out=out)

    def subtract(self, a: Array, b: Array, out: Array) -> None:
        np.subtract(a, b, out=out)

    def multiply(self, a: Array, b: Array, out: Array) -> None:
        np.multiply(a, b, out=out)

    def scale(self, x: Array, factor: float) -> None:
        np.multiply(x, factor, out=x)

    def divide(self, x: Array, divisor: float) -> None:
        np.divide(x, divisor, out=x)

    def store(self, out: Array, x: Array, accumulate: bool) -> None:
        if accumulate:
            np.add(out, x, out=out)
        else:
            np.copyto(out, x)

    def move(self, x: Array, share: float, towards: Array, origin: Array | None = None) -> None:
        change = self.memory(x.dtype).keep("change", (BLOCK,))
        for block in blocks(x.size):
            piece = x[block]
            work = change[: piece.size]
            np.subtract(towards[block], piece if origin is None else origin[block], out=work)
            np.multiply(work, share, out=work)
            np.add(piece, work, out=piece)

    def withhold(self, x: Array, before: Array, kept: Array, part: float) -> None:
        if self._tuning.compiled:  # one pass over memory in the place of several
            withhold(x, before, kept, x.dtype.type(part))
            return
        change = self.memory(x.dtype).keep("change", (BLOCK,))
        for block in blocks(x.size):
            piece = x[block]
            work = change[: piece.size]
            np.subtract(piece, before[block], out=work)
            np.multiply(work, part, out=work)
            np.subtract(piece, work, out=piece)
            np.add(kept[block], work, out=kept[block])

    def increase(self, x: Array, by: float) -> None:
        x[0] += by

    def sum_of_squares(self, x: Array, total: Array) -> None:
        exact = self.memory(np.float64).keep("exact", (EXACT_BLOCK,))
        found = 0.0
        for block in blocks(x.size, EXACT_BLOCK):
            piece = x[block]
            work = exact[: piece.size]
            np.copyto(work, piece)
            found += float(np.dot(work, work))
        total[0] += found

    def clip_scale(self, total: Array, limit: float, scale: Array) -> None:
        factor = limit / (math.sqrt(total[0]) + 1e-6)
        scale[0] = 1.0 if factor > 1.0 else factor

    def all_finite(self, x: Array) -> bool:
        return all(bool(np.isfinite(x[block]).all()) for block in blocks(x.size))

    def count_nonfinite(self, y: Array, count: Array, step: Array) -> None:
        if not math.isfinite(float(np.add.reduce(y, axis=None))):
            if not count[0]:
                count[1] = step[0]
            count[0] += 1


@Loop
def withhold(x: Array, before: Array, kept: Array, part: float) -> None:
    """x <- x - part (x - before); kept <- kept + part (x - before)."""
    for i in range(x.size):
        change = (x[i] - before[i]) * part
        x[i] -= change
        kept[i] += change
