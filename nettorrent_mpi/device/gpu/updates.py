"""The optimizers' formulas, element by element: one kernel makes one pass over all arrays of an update."""

from __future__ import annotations

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.gpu.flat import flat
from nettorrent_mpi.device.gpu.operations import KernelOperations


class GpuUpdateOperations(KernelOperations):
    """One step of each optimizer: see device.ops. With bfloat16 gradients all other arrays are float32."""

    def sgd(self, p: Array, g: Array, numbers: Array, scale: Array | None = None, decay: float = 0.0) -> None:
        self.each_pack("sgd", g.dtype, flat(p, g), p, g, numbers, scale, decay, p.size)

    def momentum(
        self, p: Array, g: Array, b: Array, numbers: Array, nesterov: bool, scale: Array | None = None,
        decay: float = 0.0,
    ) -> None:  # fmt: skip
        self.each_pack("momentum", g.dtype, flat(p, g, b), p, g, b, numbers, nesterov, scale, decay, p.size)

    def adagrad(
        self, p: Array, g: Array, s: Array, numbers: Array, eps: float, scale: Array | None = None, decay: float = 0.0
    ) -> None:
        self.each_pack("adagrad", g.dtype, flat(p, g, s), p, g, s, numbers, eps, scale, decay, p.size)

    def rmsprop(
        self, p: Array, g: Array, s: Array, a: Array | None, b: Array | None, numbers: Array, alpha: float, eps: float,
        beta: float, scale: Array | None = None, decay: float = 0.0,
    ) -> None:  # fmt: skip
        count = flat(p, g, *(state for state in (s, a, b) if state is not None))
        self.each_pack("rmsprop", g.dtype, count, p, g, s, a, b, numbers, alpha, eps, beta, scale, decay, count)

    def adam(
        self, p: Array, g: Array, m: Array, v: Array, numbers: Array, rest1: float, b2: float, rest2: float,
        scale: Array | None = None, decay: float = 0.0,
    ) -> None:  # fmt: skip
        self.each_pack("adam", g.dtype, flat(p, g, m, v), p, g, m, v, numbers, rest1, b2, rest2, scale, decay, p.size)
