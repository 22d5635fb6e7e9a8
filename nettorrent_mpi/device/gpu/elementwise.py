"""Activations, element by element."""

from __future__ import annotations

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.flat import flat
from nettorrent_mpi.device.gpu.operations import KernelOperations


class GpuElementwiseOperations(KernelOperations):
    """Activation functions: see device.ops."""

    def relu(self, x: Array, y: Array) -> None:
        self.each_pack("relu", y.dtype, flat(x, y), x, y, y.size)

    def relu_grad(self, y: Array, dy: Array) -> None:
        self.each_pack("relu_grad", dy.dtype, flat(y, dy), y, dy, dy.size)

    def leaky_relu(self, x: Array, y: Array, slope: float) -> None:
        self.each_pack("leaky_relu", y.dtype, flat(x, y), x, y, slope, y.size)

    def leaky_relu_grad(self, y: Array, dy: Array, slope: float) -> None:
        self.each_pack("leaky_relu_grad", dy.dtype, flat(y, dy), y, dy, slope, dy.size)

    def sigmoid(self, x: Array, y: Array) -> None:
        self.each_pack("sigmoid", y.dtype, flat(x, y), x, y, y.size)

    def sigmoid_grad(self, y: Array, dy: Array) -> None:
        self.each_pack("sigmoid_grad", dy.dtype, flat(y, dy), y, dy, dy.size)

    def tanh(self, x: Array, y: Array) -> None:
        self.each_pack("tanh_forward", y.dtype, flat(x, y), x, y, y.size)

    def tanh_grad(self, y: Array, dy: Array) -> None:
        self.each_pack("tanh_grad", dy.dtype, flat(y, dy), y, dy, dy.size)

    def gelu(self, x: Array, y: Array, slope: Array | None) -> None:
        count = flat(x, y) if slope is None else flat(x, y, slope)
        self.each_pack("gelu", y.dtype, count, x, y, slope, count)
