"""Optimizers: how gradients change parameters.

Formulas and defaults are PyTorch's (torch.optim, version 2.x). All arrays are flat and of equal length: a rank's share
of its stage's parameters. Every formula works element by element, so that any division of the parameters into shares
gives the serial result bit for bit.

Going over a large array once per operation is bound by memory. Therefore an update works on blocks, which stay in the
second-level cache for all operations. Where Numba is installed a compiled loop goes over all arrays once instead, with
the same results: five times as fast (Adam, float32, 535,000 parameters, an AMD EPYC of family 25: 0.29 ns each against
1.45).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType, aligned
from nettorrent_mpi.device.cpu import updates
from nettorrent_mpi.device.cpu.loop import compiled
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.specs import Adagrad, Adam, AdamW, Rmsprop, Sgd, Spec

State: TypeAlias = dict[str, Array]  # name -> flat array, as long as the parameters
Rule: TypeAlias = Callable[[Array, Array, Sequence[Array], Array], None]  # (params, grads, states, work) of one block

# Bytes of a block of one array. Adam touches four arrays and one or two of scratch memory: 640 or 768 KiB. Smaller
# blocks pay for calls into NumPy, larger ones leave the second-level cache. Adam, float32, one core of an AMD EPYC of
# family 26 (1 MiB of second-level cache), ns per element of 530,000 / 2,900,000: 4 KiB 5.3 / 6.2, 32 KiB 1.4 / 1.7,
# 128 KiB 0.92 / 1.2, whole arrays 0.86 / 1.3, and 8.0 / 3.8 written as NumPy expressions over whole arrays.
BLOCK_BYTES = 128 * 1024


class Optimizer(ABC):
    """A pair (init, update). `states` names the arrays that it remembers from step to step.

    An instance owns the scratch memory of one block: let no two threads update with the same one.
    """

    def __init__(self, states: tuple[str, ...], weight_decay: float):
        self.states = states
        self._weight_decay = weight_decay  # added to the gradients, times the parameters
        self._scratch: dict[np.dtype[np.generic], tuple[Array, Array, Array]] = {}

    def init(self, size: int, dtype: DType) -> State:
        """The state before the first step, for `size` parameters of `dtype`."""
        state = {name: aligned(size, dtype) for name in self.states}
        for array in state.values():
            array.fill(0)
        self._blocks(np.dtype(dtype))
        return state

    def update(
        self,
        params: Array,
        grads: Array,
        state: State,
        lr: float,
        step: int,
        *,
        scale: float = 1.0,
        withheld: Array | None = None,
        withhold: float = 0.0,
    ) -> None:
        """Change `params` and `state` in place by one step with the gradients `scale` * `grads`, which stay unchanged.

        All are flat arrays of equal length and type. `step` counts from 1. `scale` serves clipping (see `clip_scale`).
        The part `withhold` of the change of the parameters is not made, but added to `withheld`.
        Allocates nothing.
        """
        work, decayed, before = self._blocks(params.dtype)
        states = [state[name] for name in self.states]
        decay = self._weight_decay
        loop = self._loop(lr, step, params.dtype) if compiled() else None
        if loop is not None and scale == 1.0 and not decay and withheld is None:
            loop(params, grads, states, work)
            return
        rule = loop or self._rule(lr, step)
        block = len(work)
        for start in range(0, len(params), block):
            part = slice(start, start + block)
            p, g = params[part], grads[part]
            if scale != 1.0:
                g = np.multiply(g, scale, out=decayed[: len(p)])
            if decay:
                w = np.multiply(p, decay, out=work[: len(p)])
                g = np.add(g, w, out=decayed[: len(p)])
            if withheld is None:
                rule(p, g, [values[part] for values in states], work[: len(p)])
                continue
            change, kept = before[: len(p)], withheld[part]
            np.copyto(change, p)
            rule(p, g, [values[part] for values in states], work[: len(p)])
            np.subtract(p, change, out=change)
            np.multiply(change, withhold, out=change)
            np.subtract(p, change, out=p)
            np.add(kept, change, out=kept)

    def _blocks(self, dtype: np.dtype[np.generic]) -> tuple[Array, Array, Array]:
        if dtype not in self._scratch:
            size = BLOCK_BYTES // dtype.itemsize
            self._scratch[dtype] = (aligned(size, dtype), aligned(size, dtype), aligned(size, dtype))
        return self._scratch[dtype]

    @abstractmethod
    def _rule(self, lr: float, step: int) -> Rule:
        """The formula of one step. It changes params and states in place, not grads; `work` is free memory.

        Its numbers are Python's floats: NumPy then computes in the arrays' own type, while a float64 scalar of NumPy's
        would turn float32 arrays into float64 ones.
        """

    @abstractmethod
    def _loop(self, lr: float, step: int, dtype: np.dtype[Any]) -> Rule | None:
        """The same as a compiled loop for arrays of any length, which needs no `work`; None where there is none."""


def make_optimizer(spec: Spec) -> Optimizer:
    """The optimizer that `spec` (one of specs.OPTIMIZERS) asks for. Raises ConfigError for an option out of range."""
    _check(spec)
    if isinstance(spec, Sgd):
        return _Sgd(spec)
    if isinstance(spec, Adagrad):
        return _Adagrad(spec)
    if isinstance(spec, Rmsprop):
        return _Rmsprop(spec)
    assert isinstance(spec, Adam | AdamW), spec
    return _Adam(spec)


def clip_scale(norm: float, limit: float) -> float:
    """What to multiply gradients of the global `norm` with so that it becomes at most `limit`.

    The formula of torch.nn.utils.clip_grad_norm_; nan where the norm is nan.
    """
    scale = limit / (norm + 1e-6)
    return 1.0 if scale > 1.0 else scale


_SQUARES = np.empty(8192, np.float64)  # scratch of sum_of_squares, which one thread of a process calls


def sum_of_squares(flat: Array) -> float:
    """The sum of the squares of a flat array, computed in float64 whatever the array's type. Allocates nothing."""
    total = 0.0
    for start in range(0, len(flat), len(_SQUARES)):
        part = flat[start : start + len(_SQUARES)]
        exact = _SQUARES[: len(part)]
        np.copyto(exact, part)
        total += float(np.dot(exact, exact))
    return total


