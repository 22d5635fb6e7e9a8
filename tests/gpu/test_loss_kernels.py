"""Kernels of activations and losses give what the CPU device's operations give: bit for bit where they call no function
of the mathematical library and add nothing up."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from tests.gpu.compared import CPU, NAMES, SPECIAL, HostOps, dtype_of, on_both, some
from tests.gpu.host import build

TOTAL = np.array([40.0])  # that a sum is divided by

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="g++ is not installed")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0,), (3, 5), (5, 7, 11), (10_007,)])
def test_activations(host_ops: HostOps, name: str, shape: tuple[int, ...]) -> None:
    x, y, dy = some(name, *shape), some(name, *shape, seed=2), some(name, *shape, seed=3)
    on_both(host_ops, lambda ops, x, y: ops.relu(x, y), x, y)
    on_both(host_ops, lambda ops, x: ops.relu(x, x), x)
    on_both(host_ops, lambda ops, y, dy: ops.relu_grad(y, dy), y, dy)
    for slope in (0.0, 0.01, 1.0):
        on_both(host_ops, lambda ops, x, y, slope=slope: ops.leaky_relu(x, y, slope), x, y)
        on_both(host_ops, lambda ops, y, dy, slope=slope: ops.leaky_relu_grad(y, dy, slope), y, dy)
    on_both(host_ops, lambda ops, y, dy: ops.sigmoid_grad(y, dy), y, dy)
    on_both(host_ops, lambda ops, y, dy: ops.tanh_grad(y, dy), y, dy)
    on_both(host_ops, lambda ops, x, y: ops.sigmoid(x, y), x, y, ulps=4)
    on_both(host_ops, lambda ops, x: ops.sigmoid(x, x), x, ulps=4)
    on_both(host_ops, lambda ops, x, y: ops.tanh(x, y), x, y, ulps=4)


@pytest.mark.parametrize("name", NAMES)
def test_gelu(host_ops: HostOps, name: str) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), SPECIAL]).astype(dtype_of(name))
    wide, step = x.astype(np.float64), {"float32": 2e-7, "float64": 2e-15, "bfloat16": 2**-8}[name]
    for with_slope in (True, False):
        wanted, slopes = np.zeros_like(wide), np.zeros_like(wide) if with_slope else None
        y, slope = host_ops.up(np.zeros_like(x)), host_ops.up(np.zeros_like(x)) if with_slope else None
        with np.errstate(all="ignore"):
            CPU.gelu(wide, wanted, slopes)
        host_ops.gelu(host_ops.up(x), y, slope)
        np.testing.assert_allclose(host_ops.down(y).astype(np.float64), wanted, rtol=step, atol=9 * step)
        if slope is not None and slopes is not None:
            finite = np.abs(wide) < 1e30  # beyond, x^2 may overflow in one type and not in the other
            np.testing.assert_allclose(
                host_ops.down(slope)[finite].astype(float), slopes[finite], rtol=step, atol=9 * step
            )
            np.testing.assert_array_equal(np.isnan(host_ops.down(slope).astype(float)), np.isnan(slopes))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape", [(0, 10), (9, 2), (33, 10), (5, 100), (1, 1000), pytest.param((4100, 3), marks=pytest.mark.long)]
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(host_ops: HostOps, name: str, shape: tuple[int, int], smoothing: float, weighted: bool) -> None:
    rng = np.random.default_rng(4)
    work = np.float64 if name == "float64" else np.float32
    weights = np.where(np.arange(shape[1]) == 1, 0, rng.uniform(0, 3, shape[1])).astype(work) if weighted else None
    wide_weights = None if weights is None else weights.astype(np.float64)
    y = (rng.standard_normal(shape) * 5).astype(dtype_of(name))
    labels = rng.integers(0, shape[1], shape[0])
    if len(y) > 3:
        y[2] = 1.5  # ties: the first counts
        y[3, 1] = y[3, 0] = y[3].max()
        labels[2], labels[3] = 0, 1
    wide = y.astype(np.float64)
    for kind, bad in (("uint8", None), ("int32", None), ("int64", np.nan), ("int64", np.inf)):
        if kind == "uint8" and shape[1] > 256:
            continue
        if bad is not None and len(y) > 5:
            y[5, -1] = wide[5, -1] = bad
        for with_gradient in (True, False):
            metrics, dy = np.array([0.25, 3.0, 0, 0, 0.5]), np.zeros_like(wide) if with_gradient else None
            found, on_device = host_ops.up(metrics), None if weights is None else host_ops.up(weights)
            own = host_ops.up(np.full_like(y, np.nan)) if with_gradient else None
            with np.errstate(all="ignore"):
                CPU.cross_entropy(wide, labels, smoothing, TOTAL, dy, metrics, wide_weights)
            of_rows = host_ops.up(y), host_ops.up(labels.astype(kind))
            host_ops.cross_entropy(*of_rows, smoothing, host_ops.up(TOTAL), own, found, on_device)
            np.testing.assert_allclose(host_ops.down(found), metrics, rtol=1e-12 if name == "float64" else 1e-6)
            if own is not None and dy is not None:
                near = {"float32": 2e-8, "float64": 1e-16, "bfloat16": 1e-4}[name]
                np.testing.assert_allclose(host_ops.down(own).astype(np.float64), dy, rtol=2**-8, atol=near)
        counted, wanted = host_ops.up(np.array([0.25, 3.0])), np.array([0.25, 3.0])
        CPU.count_right(wide, labels, wanted)
        host_ops.count_right(host_ops.up(y), host_ops.up(labels.astype(kind)), counted)
        assert host_ops.down(counted).tolist() == wanted.tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (33, 10), (2100, 7)])
def test_losses_of_elements(host_ops: HostOps, name: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    y, wanted = (rng.standard_normal(shape) * 9).astype(dtype_of(name)), rng.random(shape).astype(dtype_of(name))
    if y.size > 200:
        y.reshape(-1)[:7] = [0, -0.0, 90, -90, 300, -300, 1]
        wanted.reshape(-1)[:9] = [0.5, 0, 1, 1, 0, 0, 0.5, 1, 0]
    for loss, gradient, bad in itertools.product(
        ("binary_cross_entropy", "squared_error"), (True, False), (None, np.inf, np.nan)
    ):
        if bad is not None and y.size > 200:
            y[5, -1] = bad
        wide = y.astype(np.float64)
        metrics, dy = np.array([0.25, 3.0]), np.zeros_like(wide) if gradient else None
        found, own = host_ops.up(metrics), host_ops.up(np.full_like(y, np.nan)) if gradient else None
        with np.errstate(all="ignore"):
            getattr(CPU, loss)(wide, wanted.astype(np.float64), TOTAL, dy, metrics)
        getattr(host_ops, loss)(host_ops.up(y), host_ops.up(wanted), host_ops.up(TOTAL), own, found)
        np.testing.assert_allclose(host_ops.down(found), metrics, rtol=1e-12 if name == "float64" else 2e-6)
        if own is not None and dy is not None:
            near = {"float32": 3e-8, "float64": 1e-16, "bfloat16": 1e-4}[name]
            np.testing.assert_allclose(host_ops.down(own).astype(np.float64), dy, rtol=2**-8, atol=near)
    on_both(host_ops, lambda ops, y, t, metrics: ops.count_same_side(y, t, metrics), y, wanted, np.array([0.25, 3.0]))

    def squared_error(ops: Any, y: Array, wanted: Array, dy: Array, total: Array) -> None:
        ops.squared_error(y, wanted, total, dy, host_ops.up(np.zeros(2)) if ops is host_ops else np.zeros(2))

    on_both(host_ops, squared_error, y, wanted, y, TOTAL)


@pytest.mark.parametrize("name", NAMES)
def test_one_hot(host_ops: HostOps, name: str) -> None:
    for kind in ("uint8", "int32", "int64", "uint16"):
        labels = np.random.default_rng(6).integers(0, 10, 333).astype(kind)
        on_both(host_ops, lambda ops, labels, out: ops.one_hot(labels, out), labels, some(name, 333, 10))
