"""Convolutions of bfloat16 images: oneDNN's, which adds up in float32, or those of float32 copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu import onednn
from nettorrent_mpi.device.cpu.convolution import OneDnn
from nettorrent_mpi.device.cpu.tuning import Tuning
from nettorrent_mpi.device.cpu.widened import WidenedOperations
from nettorrent_mpi.device.geometry import Geometry


class BfloatConvolutions(WidenedOperations):
    """Convolutions of bfloat16 images and their gradients: see device.ops. A trial at first use finds the faster
    way."""

    def __init__(self, tuning: Tuning):
        super().__init__(tuning)
        self._direct: dict[Geometry, OneDnn] = {}
        self._faster: dict[tuple[Any, ...], bool] = {}  # whether oneDNN's is

    def convolve(
        self, x: Array, weight: Array, bias: Array | None, y: Array, geometry: Geometry, relu: bool = False
    ) -> None:
        def direct() -> None:
            self._operation(onednn.Forward, geometry, x, bias=bias is not None)(x, weight, bias, y)

        def widened() -> None:
            super(BfloatConvolutions, self).convolve(x, weight, bias, y, geometry)

        self._run(("forward", geometry, bias is not None), x, y, direct, widened)
        if relu:
            self.relu(y, y)

    def convolve_grad_x(self, weight: Array, dy: Array, dx: Array, geometry: Geometry) -> None:
        def direct() -> None:
            self._operation(onednn.InputGradient, geometry, dy)(weight, dy, dx)

        def widened() -> None:
            super(BfloatConvolutions, self).convolve_grad_x(weight, dy, dx, geometry)

        self._run(("input gradient", geometry), dy, dx, direct, widened)

    def convolve_grad_w(self, x: Array, dy: Array, dw: Array, geometry: Geometry, accumulate: bool) -> None:
        def direct() -> None:
            self._operation(onednn.WeightGradient, geometry, x)(x, dy, dw, accumulate)

        def widened() -> None:
            super(BfloatConvolutions, self).convolve_grad_w(x, dy, dw, geometry, accumulate)

        if dw.dtype == np.float32:
            self._run(("weight gradient", geometry), x, dw, direct, widened)
        else:
            widened()

    def _run(
        self, key: tuple[Any, ...], x: Array, out: Array, direct: Callable[[], None], widened: Callable[[], None]
    ) -> None:
        """Compute `out` in the faster way."""
        if self.library is None or x.dtype != self.bfloat16 or not (x.size and out.size):
            widened()
            return
        faster = self._faster.get(key)
        if faster is None:
            before = out.copy()
            widened()  # chooses its algorithm by a trial of its own, which cannot be inside another one
            trials: dict[str, Callable[[], object]] = {"widened": widened, "onednn": direct}
            what = f"{key[0]} of {len(x)} bfloat16 images {key[1]} {key[2:]}"
            faster = self._faster[key] = self._tuning.fastest(what, trials, out) == "onednn"
            np.copyto(out, before)
        (direct if faster else widened)()

    def _operation(self, kind: Callable[..., Any], geometry: Geometry, images: Array, **more: Any) -> Any:
        """Return the library's operation; raises OneDnnError where it does not support the geometry."""
        assert self.library is not None
        direct = self._direct.get(geometry)
        if direct is None:
            direct = self._direct[geometry] = OneDnn(geometry, self.library)
        return direct.operation(kind, len(images), **more, data_type=onednn.BFLOAT16)