class _Sgd(Optimizer):
    """b = momentum b + (1 - dampening) g, at first b = g; p -= lr b, with Nesterov p -= lr (g + momentum b)."""

    def __init__(self, spec: Sgd):
        super().__init__(("momentum",) if spec.momentum else (), spec.weight_decay)
        self._spec = spec

    def _rule(self, lr: float, step: int) -> Rule:
        momentum, share, nesterov = self._spec.momentum, 1.0 - self._spec.dampening, self._spec.nesterov

        def plain(p: Array, g: Array, states: Sequence[Array], work: Array) -> None:
            np.multiply(g, lr, out=work)
            np.subtract(p, work, out=p)

        def with_momentum(p: Array, g: Array, states: Sequence[Array], work: Array) -> None:
            (b,) = states
            if step == 1:
                np.copyto(b, g)
            else:
                np.multiply(b, momentum, out=b)
                if share == 1.0:
                    np.add(b, g, out=b)
                else:
                    np.multiply(g, share, out=work)
                    np.add(b, work, out=b)
            if nesterov:
                np.multiply(b, momentum, out=work)
                np.add(g, work, out=work)
                np.multiply(work, lr, out=work)
            else:
                np.multiply(b, lr, out=work)
            np.subtract(p, work, out=p)

        return with_momentum if momentum else plain

    def _loop(self, lr: float, step: int, dtype: np.dtype[Any]) -> Rule | None:
        spec, real = self._spec, dtype.type
        if not spec.momentum:
            rate = real(lr)
            return lambda p, g, states, work: updates.sgd(p, g, rate)
        if step == 1:  # momentum begins with the gradient itself
            return None
        numbers = real(lr), real(spec.momentum), real(1.0 - spec.dampening)
        return lambda p, g, states, work: updates.sgd_momentum(p, g, states[0], *numbers, spec.nesterov)


class _Adagrad(Optimizer):
    """s += g^2; p -= lr / (1 + (step - 1) lr_decay) g / (sqrt(s) + eps). Duchi, Hazan, Singer (2011)."""

    def __init__(self, spec: Adagrad):
        super().__init__(("sum",), spec.weight_decay)
        self._spec = spec

    def init(self, size: int, dtype: DType) -> State:
        state = super().init(size, dtype)
        state["sum"].fill(self._spec.initial_accumulator)
        return state

    def _rule(self, lr: float, step: int) -> Rule:
        rate, eps = lr / (1.0 + (step - 1) * self._spec.lr_decay), self._spec.eps

        def rule(p: Array, g: Array, states: Sequence[Array], work: Array) -> None:
            (s,) = states
            np.multiply(g, g, out=work)
            np.add(s, work, out=s)
            np.sqrt(s, out=work)
            np.add(work, eps, out=work)
            np.divide(g, work, out=work)
            np.multiply(work, rate, out=work)
            np.subtract(p, work, out=p)

        return rule

    def _loop(self, lr: float, step: int, dtype: np.dtype[Any]) -> Rule | None:
        rate, eps = dtype.type(lr / (1.0 + (step - 1) * self._spec.lr_decay)), dtype.type(self._spec.eps)
        return lambda p, g, states, work: updates.adagrad(p, g, states[0], rate, eps)


