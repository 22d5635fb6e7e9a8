"""Layers give the same with NumPy alone as with the fastest kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.device import Kernels, make_device
from nettorrent_mpi.plan import specs

EACH: tuple[Kernels, Kernels] = ("numpy", "fastest")

LAYERS: dict[str, tuple[list[specs.LayerSpec], tuple[int, ...], bool]] = {  # layers, a row's shape, are the bits alike?
    "relu": ([specs.Linear(units=7, activation="relu")], (5,), False),  # sums of the bias are added in another order
    "sigmoid": ([specs.Linear(units=7), specs.Sigmoid()], (5,), False),
    "pool": ([specs.MaxPool2d(size=2)], (6, 8, 5), True),
    "pool with a rest": ([specs.MaxPool2d(size=3)], (8, 7, 2), True),
    "pool that overlaps": ([specs.MaxPool2d(size=3, stride=2)], (9, 7, 4), False),
    "dropout": ([specs.Dropout(rate=0.4)], (6, 5, 3), True),
    "batch norm": ([specs.BatchNorm()], (5, 4, 3), False),
    "batch norm of vectors": ([specs.BatchNorm()], (11,), False),
    "network": (
        [
            specs.Conv2d(filters=6, kernel=3, padding="same", activation="relu"),
            specs.BatchNorm(),
            specs.MaxPool2d(size=2),
            specs.Dropout(rate=0.2),
            specs.Flatten(),
            specs.Linear(units=3),
        ],
        (6, 6, 2),
        False,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_layers_are_alike_with_numpy_alone(name: str, training: bool, bench: Callable[..., Any]) -> None:
    pytest.importorskip("numba", reason="Numba is not installed: NumPy is alone anyway")
    layers, shape, same_bits = LAYERS[name]
    made = bench(layers, shape)
    x, dy = made.data(70)  # more rows than are added up in one type
    x[3, ..., 0] = 0.25  # equal numbers in one window
    found = []
    for kernels in EACH:
        made.device = make_device("cpu", kernels)
        if training:
            result = made.run(x, dy)
            found.append([result.y, result.dx, *result.grads.values(), *result.params.values()])
        else:
            found.append([made.forward(made.params, x, made.context(x, False))])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0 if same_bits else 1e-11, atol=0 if same_bits else 1e-12)


def test_nan_goes_through_a_pool(bench: Callable[..., Any]) -> None:
    made = bench([specs.MaxPool2d(size=2)], (4, 4, 3))
    x, dy = made.data(2)
    x[0, 0, 0, 0] = x[0, 3, 3, 1] = x[1, 0, 1, 2] = np.nan
    found = []
    for kernels in EACH:
        made.device = make_device("cpu", kernels)
        found.append(made.run(x, dy).y)
    np.testing.assert_array_equal(*found)
    assert np.isnan(found[0]).sum() == 3


@pytest.mark.parametrize("kernels", EACH)
@pytest.mark.parametrize(("size", "stride"), [(2, None), ((2, 2), (1, 3)), (3, 2), ((1, 3), None), ((16, 16), None)])
def test_a_pool_with_the_relu_before_it_gives_what_both_do(
    size: Any, stride: Any, kernels: Kernels, bench: Callable[..., Any]
) -> None:
    """Windows with ties, without a number above 0, and with NaN in any place have the same outputs and gradients."""
    made = bench([specs.Relu(), specs.MaxPool2d(size, stride)], (17, 16, 5), np.float32)
    made.device = make_device("cpu", kernels)
    rng = np.random.default_rng(1)
    x, dy = made.data(6)
    x[...] = rng.integers(-3, 3, x.shape)
    x[rng.random(x.shape) < 0.1] = np.nan
    x[0] = -1
    found = []
    for apart in (False, True):
        sequence, ctx = made.sequence(), made.context(x)
        assert sequence.takes_relu == [False, True]
        if apart:
            sequence.takes_relu = sequence.passed_over = [False, False]
        y, saved = sequence.forward({}, x.copy(), ctx)
        dx = sequence.backward({}, {}, saved, dy.copy(), ctx)
        found.append((y.copy(), dx.copy(), sequence.forward({}, x.copy(), made.context(x, False))[0].copy()))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (found[0][1] != 0).any()
