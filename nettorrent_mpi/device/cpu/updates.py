"""Optimizers' formulas as loops: see nn.optimizers, which names them and their sources. All arrays are flat."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu.loop import Loop


@Loop
def sgd(p: Array, g: Array, rate: float) -> None:
    """p <- p - rate g."""
    for i in range(p.size):
        p[i] -= g[i] * rate


@Loop
def sgd_momentum(p: Array, g: Array, b: Array, rate: float, momentum: float, share: float, nesterov: bool) -> None:
    """b <- momentum b + share g; p <- p - rate b, or with Nesterov p - rate (g + momentum b)."""
    for i in range(p.size):
        moved = b[i] * momentum + g[i] * share
        b[i] = moved
        if nesterov:
            moved = g[i] + moved * momentum
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
