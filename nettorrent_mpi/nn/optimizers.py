"""Optimizers update parameters from their gradients.

Formulas and defaults are PyTorch's (torch.optim, version 2.x). All arrays are flat and of equal length: a rank's shard
of its stage's parameters. Every formula works element by element, so that any division of the parameters into shards
gives the serial result bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TypeAlias

from nettorrent_mpi.device.arrays import Array, DType
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.device.ops import Ops
from nettorrent_mpi.plan.specs import Adagrad, Adam, AdamW, Rmsprop, Sgd, Spec

OptimizerState: TypeAlias = dict[str, Array]  # name -> flat array, as long as the parameters


class Optimizer(ABC):
    """An Optimizer is a pair (init, update). `states` names the arrays that it keeps from step to step."""

    def __init__(self, states: tuple[str, ...], weight_decay: float):
        self.states = states
        self.decay = weight_decay  # times the parameters, added to the gradients

    def init(self, device: Device, size: int, dtype: DType) -> OptimizerState:
        """Return the state before the first step, for `size` parameters of `dtype`."""
        return {name: device.zeros((size,), dtype) for name in self.states}

    @abstractmethod
    def numbers(self, lr: float, step: int) -> tuple[float, ...]:
        """Return the numbers that change from step to step, at this learning rate; `step` counts from 1."""

    @abstractmethod
    def update(
        self, ops: Ops, params: Array, grads: Array, state: OptimizerState, numbers: Array, scale: Array | None = None
    ) -> None:
        """Change `params` and `state` in place by one step with the gradients `scale[0]` * `grads`, which stay
        unchanged.

        `numbers` holds those of this step, and `scale` the factor for clipping (`ops.clip_scale`), both as float64 on
        the device. Allocates nothing after the first call.
        """


def make_optimizer(spec: Spec) -> Optimizer:
    """Make the optimizer that `spec` (one of specs.OPTIMIZERS) describes."""
    if isinstance(spec, Sgd):
        return _Sgd(spec)
    if isinstance(spec, Adagrad):
        return _Adagrad(spec)
    if isinstance(spec, Rmsprop):
        return _Rmsprop(spec)
    assert isinstance(spec, Adam | AdamW), spec
    return _Adam(spec)


class _Sgd(Optimizer):
    """SGD: b = momentum b + (1 - dampening) g, at first b = g; p -= lr b, with Nesterov p -= lr (g + momentum b)."""

    def __init__(self, spec: Sgd):
        super().__init__(("momentum",) if spec.momentum else (), spec.weight_decay)
        self._spec = spec

    def numbers(self, lr: float, step: int) -> tuple[float, ...]:
        spec = self._spec
        if not spec.momentum:
            return (lr,)
        beta, share = (0.0, 1.0) if step == 1 else (spec.momentum, 1.0 - spec.dampening)
        return lr, beta, share, spec.momentum

    def update(
        self, ops: Ops, params: Array, grads: Array, state: OptimizerState, numbers: Array, scale: Array | None = None
    ) -> None:
        if self._spec.momentum:
            ops.momentum(params, grads, state["momentum"], numbers, self._spec.nesterov, scale, self.decay)
        else:
            ops.sgd(params, grads, numbers, scale, self.decay)


class _Adagrad(Optimizer):
    """Adagrad (Duchi, Hazan, Singer 2011): s += g^2; p -= lr / (1 + (step - 1) lr_decay) g / (sqrt(s) + eps)."""

    def __init__(self, spec: Adagrad):
        super().__init__(("sum",), spec.weight_decay)
        self._spec = spec

    def init(self, device: Device, size: int, dtype: DType) -> OptimizerState:
        state = super().init(device, size, dtype)
        device.ops.fill(state["sum"], self._spec.initial_accumulator)
        return state

    def numbers(self, lr: float, step: int) -> tuple[float, ...]:
        return (lr / (1.0 + (step - 1) * self._spec.lr_decay),)

    def update(
        self, ops: Ops, params: Array, grads: Array, state: OptimizerState, numbers: Array, scale: Array | None = None
    ) -> None:
        ops.adagrad(params, grads, state["sum"], numbers, self._spec.eps, scale, self.decay)


class _Rmsprop(Optimizer):
    """RMSprop (Tieleman, Hinton 2012): s = alpha s + (1 - alpha) g^2; d = g / (sqrt(s) + eps); p -= lr d.

    Centered: sqrt(s - a^2) in place of sqrt(s), with the mean gradient a = alpha a + (1 - alpha) g. With momentum: b =
    momentum b + d; p -= lr b.
    """

    def __init__(self, spec: Rmsprop):
        centered = ("gradient_average",) if spec.centered else ()
        momentum = ("momentum",) if spec.momentum else ()
        super().__init__(("square_average", *centered, *momentum), spec.weight_decay)
        self._spec = spec

    def numbers(self, lr: float, step: int) -> tuple[float, ...]:
        return (lr,)

    def update(
        self, ops: Ops, params: Array, grads: Array, state: OptimizerState, numbers: Array, scale: Array | None = None
    ) -> None:
        spec = self._spec
        arrays = state["square_average"], state.get("gradient_average"), state.get("momentum")
        ops.rmsprop(params, grads, *arrays, numbers, spec.alpha, spec.eps, spec.momentum, scale, self.decay)


class _Adam(Optimizer):
    """Adam (Kingma, Ba 2015): m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p -= lr m / (1 - b1^t) / (sqrt(v / (1 -
    b2^t)) + eps).

    AdamW (Loshchilov, Hutter 2019) first shrinks the parameters by lr * weight_decay, instead of adding the decay to
    the gradients.
    """

    def __init__(self, spec: Adam | AdamW):
        self._shrink = spec.weight_decay if isinstance(spec, AdamW) else 0.0
        super().__init__(("m", "v"), 0.0 if isinstance(spec, AdamW) else spec.weight_decay)
        self._spec = spec

    def numbers(self, lr: float, step: int) -> tuple[float, ...]:
        # Numerator and denominator are multiplied by a root, so that bias correction needs no array operation.
        b1, b2 = self._spec.betas
        root = math.sqrt(1.0 - b2**step)
        return lr * root / (1.0 - b1**step), self._spec.eps * root, 1.0 - lr * self._shrink

    def update(
        self, ops: Ops, params: Array, grads: Array, state: OptimizerState, numbers: Array, scale: Array | None = None
    ) -> None:
        b1, b2 = self._spec.betas
        ops.adam(params, grads, state["m"], state["v"], numbers, 1.0 - b1, b2, 1.0 - b2, scale, self.decay)
