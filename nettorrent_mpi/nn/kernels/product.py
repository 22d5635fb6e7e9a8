"""Products of matrices: which way is the fastest for a layer's shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nettorrent_mpi.nn.backend import Array, Workspace
from nettorrent_mpi.nn.kernels import blas, choice, onednn, trial

Way = Callable[[Array, Array, Array, bool, Workspace], None]


class Product:
    """out_mn <- (or +=) a_mk @ b_kn, the fastest way for the shapes that come first.

    `out` is C-contiguous, a and b are, or their transposes. Allocates nothing after the first call.
    """

    def __init__(self) -> None:
        self._chosen: dict[tuple[np.dtype[Any], bool], Way] = {}

    def __call__(self, a: Array, b: Array, out: Array, workspace: Workspace, accumulate: bool = False) -> None:
        way = self._chosen.get((out.dtype, accumulate))
        if way is None:
            if not (out.size and a.size):  # nothing to learn from, and BLAS wants sizes above 0
                _numpy(a, b, out, accumulate, workspace)
                return
            way = self._chosen[out.dtype, accumulate] = _choose(a, b, out, accumulate, workspace)
        way(a, b, out, accumulate, workspace)


def _choose(a: Array, b: Array, out: Array, accumulate: bool, workspace: Workspace) -> Way:
    ways: dict[str, Way] = {"numpy": _numpy}
    if choice.fastest():
        gemm, library = blas.gemm(out.dtype), onednn.library()
        if gemm is not None and accumulate:
            ways["blas"] = _by(gemm)
        if library is not None and out.dtype == np.float32:
            ways["onednn"] = _by(library.gemm)
    elsewhere = np.empty_like(out)
    letters = "".join("n" if array.flags.c_contiguous else "t" for array in (a, b))
    sizes = f"{a.shape[0]}x{a.shape[1]}x{b.shape[1]} {out.dtype} {letters}{' added' if accumulate else ''}"
    trials = {name: lambda way=way: way(a, b, elsewhere, accumulate, workspace) for name, way in ways.items()}
    return ways[trial.fastest(f"product {sizes}", trials)]


def _numpy(a: Array, b: Array, out: Array, accumulate: bool, workspace: Workspace) -> None:
    if accumulate:
        more = workspace.scratch("product", out.shape)
        np.matmul(a, b, out=more)
        np.add(out, more, out=out)
    else:
        np.matmul(a, b, out=out)


def _by(gemm: blas.Gemm) -> Way:
    def way(a: Array, b: Array, out: Array, accumulate: bool, workspace: Workspace) -> None:
        if out.size and a.size:
            gemm(a, b, out, 1.0 if accumulate else 0.0)
        else:
            _numpy(a, b, out, accumulate, workspace)

    return way
