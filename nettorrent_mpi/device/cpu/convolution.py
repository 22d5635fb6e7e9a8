"""Which way to compute a convolution and its gradients is the fastest for a shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu import blas, choice, onednn
from nettorrent_mpi.device.cpu import tuning as trial
from nettorrent_mpi.device.cpu.loop import compiled
from nettorrent_mpi.device.cpu.taps import RowProducts, TapProducts
from nettorrent_mpi.device.cpu.way import Geometry, Way
from nettorrent_mpi.device.cpu.windows import WindowProducts
from nettorrent_mpi.device.cpu.winograd import WinogradProducts

# Channels: kernels of 1 x 1 with a stride got wrong gradients in oneDNN 3.2 (jit_1x1:avx2), often but not always.
WRONG_BELOW = 8


class OneDnn(Way):
    """oneDNN's direct convolution. It compiles code for each number of images, which is kept.

    All three raise OneDnnError where the library has none for this geometry: the trial does not choose it then.
    """

    name = "onednn"

    def __init__(self, geometry: Geometry, library: onednn.Library):
        super().__init__(geometry)
        self._library = library
        self._made: dict[tuple[Any, ...], Any] = {}

    def _operation(self, kind: Callable[..., Any], images: int, **more: Any) -> Any:
        key = (kind, images, *more.values())
        operation = self._made.get(key)
        if operation is None:
            g = self.geometry
            shape = (images, g.image, g.output, g.kernel, g.stride, g.vertical, g.horizontal)
            operation = self._made[key] = kind(self._library, *shape, **more)
        return operation

    def forward(self, x: Array, weight: Array, bias: Array | None, y: Array, workspace: Workspace) -> None:
        self._operation(onednn.Forward, len(x), bias=bias is not None)(x, weight, bias, y)

    def input_gradient(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        self._operation(onednn.InputGradient, len(dy))(weight, dy, dx)

    def weight_gradient(self, x: Array, dy: Array, dw: Array, accumulate: bool, workspace: Workspace) -> None:
        geometry = self.geometry
        if geometry.kernel == (1, 1) and geometry.stride != (1, 1) and geometry.image[2] < WRONG_BELOW:
            raise onednn.OneDnnError("its code for AVX2 reads what it should not")
        self._operation(onednn.WeightGradient, len(x))(x, dy, dw, accumulate)


class Convolution:
    """The fastest way for each of the three, chosen by a trial when it is first asked for."""

    def __init__(self, geometry: Geometry):
        self._geometry = geometry
        self._ways: dict[np.dtype[Any], list[Way]] = {}
        self._chosen: dict[tuple[str, np.dtype[Any]], Way] = {}

    def forward(self, x: Array, weight: Array, bias: Array | None, y: Array, workspace: Workspace) -> None:
        """y <- the convolution of x."""
        if y.size:
            way = self._chosen.get(("forward", x.dtype)) or self._choose(
                "forward", x, y, lambda way, out: way.forward(x, weight, bias, out, workspace)
            )
            way.forward(x, weight, bias, y, workspace)

    def input_gradient(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        """dx <- the gradient with respect to x."""
        if not dy.size:
            dx[...] = 0
            return
        way = self._chosen.get(("input gradient", dy.dtype)) or self._choose(
            "input gradient", dy, dx, lambda way, out: way.input_gradient(weight, dy, out, workspace)
        )
        way.input_gradient(weight, dy, dx, workspace)

    def weight_gradient(self, x: Array, dy: Array, dw: Array, accumulate: bool, workspace: Workspace) -> None:
        """dw <- (or +=) the gradient with respect to the weights."""
        if not dy.size:
            if not accumulate:
                dw[...] = 0
            return
        way = self._chosen.get(("weight gradient", x.dtype)) or self._choose(
            "weight gradient",
            x,
            np.empty_like(dw),
            lambda way, out: way.weight_gradient(x, dy, out, False, workspace),
        )
        way.weight_gradient(x, dy, dw, accumulate, workspace)

    def _choose(self, what: str, array: Array, out: Array, run: Callable[[Way, Array], None]) -> Way:
        ways = self._ways.setdefault(array.dtype, self._possible(array.dtype))
        trials = {way.name: partial(run, way, out) for way in ways}
        name = trial.fastest(f"{what} of {len(array)} {array.dtype} images {self._geometry}", trials, out)
        way = self._chosen[what, array.dtype] = next(way for way in ways if way.name == name)
        return way

    def _possible(self, dtype: np.dtype[Any]) -> list[Way]:
        geometry = self._geometry
        ways: list[Way] = [WindowProducts(geometry)]
        if not choice.fastest():
            return ways
        gemm, library = blas.gemm(dtype), onednn.library()
        if geometry.stride == (1, 1) and geometry.kernel != (1, 1) and gemm is not None:
            ways.append(TapProducts(geometry, gemm))
            if geometry.kernel[1] > 1:
                ways.append(RowProducts(geometry, gemm))
        if geometry.stride == (1, 1) and geometry.kernel == (3, 3) and compiled():
            ways.append(WinogradProducts(geometry))
        if library is not None and dtype == np.float32:
            ways.append(OneDnn(geometry, library))
        return ways
