"""The interface of convolution algorithms (see device.geometry for the formula)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from nettorrent_mpi.device.arrays import Array, Workspace
from nettorrent_mpi.device.geometry import Geometry, Pair


class Algorithm(ABC):
    """An Algorithm computes a convolution and both gradients for one geometry. It allocates nothing after the first
    call of each size."""

    name: ClassVar[str]

    def __init__(self, geometry: Geometry):
        self.geometry = geometry

    @abstractmethod
    def forward(self, x: Array, weight: Array, bias: Array | None, y: Array, workspace: Workspace) -> None:
        """Compute y <- the convolution."""

    @abstractmethod
    def input_gradient(self, weight: Array, dy: Array, dx: Array, workspace: Workspace) -> None:
        """Compute dx <- the gradient with respect to x."""

    @abstractmethod
    def weight_gradient(self, x: Array, dy: Array, dw: Array, accumulate: bool, workspace: Workspace) -> None:
        """Compute dw <- (or +=) the gradient with respect to the weights."""


def turned(weight: Array, workspace: Workspace) -> Array:
    """Return the weight rotated by 180 degrees with inputs and outputs exchanged: with it dx for stride 1 is itself a
    convolution, of dy."""
    *kernel, channels, filters = weight.shape
    other = workspace.scratch("turned weight", (*kernel, filters, channels))
    np.copyto(other, weight[::-1, ::-1].transpose(0, 1, 3, 2))
    return other


def adjoint_padding(geometry: Geometry) -> tuple[Pair, Pair]:
    """Return the padding of dy (vertical, horizontal) to all places that touch the image, for stride 1."""
    (high, wide), vertical, horizontal = geometry.kernel, geometry.vertical, geometry.horizontal
    return (high - 1 - vertical[0], high - 1 - vertical[1]), (wide - 1 - horizontal[0], wide - 1 - horizontal[1])
