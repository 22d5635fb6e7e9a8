"""What the tests of layers share: running a sequence of layers, alone or as a team of threads that really exchange."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.nn.initial import initial_value
from nettorrent_mpi.nn.layer import Alone, Context, Features
from nettorrent_mpi.nn.layers.form import Gather
from nettorrent_mpi.nn.layers.registry import Site
from nettorrent_mpi.nn.layers.sequence import Sequence, named
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.blocks import Span, span


class ThreadTeam:
    """nn.layer.Team of rows x cols threads: sums are added in one order, so that all get the same numbers."""

    def __init__(self, shared: Shared, row: int, col: int):
        self.shared, self.row, self.col, self.cols = shared, row, col, shared.cols

    def _all(self, values: Array) -> dict[tuple[int, int], Array]:
        self.shared.slots[self.row, self.col] = values.copy()
        self.shared.barrier.wait()
        found = dict(self.shared.slots)
        self.shared.barrier.wait()
        return found

    @property
    def holders(self) -> int:
        return self.shared.rows

    @property
    def holder(self) -> int:
        return self.row

    def gather_over_rows(self, parts: Array) -> None:
        found = self._all(parts[self.row])
        parts[...] = [found[row, self.col] for row in range(self.shared.rows)]

    def sum_over_rows(self, values: Array) -> None:
        found = self._all(values)
        values[...] = sum(found[row, self.col] for row in range(self.shared.rows))

    def sum_over_cols(self, values: Array) -> None:
        found = self._all(values)
        values[...] = sum(found[self.row, col] for col in range(self.cols))

    def gather_cols(self, part: Array, whole: Array, workspace: Workspace) -> None:
        found = self._all(part)
        whole[...] = np.concatenate([found[self.row, col] for col in range(self.cols)], axis=-1)

    def scatter_cols(self, partial_whole: Array, part: Array, workspace: Workspace) -> None:
        found = self._all(partial_whole)
        total = sum(found[self.row, col] for col in range(self.cols))
        part[...] = total[..., slice(*span(partial_whole.shape[-1], self.cols, self.col))]


class Shared:
    """What the threads of one team share."""

    def __init__(self, rows: int, cols: int):
        self.rows, self.cols = rows, cols
        self.slots: dict[tuple[int, int], Array] = {}
        self.barrier = threading.Barrier(rows * cols, timeout=20)


@dataclass
class Result:
    """Whole arrays after one or more passes."""

    y: Array
    dx: Array | None
    params: dict[str, Array]
    grads: dict[str, Array]


class Bench:
    """Runs layers on random data; the same data for every layout."""

    def __init__(self, layers: list[specs.LayerSpec], shape: tuple[int, ...], dtype: Any = np.float64, seed: int = 1):
        self.specs, self.shape, self.dtype = named(layers), shape, dtype
        self.device = make_device()
        self.rng = np.random.default_rng(seed)
        self.params: dict[str, Array] = {}
        for key, parameter in self.sequence().parameters:
            value = initial_value(parameter, 7, key)
            self.params[key] = (value + 0.1 * self.rng.random(value.shape)).astype(dtype)

    def sequence(self, cols: int = 1, col: int = 0) -> Sequence:
        sequence = Sequence(self.specs, Site("", Features.whole(self.shape), cols, col))
        if cols > 1 and not sequence.outputs.is_whole:
            sequence.append(Gather("gather", sequence.outputs, partial=False))
        return sequence

    def data(self, rows: int) -> tuple[Array, Array]:
        """(x, dy)."""
        x = self.rng.standard_normal((rows, *self.shape)).astype(self.dtype)
        dy = self.rng.standard_normal((rows, *self.sequence().outputs.shape)).astype(self.dtype)
        return x, dy

    def context(self, x: Array, training: bool = True, **more: Any) -> Context:
        """Return a context with a workspace of its own; `device` and more may be other ones."""
        ops = more.pop("device", self.device).ops
        rows = Span(10, 10 + len(x))
        return Context(
            ops, Workspace(self.dtype), training, seed=3, step=np.array([5.0]), rows=rows, count=len(x), **more
        )

    def forward(self, params: dict[str, Array], x: Array, ctx: Context) -> Array:
        y, _ = self.sequence().forward(params, x.copy(), ctx)
        return y.copy()

    def run(self, x: Array, dy: Array, *, grads: dict[str, Array] | None = None, training: bool = True) -> Result:
        """Forward and backward on one rank; adds to `grads` where they are given."""
        params = {key: value.copy() for key, value in self.params.items()}
        ctx = self.context(x, training, accumulate=grads is not None)
        if grads is None:
            grads = {key: np.full_like(params[key], np.nan) for key, p in self.sequence().parameters if p.trainable}
        sequence, before = self.sequence(), x.copy()
        y, saved = sequence.forward(params, x, ctx)
        y = y.copy()
        dx = sequence.backward(params, grads, saved, dy.copy(), ctx)
        np.testing.assert_array_equal(x, before, err_msg="the input was overwritten")
        return Result(y, None if dx is None else dx.copy(), params, grads)

    def run_team(self, rows: int, cols: int, x: Array, dy: Array) -> Result:
        """The same by rows x cols threads; blocks are put together as the engine does."""
        shared = Shared(rows, cols)
        params = {key: value.copy() for key, value in self.params.items()}
        grads = {key: np.zeros_like(value) for key, value in params.items()}
        total_y, total_dx = np.zeros(dy.shape), np.zeros(x.shape)
        lock = threading.Lock()

        def rank(place: tuple[int, int]) -> None:
            row, col = place
            part = span(len(x), rows, row)
            mine = slice(*part)
            sequence = self.sequence(cols, col)
            own = {key: self.params[key][p.index].copy() for key, p in sequence.parameters}
            own_grads = {key: np.full(p.local, np.nan) for key, p in sequence.parameters if p.trainable}
            team = ThreadTeam(shared, row, col) if rows * cols > 1 else Alone()
            ctx = self.context(x, team=team, device=make_device())
            ctx.rows = Span(10 + part.start, 10 + part.stop)
            try:
                y, saved = sequence.forward(own, x[mine].copy(), ctx)
                y = y.copy()
                dx = sequence.backward(own, own_grads, saved, dy[mine].copy(), ctx)
            except BaseException:
                shared.barrier.abort()
                raise
            with lock:
                if col == 0:
                    total_y[mine] = y
                assert dx is not None
                total_dx[mine] += dx
                for key, p in sequence.parameters:
                    if not p.trainable:
                        params[key][p.index] = own[key]
                    elif p.axis is not None or p.replicated_sum or col == 0:
                        grads[key][p.index] += own_grads[key]

        with ThreadPoolExecutor(rows * cols) as pool:
            list(pool.map(rank, [(row, col) for row in range(rows) for col in range(cols)]))
        return Result(total_y, total_dx, params, {k: g for k, g in grads.items() if "running" not in k})


@pytest.fixture
def bench() -> Callable[..., Bench]:
    """Makes a `Bench` of layers."""
    return Bench
