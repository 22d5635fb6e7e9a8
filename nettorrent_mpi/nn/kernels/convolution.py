"""Ways to compute a convolution and its gradients, and which of them is the fastest for a shape.

y[h, w, o] = sum over p, q, i of x[h * down + p - top, w * across + q - left, i] * weight[p, q, i, o] + bias[o],
of images x (b, height, width, i) and y (b, high, wide, o), both C-contiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from nettorrent_mpi.nn.backend import Array, Workspace
from nettorrent_mpi.nn.kernels import choice, onednn, trial
from nettorrent_mpi.nn.kernels.memory import repeated, row_repeats, wide_rows
from nettorrent_mpi.nn.kernels.windows import Windows

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Of one image: (height, width, channels) of x and y; the padding is (before, after)."""

    image: tuple[int, int, int]
    output: tuple[int, int, int]
    kernel: Pair
    stride: Pair
    vertical: Pair
    horizontal: Pair

    def __str__(self) -> str:
        sizes = ["x".join(map(str, shape)) for shape in (self.image, self.output, self.kernel, self.stride)]
        return f"{sizes[0]} to {sizes[1]} by {sizes[2]} every {sizes[3]} in {self.vertical}{self.horizontal}"


class Way(ABC):
    """One way to compute all of it for one geometry. Allocates nothing after the first call of each size."""

    name: ClassVar[str]

    def __init__(self, geometry: Geometry):
        self.geometry = geometry

    @abstractmethod
    def forward(self, x: Array, weight: Array, bias: Array | None, y: Array, workspace: Workspace) -> None:
        """y <- the convolution."""

    @abstractmethod
    def input_gradient(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        """dx <- its gradient."""

    @abstractmethod
    def weight_gradient(self, x: Array, dy: Array, dw: Array, accumulate: bool, workspace: Workspace) -> None:
        """dw <- (or +=) its gradient."""


class WindowProducts(Way):
    """Products of a matrix of what the kernel sees (im2col), block by block, with the weights.

    The windows are made anew in backward: keeping them would take kernel height * width times the memory of x.
    """

    name = "windows"

    def __init__(self, geometry: Geometry):
        super().__init__(geometry)
        (high, wide, filters), kernel = geometry.output, geometry.kernel
        vertical, horizontal = geometry.vertical, geometry.horizontal
        self._windows = Windows(geometry.image, kernel, geometry.stride, vertical, horizontal)
        # dx of stride 1 is itself a convolution: of dy, padded to all places that touch the image, with the kernel
        # turned round.
        self._adjoint: Windows | None = None
        if geometry.stride == (1, 1):
            self._adjoint = Windows(
                (high, wide, filters),
                kernel,
                (1, 1),
                (kernel[0] - 1 - vertical[0], kernel[0] - 1 - vertical[1]),
                (kernel[1] - 1 - horizontal[0], kernel[1] - 1 - horizontal[1]),
            )

    def forward(self, x: Array, weight: Array, bias: Array | None, y: Array, workspace: Workspace) -> None:
        _, wide, filters = self.geometry.output
        weight_ko = weight.reshape(-1, filters)
        repeats = row_repeats((wide, filters))
        bias_w = None if bias is None else repeated(bias, repeats, "bias", workspace)
        for images, rows in self._windows.blocks(x.shape[0], x.itemsize):
            y_no = y[images, rows].reshape(-1, filters)
            np.matmul(self._windows.matrix(x, images, rows, workspace), weight_ko, out=y_no)
            if bias_w is not None:
                y_nw = wide_rows(y_no, repeats)
                np.add(y_nw, bias_w, out=y_nw)

    def weight_gradient(self, x: Array, dy: Array, dw: Array, accumulate: bool, workspace: Workspace) -> None:
        filters = self.geometry.output[2]
        if not accumulate:
            dw[...] = 0
        dw_ko = dw.reshape(-1, filters)
        more = workspace.scratch("weight gradient", dw_ko.shape)
        for images, rows in self._windows.blocks(x.shape[0], x.itemsize):
            seen = self._windows.matrix(x, images, rows, workspace)
            np.matmul(seen.T, dy[images, rows].reshape(-1, filters), out=more)
            np.add(dw_ko, more, out=dw_ko)

    def input_gradient(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        if self._adjoint is not None:
            self._correlate_back(self._adjoint, weight, dy, dx, workspace)
        else:
            self._scatter_back(weight, dy, dx, workspace)

    def _correlate_back(self, adjoint: Windows, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        """dx for stride 1."""
        channels = dx.shape[3]
        turned = workspace.scratch("turned weight", (*weight.shape[:2], weight.shape[3], channels))
        np.copyto(turned, weight[::-1, ::-1].transpose(0, 1, 3, 2))
        for images, rows in adjoint.blocks(dy.shape[0], dy.itemsize):
            seen = adjoint.matrix(dy, images, rows, workspace)
            np.matmul(seen, turned.reshape(-1, channels), out=dx[images, rows].reshape(-1, channels))

    def _scatter_back(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        """dx for larger strides: the gradient of the windows, added up where they came from, one tap at a time."""
        filters = weight.shape[3]
        weight_ko = weight.reshape(-1, filters)
        dx[...] = 0
        for images, rows in self._windows.blocks(dy.shape[0], dy.itemsize):
            dy_no = dy[images, rows].reshape(-1, filters)
            seen = workspace.scratch("windows", (dy_no.shape[0], weight_ko.shape[0]))
            np.matmul(dy_no, weight_ko.T, out=seen)
            taps = seen.reshape(-1, rows.stop - rows.start, dy.shape[2], *weight.shape[:3])
            for p in range(weight.shape[0]):
                down, here_down = self._reach(0, p, rows)
                for q in range(weight.shape[1]):
                    across, here_across = self._reach(1, q, slice(0, dy.shape[2]))
                    target = dx[images, down, across]
                    np.add(target, taps[:, here_down, here_across, p, q], out=target)

    def _reach(self, axis: int, tap: int, places: slice) -> tuple[slice, slice]:
        """(pixels, places) along an axis: which pixels inside the image a tap of the kernel touches from which places.

        The places are counted from the block's first.
        """
        geometry = self.geometry
        stride, size = geometry.stride[axis], geometry.image[axis]
        before = (geometry.vertical, geometry.horizontal)[axis][0]
        first = max(places.start, -((tap - before) // stride))  # the least with place * stride + tap - before >= 0
        last = max(first, min(places.stop, (size - 1 - tap + before) // stride + 1))
        pixel = first * stride + tap - before
        return slice(pixel, pixel + (last - first) * stride, stride), slice(first - places.start, last - places.start)


class OneDnn(Way):
    """oneDNN's direct convolution. It compiles code for each number of images, which is kept.

    Raises OneDnnError where the library has none for this geometry.
    """

    name = "onednn"

    def __init__(self, geometry: Geometry, library: onednn.Library):
        super().__init__(geometry)
        self._library = library
        self._made: dict[tuple[Any, ...], Any] = {}
        for kind in (onednn.InputGradient, onednn.WeightGradient):  # is there one? For a single image.
            self._operation(kind, 1)

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
            way = self._choose("forward", x, lambda way: way.forward(x, weight, bias, y, workspace))
            way.forward(x, weight, bias, y, workspace)

    def input_gradient(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        """dx <- the gradient with respect to x."""
        if not dy.size:
            dx[...] = 0
            return
        way = self._choose("input gradient", dy, lambda way: way.input_gradient(weight, dy, dx, workspace))
        way.input_gradient(weight, dy, dx, workspace)

    def weight_gradient(self, x: Array, dy: Array, dw: Array, accumulate: bool, workspace: Workspace) -> None:
        """dw <- (or +=) the gradient with respect to the weights."""
        if not dy.size:
            if not accumulate:
                dw[...] = 0
            return
        way = self._choose(
            "weight gradient", x, lambda way: way.weight_gradient(x, dy, np.empty_like(dw), False, workspace)
        )
        way.weight_gradient(x, dy, dw, accumulate, workspace)

    def _choose(self, what: str, array: Array, run: Callable[[Way], None]) -> Way:
        way = self._chosen.get((what, array.dtype))
        if way is None:
            ways = self._ways.setdefault(array.dtype, self._possible(array.dtype))
            trials = {way.name: lambda way=way: run(way) for way in ways}
            name = trial.fastest(f"{what} of {len(array)} {array.dtype} images {self._geometry}", trials)
            way = self._chosen[what, array.dtype] = next(way for way in ways if way.name == name)
        return way

    def _possible(self, dtype: np.dtype[Any]) -> list[Way]:
        ways: list[Way] = [WindowProducts(self._geometry)]
        library = onednn.library() if choice.fastest() and dtype == np.float32 else None
        if library is not None:
            with suppress(onednn.OneDnnError):  # a shape that it does not know
                ways.append(OneDnn(self._geometry, library))
        return ways