class _Rmsprop(Optimizer):
    """s = alpha s + (1 - alpha) g^2; d = g / (sqrt(s) + eps); p -= lr d. Tieleman, Hinton (2012).

    Centered: sqrt(s - a^2) in place of sqrt(s), with the mean gradient a = alpha a + (1 - alpha) g. With momentum:
    b = momentum b + d; p -= lr b.
    """

    def __init__(self, spec: Rmsprop):
        centered = ("gradient_average",) if spec.centered else ()
        momentum = ("momentum",) if spec.momentum else ()
        super().__init__(("square_average", *centered, *momentum), spec.weight_decay)
        self._spec = spec

    def _rule(self, lr: float, step: int) -> Rule:
        spec = self._spec
        alpha, rest, eps, momentum, centered = spec.alpha, 1.0 - spec.alpha, spec.eps, spec.momentum, spec.centered

        def rule(p: Array, g: Array, states: Sequence[Array], work: Array) -> None:
            s = states[0]
            np.multiply(g, g, out=work)
            np.multiply(work, rest, out=work)
            np.multiply(s, alpha, out=s)
            np.add(s, work, out=s)
            if centered:
                a = states[1]
                np.subtract(g, a, out=work)
                np.multiply(work, rest, out=work)
                np.add(a, work, out=a)
                np.multiply(a, a, out=work)
                np.subtract(s, work, out=work)
                np.sqrt(work, out=work)
            else:
                np.sqrt(s, out=work)
            np.add(work, eps, out=work)
            np.divide(g, work, out=work)
            if momentum:
                b = states[-1]
                np.multiply(b, momentum, out=b)
                np.add(b, work, out=b)
                np.multiply(b, lr, out=work)
            else:
                np.multiply(work, lr, out=work)
            np.subtract(p, work, out=p)

        return rule

    def _loop(self, lr: float, step: int, dtype: np.dtype[Any]) -> Rule | None:
        spec, real = self._spec, dtype.type
        if spec.centered or spec.momentum:
            return None
        numbers = real(lr), real(spec.alpha), real(1.0 - spec.alpha), real(spec.eps)
        return lambda p, g, states, work: updates.rmsprop(p, g, states[0], *numbers)


class _Adam(Optimizer):
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps).

    Kingma, Ba (2015). AdamW (Loshchilov, Hutter 2019) shrinks the parameters by lr * weight_decay before, instead of
    adding the decay to the gradients.
    """

    def __init__(self, spec: Adam | AdamW):
        self._shrink = spec.weight_decay if isinstance(spec, AdamW) else 0.0
        super().__init__(("m", "v"), 0.0 if isinstance(spec, AdamW) else spec.weight_decay)
        self._spec = spec

    def _rule(self, lr: float, step: int) -> Rule:
        rate, rest1, b2, rest2, eps, shrink = self._numbers(lr, step)

        def rule(p: Array, g: Array, states: Sequence[Array], work: Array) -> None:
            m, v = states
            np.subtract(g, m, out=work)
            np.multiply(work, rest1, out=work)
            np.add(m, work, out=m)
            np.multiply(g, g, out=work)
            np.multiply(work, rest2, out=work)
            np.multiply(v, b2, out=v)
            np.add(v, work, out=v)
            np.sqrt(v, out=work)
            np.add(work, eps, out=work)
            np.divide(m, work, out=work)
            np.multiply(work, rate, out=work)
            if shrink != 1.0:
                np.multiply(p, shrink, out=p)
            np.subtract(p, work, out=p)

        return rule

    def _loop(self, lr: float, step: int, dtype: np.dtype[Any]) -> Rule | None:
        numbers = [dtype.type(number) for number in self._numbers(lr, step)]
        return lambda p, g, states, work: updates.adam(p, g, *states, *numbers)

    def _numbers(self, lr: float, step: int) -> tuple[float, float, float, float, float, float]:
        """(rate, 1 - b1, b2, 1 - b2, eps, what the parameters are multiplied with).

        Numerator and denominator times a root: the bias correction costs no operation on arrays.
        """
        b1, b2 = self._spec.betas
        root = math.sqrt(1.0 - b2**step)
        return lr * root / (1.0 - b1**step), 1.0 - b1, b2, 1.0 - b2, self._spec.eps * root, 1.0 - lr * self._shrink


def _check(spec: Spec) -> None:
    """Raise ConfigError for an option with which the formulas make no sense (PyTorch's own limits)."""

    def refuse(option: str, value: object, wanted: str) -> None:
        raise ConfigError(f"{value} is not {wanted}", key=f"train.optimizer.{spec.kind}.{option}")

    options = spec.options()
    for option in ("lr", "weight_decay", "eps", "momentum", "lr_decay", "initial_accumulator"):
        if option in options and not 0.0 <= options[option] < math.inf:
            refuse(option, options[option], "a number of at least 0")
    if isinstance(spec, Rmsprop) and not 0.0 <= spec.alpha <= 1.0:
        refuse("alpha", spec.alpha, "between 0 and 1")
    if isinstance(spec, Adam | AdamW) and not all(0.0 <= beta < 1.0 for beta in spec.betas):
        refuse("betas", list(spec.betas), "two numbers of at least 0 and below 1")
    if isinstance(spec, Sgd) and spec.nesterov and (spec.momentum == 0.0 or spec.dampening != 0.0):
        refuse("nesterov", "true", "possible without momentum or with dampening: set momentum above 0, dampening to 0")
