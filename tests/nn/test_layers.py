"""Every layer and composite: gradients against central differences, zero rows, adding up, evaluation, memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Workspace
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.nn.layers import registry
from nettorrent_mpi.nn.layers.linear import LinearLayer
from nettorrent_mpi.plan import specs as s

IMAGE = (7, 6, 3)
BLOCK = s.Residual(
    layers=(s.Conv2d(5, 3, 2, "same", bias=False), s.BatchNorm(), s.Relu(), s.Conv2d(5, 3, 1, "same"), s.BatchNorm()),
    shortcut=(s.Conv2d(5, 1, 2, "same", bias=False), s.BatchNorm()),
)
MIX = [
    s.BatchNorm(),
    s.Conv2d(4, 3, 1, "same", activation="relu"),
    s.Dropout(0.3),
    s.MaxPool2d(2),
    s.Residual(layers=(s.LayerNorm(), s.Gelu(), s.Conv2d(4, 3, 1, "same"), s.Tanh(), s.Dropout(0.2))),
    s.Relu(),
    BLOCK,
    s.LeakyRelu(0.1),
    s.AvgPool2d(2, 1),
    s.Flatten(),
    s.Linear(6, activation="sigmoid"),
    s.LayerNorm(),
    s.Linear(3),
]
CASES = {
    "linear": ([s.Linear(5)], (4,)),
    "linear without bias": ([s.Linear(5, bias=False)], (3,)),
    "linear relu": ([s.Linear(6, activation="relu")], (3,)),
    "conv": ([s.Conv2d(4)], IMAGE),
    "conv same": ([s.Conv2d(4, (3, 5), 1, "same")], IMAGE),
    "conv even kernel": ([s.Conv2d(2, (2, 4), 1, "same", bias=False)], IMAGE),
    "conv stride 2": ([s.Conv2d(2, 3, 2, "same")], (8, 7, 2)),
    "conv stride 3, valid": ([s.Conv2d(2, 2, (3, 2))], IMAGE),
    "conv 1x1": ([s.Conv2d(4, 1)], IMAGE),
    "conv 1x1 stride 2": ([s.Conv2d(4, 1, 2)], IMAGE),
    "conv kernel as large as the image": ([s.Conv2d(2, (7, 6))], IMAGE),
    "max pool": ([s.MaxPool2d(2)], IMAGE),
    "max pool overlapping": ([s.MaxPool2d(3, 2)], IMAGE),
    "max pool with gaps": ([s.MaxPool2d((1, 2), 3)], IMAGE),
    "max pool exact tiles": ([s.MaxPool2d((7, 3))], IMAGE),
    "avg pool": ([s.AvgPool2d((2, 3))], IMAGE),
    "avg pool overlapping": ([s.AvgPool2d(3, (1, 2))], IMAGE),
    "global avg pool": ([s.GlobalAvgPool2d()], IMAGE),
    "flatten": ([s.Flatten()], IMAGE),
    "dropout": ([s.Dropout(0.4)], IMAGE),
    "dropout 0": ([s.Dropout(0.0)], IMAGE),
    "batch norm": ([s.BatchNorm()], (4,)),
    "batch norm of images": ([s.BatchNorm()], IMAGE),
    "layer norm": ([s.LayerNorm()], (5,)),
    "layer norm of images": ([s.LayerNorm()], IMAGE),
    "relu": ([s.Relu()], (9,)),
    "leaky relu": ([s.LeakyRelu(0.2)], (9,)),
    "sigmoid": ([s.Sigmoid()], (9,)),
    "tanh": ([s.Tanh()], (9,)),
    "gelu": ([s.Gelu()], (9,)),
    "residual": ([s.Residual(layers=(s.Linear(4, activation="tanh"), s.Linear(4)))], (4,)),
    "residual with shortcut": ([BLOCK], (6, 5, 3)),
    "residual that begins in place": ([s.Linear(4), s.Residual(layers=(s.Dropout(0.5), s.Relu(), s.Linear(4)))], (3,)),
    "residual in a residual": ([s.Residual(layers=(s.Residual(layers=(s.Linear(4), s.Relu())), s.Linear(4)))], (4,)),
    "sigmoid after flatten after tanh": ([s.Conv2d(2, 2), s.Tanh(), s.Flatten(), s.Sigmoid()], IMAGE),
    "dropout after tanh": ([s.Linear(7), s.Tanh(), s.Dropout(0.5), s.Relu()], (3,)),
    "mix": (MIX, (8, 8, 3)),
}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_central_differences(bench, case, rows):
    b = bench(*CASES[case])
    x, dy = b.data(rows)
    result = b.run(x, dy)
    step = b.context(x)
    # Central differences of 1e-6 leave an error near 1e-9, larger where batch norm divides by few numbers' deviation.
    loose = {"rtol": 2e-5, "atol": 2e-5 if rows == 1 else 2e-6}

    def slope(params, x, array, index):
        kept = array[index]
        values = []
        for h in (1e-6, -1e-6):
            array[index] = kept + h
            values.append(float(np.sum(b.forward(params, x, step) * dy)))
        array[index] = kept
        return (values[0] - values[1]) / 2e-6

    numbers = np.random.default_rng(0)

    def check(gradient, params, x, array, what):
        flat = numbers.permutation(array.size)[:40]
        for index in (np.unravel_index(i, array.shape) for i in flat):
            np.testing.assert_allclose(
                gradient[index], slope(params, x, array, index), err_msg=f"{what} at {index}", **loose
            )

    params = {key: value.copy() for key, value in b.params.items()}
    moved = x.copy()
    check(result.dx, params, moved, moved, "dx")
    for key, gradient in result.grads.items():
        check(gradient, params, x, params[key], key)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_written_or_added(bench, case):
    b = bench(*CASES[case])
    x, dy = b.data(3)
    first = b.run(x, dy)
    twice = b.run(x, dy, grads={key: value.copy() for key, value in first.grads.items()})
    for key, value in twice.grads.items():
        np.testing.assert_allclose(value, 2 * first.grads[key], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_no_rows_give_no_rows_and_zero_gradients(bench, case):
    b = bench(*CASES[case])
    x, dy = b.data(0)
    result = b.run(x, dy)
    assert result.y.shape == dy.shape
    assert result.dx is not None
    assert result.dx.shape == x.shape
    for key, value in result.grads.items():
        assert not value.any(), key
    for key, value in result.params.items():
        assert np.isfinite(value).all(), key


@pytest.mark.parametrize("case", CASES)
def test_rows_do_not_influence_each_other_in_evaluation(bench, case):
    b = bench(*CASES[case])
    x, _ = b.data(4)
    before = {key: value.copy() for key, value in b.params.items()}
    whole = b.forward(b.params, x, b.context(x, training=False))
    single = [b.forward(b.params, row[None], b.context(row[None], training=False)) for row in x]
    np.testing.assert_allclose(whole, np.concatenate(single), rtol=1e-12, atol=1e-13)
    for key, value in before.items():
        np.testing.assert_array_equal(b.params[key], value)


@pytest.mark.parametrize("case", CASES)
def test_a_workspace_serves_again_and_for_fewer_rows(bench, case):
    def alike(found, expected):  # not bit for bit: other kernels may be the fastest for another number of rows
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)

    b = bench(*CASES[case])
    sequence, workspace = b.sequence(), Workspace(np.float64)
    for rows in (5, 2, 5):
        x, dy = b.data(rows)
        expected = b.run(x, dy)
        params = {key: value.copy() for key, value in b.params.items()}
        grads = {key: np.full_like(value, np.nan) for key, value in expected.grads.items()}
        ctx = b.context(x)
        ctx.workspace = workspace
        y, saved = sequence.forward(params, x, ctx)
        alike(y, expected.y)
        alike(sequence.backward(params, grads, saved, dy.copy(), ctx), expected.dx)
        for key, value in expected.grads.items():
            alike(grads[key], value)


@pytest.mark.parametrize("case", ["mix", "linear relu", "residual with shortcut", "gelu", "batch norm"])
def test_nobody_computes_the_gradient_of_the_first_input(bench, case):
    b = bench(*CASES[case])
    x, dy = b.data(4)
    expected = b.run(x, dy)
    sequence, ctx = b.sequence(), b.context(x)
    sequence.needs_dx = False
    grads = {key: np.full_like(value, np.nan) for key, value in expected.grads.items()}
    params = {key: value.copy() for key, value in b.params.items()}
    _, saved = sequence.forward(params, x, ctx)
    assert sequence.backward(params, grads, saved, dy.copy(), ctx) is None
    for key, value in expected.grads.items():
        np.testing.assert_array_equal(grads[key], value)


class OtherLinear(LinearLayer):
    """A layer of one's own, which may do more than a linear one."""


