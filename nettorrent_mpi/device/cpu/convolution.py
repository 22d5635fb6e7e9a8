"""Convolutions are computed by the fastest algorithm for their geometry, which a trial finds at first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.cpu import blas, onednn
from nettorrent_mpi.device.cpu.algorithm import Algorithm
from nettorrent_mpi.device.cpu.flat import Operations
from nettorrent_mpi.device.cpu.im2col import Im2colProducts
from nettorrent_mpi.device.cpu.taps import RowProducts, TapProducts
from nettorrent_mpi.device.cpu.tuning import Tuning
from nettorrent_mpi.device.cpu.winograd import WinogradProducts
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.ops import LayerOps

# 1 x 1 kernels with a stride got wrong gradients in oneDNN 3.2 (jit_1x1:avx2), often but not always.
WRONG_BELOW = 8


class OneDnn(Algorithm):
    """Calls oneDNN's direct convolution, which compiles and keeps code for each number of images.

    All three methods raise OneDnnError if the library does not support this geometry: the trial then rejects it.
    """

    name = "onednn"

    def __init__(self, geometry: Geometry, library: onednn.Library):
        super().__init__(geometry)
        self._library = library
        self._made: dict[tuple[Any, ...], Any] = {}

    def operation(self, kind: Callable[..., Any], images: int, **more: Any) -> Any:
        """Return one of onednn's operations for so many images."""
        key = (kind, images, *more.values())
        operation = self._made.get(key)
        if operation is None:
            g = self.geometry
            shape = (images, g.image, g.output, g.kernel, g.stride, g.vertical, g.horizontal)
            operation = self._made[key] = kind(self._library, *shape, **more)
        return operation

    def forward(self, x: Array, weight: Array, bias: Array | None, y: Array, workspace: Workspace) -> None:
        self.operation(onednn.Forward, len(x), bias=bias is not None)(x, weight, bias, y)

    def input_gradient(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        self.operation(onednn.InputGradient, len(dy))(weight, dy, dx)

    def weight_gradient(self, x: Array, dy: Array, dw: Array, accumulate: bool, workspace: Workspace) -> None:
        geometry = self.geometry
        if geometry.kernel == (1, 1) and geometry.stride != (1, 1) and geometry.image[2] < WRONG_BELOW:
            raise onednn.OneDnnError("its AVX2 code reads out of bounds")
        self.operation(onednn.WeightGradient, len(x))(x, dy, dw, accumulate)


class ConvolutionOperations(Operations):
    """Convolutions of images and their gradients: see device.ops."""

    def __init__(self, tuning: Tuning):
        super().__init__(tuning)
        self._algorithms: dict[tuple[Geometry, np.dtype[Any]], list[Algorithm]] = {}
        self._fastest_algorithm: dict[tuple[str, Geometry, np.dtype[Any]], Algorithm] = {}

    def convolve(
        self, x: Array, weight: Array, bias: Array | None, y: Array, geometry: Geometry, relu: bool = False
    ) -> None:
        if y.size:
            workspace = self.memory(x.dtype)
            algorithm = self._fastest_algorithm.get(("forward", geometry, x.dtype)) or self._find_fastest(
                "forward", geometry, x, y, lambda one, out: one.forward(x, weight, bias, out, workspace)
            )
            algorithm.forward(x, weight, bias, y, workspace)
            if relu:
                cast("LayerOps", self).relu(y, y)

    def convolve_grad_x(self, weight: Array, dy: Array, dx: Array, geometry: Geometry) -> None:
        if not dy.size:
            dx[...] = 0
            return
        workspace = self.memory(dy.dtype)
        algorithm = self._fastest_algorithm.get(("input gradient", geometry, dy.dtype)) or self._find_fastest(
            "input gradient", geometry, dy, dx, lambda one, out: one.input_gradient(weight, dy, out, workspace)
        )
        algorithm.input_gradient(weight, dy, dx, workspace)

    def convolve_grad_w(self, x: Array, dy: Array, dw: Array, geometry: Geometry, accumulate: bool) -> None:
        if not dy.size:
            if not accumulate:
                dw[...] = 0
            return
        workspace = self.memory(x.dtype)
        algorithm = self._fastest_algorithm.get(("weight gradient", geometry, x.dtype)) or self._find_fastest(
            "weight gradient",
            geometry,
            x,
            np.empty_like(dw),
            lambda one, out: one.weight_gradient(x, dy, out, False, workspace),
        )
        algorithm.weight_gradient(x, dy, dw, accumulate, workspace)

    def _find_fastest(
        self, what: str, geometry: Geometry, array: Array, out: Array, run: Callable[[Algorithm, Array], None]
    ) -> Algorithm:
        blas.wake(array.dtype)
        key = geometry, array.dtype
        if key not in self._algorithms:
            self._algorithms[key] = algorithms(geometry, array.dtype, self._tuning)
        trials = {one.name: partial(run, one, out) for one in self._algorithms[key]}
        name = self._tuning.fastest(f"{what} of {len(array)} {array.dtype} images {geometry}", trials, out)
        chosen = self._fastest_algorithm[what, *key] = next(one for one in self._algorithms[key] if one.name == name)
        return chosen


def algorithms(geometry: Geometry, dtype: np.dtype[Any], tuning: Tuning) -> list[Algorithm]:
    """Return the algorithms that can compute this geometry with the permitted libraries; im2col always can."""
    found: list[Algorithm] = [Im2colProducts(geometry)]
    gemm, library = tuning.gemm(dtype), tuning.onednn()
    if geometry.stride == (1, 1) and geometry.kernel != (1, 1) and gemm is not None:
        found.append(TapProducts(geometry, gemm))
        if geometry.kernel[1] > 1:
            found.append(RowProducts(geometry, gemm))
    if geometry.stride == (1, 1) and geometry.kernel == (3, 3) and tuning.compiled:
        found.append(WinogradProducts(geometry))
    if library is not None and dtype == np.float32:
        found.append(OneDnn(geometry, library))
    return found
