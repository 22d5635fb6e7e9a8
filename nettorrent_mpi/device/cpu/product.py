"""Products of matrices: which way is the fastest for a layer's shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu import blas, choice, onednn
from nettorrent_mpi.device.cpu import tuning as trial

Run = Callable[[], object]
Way = Callable[[Array, Array, Array, bool, Workspace], Run]
"""way(a_mk, b_kn, out_mn, accumulate, workspace) gives what computes the product each time that it is called."""

REMEMBERED = 64  # products of arrays that came before; in the steady state there are as many as micro-batches under way


class Product:
    """out_mn <- (or +=) a_mk @ b_kn, the fastest way for the shapes that come first. With `turn_a` a is given as
    (k, m), with `turn_b` b as (n, k). out is C-contiguous; a and b are, or are some columns of matrices that are.

    The arrays of the steady state are the same objects in every step. So what a call of a library wants to know of them
    (sizes, addresses: more work for Python than the call itself, and with small matrices than the product) is put
    together once for the same objects, which are kept. Allocates nothing after that.
    """

    def __init__(self, *, turn_a: bool = False, turn_b: bool = False) -> None:
        self._turn_a, self._turn_b = turn_a, turn_b
        self._chosen: dict[tuple[np.dtype[Any], bool], Way] = {}
        self._known: dict[tuple[int, int, int, bool], tuple[Run, Array, Array, Array]] = {}

    def __call__(self, a: Array, b: Array, out: Array, workspace: Workspace, accumulate: bool = False) -> None:
        key = id(a), id(b), id(out), accumulate
        known = self._known.get(key)
        if known is None:
            if len(self._known) == REMEMBERED:
                self._known.clear()
            run = self._prepare(a.T if self._turn_a else a, b.T if self._turn_b else b, out, workspace, accumulate)
            known = self._known[key] = run, a, b, out  # as long as they live their ids are theirs
        known[0]()

    def _prepare(self, a: Array, b: Array, out: Array, workspace: Workspace, accumulate: bool) -> Run:
        if not (out.size and a.size):  # nothing to learn from, and BLAS wants sizes above 0
            return _numpy(a, b, out, accumulate, workspace)
        way = self._chosen.get((out.dtype, accumulate))
        if way is None:
            way = self._chosen[out.dtype, accumulate] = _choose(a, b, out, accumulate, workspace)
        return way(a, b, out, accumulate, workspace)


def _choose(a: Array, b: Array, out: Array, accumulate: bool, workspace: Workspace) -> Way:
    ways = _ways(out.dtype)
    elsewhere = np.empty_like(out)
    letters = "".join("n" if blas.plain(array) else "t" for array in (a, b))
    sizes = f"{a.shape[0]}x{a.shape[1]}x{b.shape[1]} {out.dtype} {letters}{' added' if accumulate else ''}"
    trials = {name: way(a, b, elsewhere, accumulate, workspace) for name, way in ways.items()}
    return ways[trial.fastest(f"product {sizes}", trials, elsewhere)]


def _ways(dtype: np.dtype[Any]) -> dict[str, Way]:
    ways: dict[str, Way] = {"numpy": _numpy}
    if choice.fastest():
        gemm, library = blas.gemm(dtype), onednn.library()
        if gemm is not None:
            ways["blas"] = _by(gemm)
        if library is not None and dtype == np.float32:
            ways["onednn"] = _by(library.gemm)
    return ways


def _numpy(a: Array, b: Array, out: Array, accumulate: bool, workspace: Workspace) -> Run:
    if not accumulate:
        return partial(np.matmul, a, b, out)

    def add() -> None:
        more = workspace.scratch("product", out.shape)
        np.matmul(a, b, out=more)
        np.add(out, more, out=out)

    return add


def _by(gemm: blas.Gemm) -> Way:
    def way(a: Array, b: Array, out: Array, accumulate: bool, workspace: Workspace) -> Run:
        return gemm.prepare(a, b, out, 1.0 if accumulate else 0.0)

    return way
