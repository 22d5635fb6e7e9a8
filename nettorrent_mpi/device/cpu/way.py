"""What a way to compute a convolution and its gradients is.

y[h, w, o] = sum over p, q, i of x[h * down + p - top, w * across + q - left, i] * weight[p, q, i, o] + bias[o],
of images x (b, height, width, i) and y (b, high, wide, o), both C-contiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace

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


def turned(weight: Array, workspace: Workspace) -> Array:
    """The weight with which dx of stride 1 is itself a convolution, of dy: turned round, inputs and outputs changed."""
    *kernel, channels, filters = weight.shape
    other = workspace.scratch("turned weight", (*kernel, filters, channels))
    np.copyto(other, weight[::-1, ::-1].transpose(0, 1, 3, 2))
    return other


def adjoint_padding(geometry: Geometry) -> tuple[Pair, Pair]:
    """dy is padded to all places that touch the image: (vertical, horizontal), for stride 1."""
    (high, wide), vertical, horizontal = geometry.kernel, geometry.vertical, geometry.horizontal
    return (high - 1 - vertical[0], high - 1 - vertical[1]), (wide - 1 - horizontal[0], wide - 1 - horizontal[1])
