"""Every layer and composite: gradients against central differences, zero rows, adding up, evaluation, memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from nettorrent_mpi.nn import specs as s
from nettorrent_mpi.nn.backend import Workspace
from nettorrent_mpi.nn.layers.activations import normal_cdf

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
    step = b.passes(x)
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
    whole = b.forward(b.params, x, b.passes(x, training=False))
    single = [b.forward(b.params, row[None], b.passes(row[None], training=False)) for row in x]
    np.testing.assert_allclose(whole, np.concatenate(single), rtol=1e-12, atol=1e-13)
    for key, value in before.items():
        np.testing.assert_array_equal(b.params[key], value)


@pytest.mark.parametrize("case", CASES)
def test_a_workspace_serves_again_and_for_fewer_rows(bench, case):
    b = bench(*CASES[case])
    sequence, workspace = b.sequence(), Workspace(np.float64)
    for rows in (5, 2, 5):
        x, dy = b.data(rows)
        expected = b.run(x, dy)
        params = {key: value.copy() for key, value in b.params.items()}
        grads = {key: np.full_like(value, np.nan) for key, value in expected.grads.items()}
        y, saved = sequence.forward(params, x, workspace, b.passes(x))
        np.testing.assert_array_equal(y, expected.y)
        np.testing.assert_array_equal(
            sequence.backward(params, grads, saved, dy.copy(), workspace, b.passes(x)), expected.dx
        )
        for key, value in expected.grads.items():
            np.testing.assert_array_equal(grads[key], value)


@pytest.mark.parametrize("case", ["mix", "linear relu", "residual with shortcut", "gelu", "batch norm"])
def test_nobody_computes_the_gradient_of_the_first_input(bench, case):
    b = bench(*CASES[case])
    x, dy = b.data(4)
    expected = b.run(x, dy)
    sequence, workspace = b.sequence(), Workspace(np.float64)
    sequence.needs_dx = False
    grads = {key: np.full_like(value, np.nan) for key, value in expected.grads.items()}
    params = {key: value.copy() for key, value in b.params.items()}
    _, saved = sequence.forward(params, x, workspace, b.passes(x))
    assert sequence.backward(params, grads, saved, dy.copy(), workspace, b.passes(x)) is None
    for key, value in expected.grads.items():
        np.testing.assert_array_equal(grads[key], value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_steady_state_allocates_no_arrays(bench, dtype):
    b = bench(MIX, (24, 24, 3), dtype)
    x, dy = b.data(64)
    sequence, workspace = b.sequence(), Workspace(dtype)
    grads = {key: np.zeros_like(value) for key, value in b.params.items()}
    given = dy.copy()

    def train():
        for accumulate in (False, True):
            step = b.passes(x, accumulate=accumulate)
            _, saved = sequence.forward(b.params, x, workspace, step)
            given[...] = dy
            sequence.backward(b.params, grads, saved, given, workspace, step)

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


@pytest.mark.parametrize("spec", [s.Relu(), s.LeakyRelu(), s.Sigmoid(), s.Tanh(), s.Gelu(), s.MaxPool2d(2)])
def test_nan_goes_through(bench, spec):
    b = bench([spec], (4, 4, 2))
    x, _ = b.data(2)
    x[1, 0, 1, 1] = x[0, 3, 2, 0] = np.nan
    y = b.forward({}, x, b.passes(x))
    assert np.isnan(y).sum() == 2


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 4e-16), (np.float32, 1.2e-7)])
def test_the_normal_distribution_is_exact_to_the_last_bits(dtype, bound):
    from math import erfc, sqrt

    x = np.concatenate([np.linspace(-12, 12, 40001), [0.0, 1 / 64, -1 / 64, 1e-30, 1e30, -1e30]]).astype(dtype)
    cdf = np.empty_like(x)
    normal_cdf(x, cdf, Workspace(dtype))
    exact = [0.5 * erfc(-float(v) / sqrt(2)) for v in x]
    np.testing.assert_allclose(cdf, exact, rtol=0, atol=bound)


def test_sigmoid_keeps_its_digits_in_both_tails_without_overflow(bench):
    x = np.array([[-700.0, -40.0, 0.0, 40.0, 800.0]])
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        y = bench([s.Sigmoid()], (5,)).forward({}, x, bench([s.Sigmoid()], (5,)).passes(x))
    np.testing.assert_allclose(y[0], [np.exp(-700.0), np.exp(-40.0), 0.5, 1.0, 1.0], rtol=1e-14)


def test_dropout_chooses_anew_for_each_step_seed_and_layer(bench):
    x = np.ones((4, 200))

    def kept(name: str, **more):
        b = bench([s.Dropout(0.5, name=name)], (200,))
        step = b.passes(x)
        for option, value in more.items():
            setattr(step, option, value)
        return b.forward({}, x, step) > 0

    first = kept("dropout1")
    np.testing.assert_array_equal(first, kept("dropout1"))
    for other in (kept("dropout2"), kept("dropout1", step=6), kept("dropout1", seed=4)):
        assert 0.4 < (first != other).mean() < 0.6


def test_equal_numbers_of_a_window_give_the_gradient_to_the_first(bench):
    b = bench([s.MaxPool2d(2)], (2, 2, 1))
    result = b.run(np.array([1.0, 3.0, 3.0, 3.0]).reshape(1, 2, 2, 1), np.full((1, 1, 1, 1), 2.0))
    np.testing.assert_array_equal(result.dx.ravel(), [0, 2, 0, 0])


def test_windows_of_more_than_256_pixels(bench):
    b = bench([s.MaxPool2d((20, 20))], (20, 20, 1))
    x = np.zeros((1, 20, 20, 1))
    x[0, 19, 17, 0] = 1
    result = b.run(x, np.ones((1, 1, 1, 1)))
    assert np.argwhere(result.dx).tolist() == [[0, 19, 17, 0]]


def test_large_images_are_cut_into_rows(bench):
    """More places than one block of windows takes; the sums of parts have to be those of one product."""
    b = bench([s.Conv2d(3, 3, 1, "same")], (150, 140, 4))
    x, dy = b.data(2)
    result = b.run(x, dy)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    weight = b.params["conv2d1/weight"]
    y, dw = np.zeros(dy.shape) + b.params["conv2d1/bias"], np.zeros_like(weight)
    dx = np.zeros_like(padded)
    for p in range(3):
        for q in range(3):
            seen = padded[:, p : p + 150, q : q + 140]
            y += seen @ weight[p, q]
            dw[p, q] = np.einsum("bhwi,bhwo->io", seen, dy)
            dx[:, p : p + 150, q : q + 140] += dy @ weight[p, q].T
    np.testing.assert_allclose(result.y, y, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(result.grads["conv2d1/weight"], dw, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(result.dx, dx[:, 1:-1, 1:-1], rtol=1e-11, atol=1e-12)


def test_batch_norm_of_one_number_leaves_the_running_variance_finite(bench):
    b = bench([s.BatchNorm()], (3,))
    x, dy = b.data(1)
    result = b.run(x, dy)
    np.testing.assert_allclose(result.params["batch_norm1/running_var"], 0.9 * b.params["batch_norm1/running_var"])


def test_batch_norm_keeps_its_digits_far_from_zero(bench):
    b = bench([s.BatchNorm()], (2,), np.float32)
    x = (1000 + np.random.default_rng(0).standard_normal((4000, 2))).astype(np.float32)
    y = b.forward(b.params, x, b.passes(x))
    exact = (x.astype(float) - x.mean(0, dtype=float)) / np.sqrt(x.astype(float).var(0) + 1e-5)
    scaled = exact * b.params["batch_norm1/weight"] + b.params["batch_norm1/bias"]
    np.testing.assert_allclose(y, scaled, atol=2e-4)


def test_operations_count_products(bench):
    assert bench([s.Linear(7)], (5,)).sequence().operations == 6 * 5 * 7
    assert bench([s.Conv2d(4, 3)], (8, 8, 2)).sequence().operations == 6 * 9 * 2 * 4 * 36
    divided = bench(MIX, (8, 8, 3))
    assert divided.sequence(3, 1).operations >= divided.sequence().operations