@pytest.mark.parametrize(
    ("layers", "shape", "taken"),
    [
        ([s.Linear(6, activation="relu"), s.Linear(4, activation="gelu")], (5,), [1, 0, 0, 0]),
        ([s.Conv2d(3, activation="relu"), s.Flatten(), s.Linear(4, bias=False), s.Relu()], (6, 6, 2), [1, 0, 0, 1, 0]),
        ([s.Linear(6), s.LayerNorm(), s.Relu(), s.Relu(), s.Linear(3), s.Dropout(0.5), s.Relu()], (5,), [0] * 7),
        ([s.Relu(), s.Linear(3), s.Relu(), s.Relu(), s.Linear(2)], (5,), [0, 1, 0, 0, 0]),
        ([s.Conv2d(3, activation="relu"), s.MaxPool2d(2), s.Conv2d(2), s.Relu()], (9, 8, 2), [0, 0, 1, 1, 0]),
        (
            [s.Relu(), s.MaxPool2d(3, 2), s.Conv2d(5, 1), s.Tanh(), s.Relu(), s.MaxPool2d(1)],
            (9, 9, 2),
            [0, 1, 0, 0, 0, 1],
        ),
        (
            [s.Conv2d(4), s.Relu(), s.Relu(), s.MaxPool2d((1, 2)), s.Flatten(), s.Linear(3)],
            (6, 6, 2),
            [1, 0, 0, 1, 0, 0],
        ),
    ],
)
@pytest.mark.parametrize("kernels", ["fastest", "numpy"])
def test_layers_take_the_relu_beside_them(bench, layers, shape, taken, kernels, monkeypatch):
    """They give the same bits as layers of their own, in no more memory."""
    b = bench(layers, shape)
    b.device = make_device("cpu", kernels)
    x, dy = b.data(7)
    found, memory, before = [], [], {key: np.ones_like(value) for key, value in b.params.items()}
    for apart in (False, True):
        sequence, ctx = b.sequence(), b.context(x, accumulate=True)
        assert sequence.takes_relu == taken
        if apart:
            sequence.takes_relu = sequence.passed_over = [False] * len(taken)
        y, saved = sequence.forward(b.params, x.copy(), ctx)
        assert not ctx.relu
        grads = {key: value.copy() for key, value in before.items()}
        dx = sequence.backward(b.params, grads, saved, dy.copy(), ctx)
        assert not ctx.relu
        found.append([y, dx, *grads.values()])
        memory.append(ctx.workspace.bytes)
    assert memory[0] <= memory[1]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(registry, "_makers", {**registry._makers, s.Linear: OtherLinear})
    others = [not isinstance(layer, OtherLinear) for layer in b.sequence().layers]
    assert b.sequence().takes_relu == [a and other for a, other in zip(taken, others, strict=True)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_steady_state_allocates_no_arrays(bench, dtype):
    b = bench(MIX, (24, 24, 3), dtype)
    x, dy = b.data(64)
    sequence, ctx = b.sequence(), b.context(x)
    grads = {key: np.zeros_like(value) for key, value in b.params.items()}
    given = dy.copy()

    def train():
        for ctx.accumulate in (False, True):
            _, saved = sequence.forward(b.params, x, ctx)
            given[...] = dy
            sequence.backward(b.params, grads, saved, given, ctx)

    train()
    train()
    tracemalloc.start()
    try:
        train()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # NumPy's own buffers of 8192 elements, a few at a time, come and go whatever the size of the arrays.
    assert peak < 300_000, f"{peak} bytes; one activation has {64 * 24 * 24 * 4 * np.dtype(dtype).itemsize}"


def test_float32_is_close_to_float64(bench):
    single, double = bench(MIX, (8, 8, 3), np.float32), bench(MIX, (8, 8, 3))
    x, dy = single.data(6)
    a = single.run(x, dy)
    double.params = {key: value.astype(np.float64) for key, value in single.params.items()}
    expected = double.run(x.astype(np.float64), dy.astype(np.float64))
    assert a.y.dtype == np.float32
    np.testing.assert_allclose(a.y, expected.y, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(a.dx, expected.dx, rtol=1e-2, atol=1e-3)
