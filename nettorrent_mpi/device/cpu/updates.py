"""The optimizers' formulas, element by element, on flat arrays of equal length and type.

One pass over a large array per operation is memory bound. Therefore an update works on blocks, which stay in the
second-level cache for all operations. With Numba a compiled loop makes one pass over all arrays instead, with the same
results: five times as fast (Adam, float32, 535,000 parameters, an AMD EPYC of family 25: 0.29 ns each against 1.45).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu.blocking import blocks
from nettorrent_mpi.device.cpu.flat import Operations
from nettorrent_mpi.device.cpu.loop import Loop

Rule: TypeAlias = Callable[[Array, Array, Sequence[Array], Array], None]  # (params, grads, states, work) of one block

# Bytes of a block of one array. Adam touches four arrays and one or two of scratch memory: 640 or 768 KiB. Smaller
# blocks pay for calls into NumPy, larger ones leave the second-level cache. Adam, float32, one core of an AMD EPYC of
# family 26 (1 MiB of second-level cache), ns per element of 530,000 / 2,900,000: 4 KiB 5.3 / 6.2, 32 KiB 1.4 / 1.7,
# 128 KiB 0.92 / 1.2, whole arrays 0.86 / 1.3, and 8.0 / 3.8 written as NumPy expressions over whole arrays.
BLOCK_BYTES = 128 * 1024


class UpdateOperations(Operations):
    """One step of each optimizer: see device.ops.

    Numbers are Python floats: NumPy then computes in the arrays' own type, while a NumPy float64 scalar would turn
    float32 arrays into float64 ones. Loops need numbers of the arrays' type.
    """

    def sgd(self, p: Array, g: Array, numbers: Array, scale: Array | None = None, decay: float = 0.0) -> None:
        (rate,) = numbers.tolist()

        def rule(p: Array, g: Array, states: Sequence[Array], work: Array) -> None:
            np.multiply(g, rate, out=work)
            np.subtract(p, work, out=p)

        real = p.dtype.type
        self._update(p, g, (), scale, decay, rule, lambda p, g, states, work: sgd(p, g, real(rate)))

    def momentum(
        self, p: Array, g: Array, b: Array, numbers: Array, nesterov: bool, scale: Array | None = None,
        decay: float = 0.0,
    ) -> None:  # fmt: skip
        rate, beta, share, ahead = numbers.tolist()

        def rule(p: Array, g: Array, states: Sequence[Array], work: Array) -> None:
            (b,) = states
            np.multiply(b, beta, out=b)
            if share == 1.0:
                np.add(b, g, out=b)
            else:
                np.multiply(g, share, out=work)
                np.add(b, work, out=b)
            if nesterov:
                np.multiply(b, ahead, out=work)
                np.add(g, work, out=work)
                np.multiply(work, rate, out=work)
            else:
                np.multiply(b, rate, out=work)
            np.subtract(p, work, out=p)

        reals = [p.dtype.type(number) for number in (rate, beta, share, ahead)]
        loop = lambda p, g, states, work: momentum(p, g, *states, *reals, nesterov)  # noqa: E731
        self._update(p, g, (b,), scale, decay, rule, loop)

    def adagrad(
        self, p: Array, g: Array, s: Array, numbers: Array, eps: float, scale: Array | None = None, decay: float = 0.0
    ) -> None:
        (rate,) = numbers.tolist()

        def rule(p: Array, g: Array, states: Sequence[Array], work: Array) -> None:
            (s,) = states
            np.multiply(g, g, out=work)
            np.add(s, work, out=s)
            np.sqrt(s, out=work)
            np.add(work, eps, out=work)
            np.divide(g, work, out=work)
            np.multiply(work, rate, out=work)
            np.subtract(p, work, out=p)

        reals = p.dtype.type(rate), p.dtype.type(eps)
        self._update(p, g, (s,), scale, decay, rule, lambda p, g, states, work: adagrad(p, g, *states, *reals))

    def rmsprop(
        self, p: Array, g: Array, s: Array, a: Array | None, b: Array | None, numbers: Array, alpha: float, eps: float,
        beta: float, scale: Array | None = None, decay: float = 0.0,
    ) -> None:  # fmt: skip
        (rate,), rest = numbers.tolist(), 1.0 - alpha

        def rule(p: Array, g: Array, states: Sequence[Array], work: Array) -> None:
            s = states[0]
            np.multiply(g, g, out=work)
            np.multiply(work, rest, out=work)
            np.multiply(s, alpha, out=s)
            np.add(s, work, out=s)
            if a is not None:
                mean = states[1]
                np.subtract(g, mean, out=work)
                np.multiply(work, rest, out=work)
                np.add(mean, work, out=mean)
                np.multiply(mean, mean, out=work)
                np.subtract(s, work, out=work)
                np.sqrt(work, out=work)
            else:
                np.sqrt(s, out=work)
            np.add(work, eps, out=work)
            np.divide(g, work, out=work)
            if b is not None:
                moved = states[-1]
                np.multiply(moved, beta, out=moved)
                np.add(moved, work, out=moved)
                np.multiply(moved, rate, out=work)
            else:
                np.multiply(work, rate, out=work)
            np.subtract(p, work, out=p)

        reals = [p.dtype.type(number) for number in (rate, alpha, rest, eps)]
        plain = a is None and b is None
        loop = (lambda p, g, states, work: rmsprop(p, g, *states, *reals)) if plain else None
        self._update(p, g, [state for state in (s, a, b) if state is not None], scale, decay, rule, loop)

    def adam(
        self, p: Array, g: Array, m: Array, v: Array, numbers: Array, rest1: float, b2: float, rest2: float,
        scale: Array | None = None, decay: float = 0.0,
    ) -> None:  # fmt: skip
        rate, eps, shrink = numbers.tolist()

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

        reals = [p.dtype.type(number) for number in (rate, rest1, b2, rest2, eps, shrink)]
        self._update(p, g, (m, v), scale, decay, rule, lambda p, g, states, work: adam(p, g, *states, *reals))

    def _update(
        self, p: Array, g: Array, states: Sequence[Array], scales: Array | None, decay: float, rule: Rule,
        loop: Rule | None,
    ) -> None:  # fmt: skip
        """Change p and the states by `rule`, or by the equivalent compiled `loop` if there is one and it may be called,
        with the gradients scale * g + decay * p."""
        scale = 1.0 if scales is None else float(scales[0])
        loop = loop if self._tuning.compiled else None
        if loop is not None and scale == 1.0 and not decay:
            loop(p, g, states, p)
            return
        rule, memory, size = loop or rule, self.memory(p.dtype), BLOCK_BYTES // p.dtype.itemsize
        works, decayed = memory.scratch("update", (size,)), memory.scratch("decayed gradients", (size,))
        for block in blocks(len(p), size):
            part, grads = p[block], g[block]
            work = works[: len(part)]
            if scale != 1.0:
                grads = np.multiply(grads, scale, out=decayed[: len(part)])
            if decay:
                np.multiply(part, decay, out=work)
                grads = np.add(grads, work, out=decayed[: len(part)])
            rule(part, grads, [state[block] for state in states], work)


@Loop
def sgd(p: Array, g: Array, rate: float) -> None:
    """p <- p - rate g."""
    for i in range(p.size):
        p[i] -= g[i] * rate


@Loop
def momentum(
    p: Array, g: Array, b: Array, rate: float, beta: float, share: float, ahead: float, nesterov: bool
) -> None:
    """b <- beta b + share g; p <- p - rate b, or with Nesterov p - rate (g + ahead b)."""
    for i in range(p.size):
        moved = b[i] * beta + g[i] * share
        b[i] = moved
        if nesterov:
            moved = g[i] + moved * ahead
        p[i] -= moved * rate


@Loop
def adagrad(p: Array, g: Array, s: Array, rate: float, eps: float) -> None:
    """s <- s + g^2; p <- p - rate g / (sqrt(s) + eps)."""
    for i in range(p.size):
        squares = s[i] + g[i] * g[i]
        s[i] = squares
        p[i] -= g[i] / (np.sqrt(squares) + eps) * rate


@Loop
def rmsprop(p: Array, g: Array, s: Array, rate: float, alpha: float, rest: float, eps: float) -> None:
    """s <- alpha s + rest g^2; p <- p - rate g / (sqrt(s) + eps)."""
    for i in range(p.size):
        squares = s[i] * alpha + g[i] * g[i] * rest
        s[i] = squares
        p[i] -= g[i] / (np.sqrt(squares) + eps) * rate


@Loop
def adam(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    rate: float,
    rest1: float,
    b2: float,
    rest2: float,
    eps: float,
    shrink: float,
) -> None:
    """m <- m + rest1 (g - m); v <- b2 v + rest2 g^2; p <- shrink p - rate m / (sqrt(v) + eps)."""
    for i in range(p.size):
        mean = m[i] + (g[i] - m[i]) * rest1
        squares = v[i] * b2 + g[i] * g[i] * rest2
        m[i] = mean
        v[i] = squares
        p[i] = p[i] * shrink - mean / (np.sqrt(squares) + eps) * rate
