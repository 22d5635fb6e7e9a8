"""Kernels of optimizers give what the CPU device's operations give, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from tests.gpu.compared import NAMES, HostOps, on_both, some
from tests.gpu.host import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")


RULES: dict[str, tuple[int, Callable[..., None]]] = {  # name -> number of states, call
    "sgd": (0, lambda ops, p, g, n, *more: ops.sgd(p, g, n[:1], *more)),
    "momentum": (1, lambda ops, p, g, n, *more: ops.momentum(p, g, more[0], n[:4], False, *more[1:])),
    "nesterov": (1, lambda ops, p, g, n, *more: ops.momentum(p, g, more[0], n[:4], True, *more[1:])),
    "adagrad": (1, lambda ops, p, g, n, *more: ops.adagrad(p, g, more[0], n[:1], 1e-10, *more[1:])),
    "rmsprop": (1, lambda ops, p, g, n, s, *more: ops.rmsprop(p, g, s, None, None, n[:1], 0.99, 1e-8, 0.0, *more)),
    "centered": (2, lambda ops, p, g, n, s, a, *more: ops.rmsprop(p, g, s, a, None, n[:1], 0.9, 1e-8, 0.0, *more)),
    "moved": (2, lambda ops, p, g, n, s, b, *more: ops.rmsprop(p, g, s, None, b, n[:1], 0.9, 1e-8, 0.8, *more)),
    "both": (3, lambda ops, p, g, n, s, a, b, *more: ops.rmsprop(p, g, s, a, b, n[:1], 0.9, 1e-8, 0.8, *more)),
    "adam": (2, lambda ops, p, g, n, m, v, *more: ops.adam(p, g, m, v, n[4:7], 0.1, 0.999, 0.001, *more)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 1, 1009])
def test_optimizers(host_ops: HostOps, name: str, rule: str, size: int) -> None:
    count, call = RULES[rule]
    kept = "float32" if name == "bfloat16" else name  # of what the gradients change
    p, g, *states = (some(name if seed == 1 else kept, size, seed=seed) for seed in range(2 + count))
    if rule in ("rmsprop", "centered", "moved", "both", "adagrad", "adam"):  # squares
        states[-1 if rule == "adam" else 0] = np.abs(states[-1 if rule == "adam" else 0])
    numbers = np.array([0.01, 0.9, 0.7, 0.8, 0.003, 1e-8, 0.999])
    for scale, decay in itertools.product((None, 1.0, 0.37, np.nan), (0.0, 0.013)):
        scales = None if scale is None else np.array([scale])

        def run(
            ops: Any, p: Array, g: Array, numbers: Array, scales: Array | None, *states: Array, decay: float = decay
        ) -> None:
            call(ops, p, g, numbers, *states, scales, decay)

        on_both(host_ops, run, p, g, numbers, scales, *states)
