"""What single layers do with special numbers and sizes: NaN, ties, tails, large images, one row, no rows."""

from __future__ import annotations

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Workspace
from nettorrent_mpi.device.cpu.elementwise import normal_cdf
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.plan import specs as s


@pytest.mark.parametrize("spec", [s.Relu(), s.LeakyRelu(), s.Sigmoid(), s.Tanh(), s.Gelu(), s.MaxPool2d(2)])
def test_nan_goes_through(bench, spec):
    b = bench([spec], (4, 4, 2))
    x, _ = b.data(2)
    x[1, 0, 1, 1] = x[0, 3, 2, 0] = np.nan
    y = b.forward({}, x, b.context(x))
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
        y = bench([s.Sigmoid()], (5,)).forward({}, x, bench([s.Sigmoid()], (5,)).context(x))
    np.testing.assert_allclose(y[0], [np.exp(-700.0), np.exp(-40.0), 0.5, 1.0, 1.0], rtol=1e-14)


def test_dropout_chooses_anew_for_each_step_seed_and_layer(bench):
    x = np.ones((4, 200))

    def kept(name: str, **more):
        b = bench([s.Dropout(0.5, name=name)], (200,))
        step = b.context(x)
        for option, value in more.items():
            setattr(step, option, value)
        return b.forward({}, x, step) > 0

    first = kept("dropout1")
    np.testing.assert_array_equal(first, kept("dropout1"))
    for other in (kept("dropout2"), kept("dropout1", step=np.array([6.0])), kept("dropout1", seed=4)):
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


def test_batch_norm_of_one_number_gives_its_bias_and_moves_nothing(bench):
    b = bench([s.BatchNorm()], (3,))
    x, dy = b.data(1)
    result = b.run(x, dy)
    np.testing.assert_array_equal(result.y[0], b.params["batch_norm1/bias"])
    np.testing.assert_array_equal(result.dx, np.zeros_like(x))
    for key, value in b.params.items():
        np.testing.assert_array_equal(result.params[key], value)


@pytest.mark.parametrize("shape", [(3,), (2, 2, 3)])
def test_batch_norm_of_fewer_rows_than_usual_moves_the_running_statistics_less(bench, shape):
    b = bench([s.BatchNorm(momentum=0.2)], shape)
    x, _ = b.data(4)
    values, count = x.reshape(-1, 3), x.size // 3
    before = {name: b.params[f"batch_norm1/running_{name}"].copy() for name in ("mean", "var")}
    for usual, weight in ((0, 1), (4, 1), (3, 1), (16, (count - 1) / (4 * count - 1))):
        params = {key: value.copy() for key, value in b.params.items()}
        b.forward(params, x, b.context(x, usual=usual))
        for name, seen in (("mean", values.mean(0)), ("var", values.var(0, ddof=1))):
            expected = before[name] + 0.2 * weight * (seen - before[name])
            np.testing.assert_allclose(params[f"batch_norm1/running_{name}"], expected, rtol=1e-12)


def test_batch_norm_of_nothing_moves_nothing(bench):
    b = bench([s.BatchNorm()], (3,))
    result = b.run(*b.data(0))
    for key, value in b.params.items():
        np.testing.assert_array_equal(result.params[key], value)


def test_batch_norm_keeps_its_digits_far_from_zero(bench):
    b = bench([s.BatchNorm()], (2,), np.float32)
    x = (1000 + np.random.default_rng(0).standard_normal((4000, 2))).astype(np.float32)
    y = b.forward(b.params, x, b.context(x))
    exact = (x.astype(float) - x.mean(0, dtype=float)) / np.sqrt(x.astype(float).var(0) + 1e-5)
    scaled = exact * b.params["batch_norm1/weight"] + b.params["batch_norm1/bias"]
    np.testing.assert_allclose(y, scaled, atol=2e-4)


@pytest.mark.parametrize("kernels", ["numpy", "fastest"])
def test_batch_norm_of_parts_far_apart_keeps_its_digits(kernels):
    """Means far from zero, and far from each other: sums of squares less squares of sums would be noise."""
    if kernels == "fastest":
        pytest.importorskip("numba")
    ops, rng = make_device("cpu", kernels).ops, np.random.default_rng(3)
    x = rng.standard_normal((40, 2)) + np.repeat([1e6, 1e6 + 1e-3, 0, -1e6], 10)[:, None] * np.array([1, 1e-9])
    for ends in ([0, 40], [0, 10, 40], [0, 1, 1, 13, 40]):
        parts = np.empty((len(ends) - 1, 5))
        for part, start, stop in zip(parts, ends, ends[1:], strict=False):
            ops.moments(x[start:stop], part)
        mean, scale, running_mean, running_var = np.empty(2), np.empty(2), np.zeros(2), np.ones(2)
        ops.merge_moments(parts, mean, scale, running_mean, running_var, 0.5, 1e-5)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13, atol=1e-9)
        np.testing.assert_allclose(scale, 1 / np.sqrt(x.var(0) + 1e-5), rtol=1e-13)
        np.testing.assert_allclose(running_mean, x.mean(0) / 2, rtol=1e-13, atol=1e-9)
        np.testing.assert_allclose(running_var, (1 + x.var(0, ddof=1)) / 2, rtol=1e-13)
    near = rng.standard_normal((40, 2)) + 1e6  # about one mean, far from zero
    for part, start, stop in zip(parts, ends, ends[1:], strict=False):
        ops.moments(near[start:stop], part)
    ops.merge_moments(parts, mean, scale, running_mean, running_var, 0.0, 1e-5)
    np.testing.assert_allclose(scale, 1 / np.sqrt((near - near.mean(0)).var(0) + 1e-5), rtol=1e-9)


def test_operations_count_products(bench):
    assert bench([s.Linear(7)], (5,)).sequence().operations == 6 * 5 * 7
    assert bench([s.Conv2d(4, 3)], (8, 8, 2)).sequence().operations == 6 * 9 * 2 * 4 * 36
    divided = bench([s.Conv2d(4, 3), s.Flatten(), s.Linear(5)], (8, 8, 2))
    assert divided.sequence(3, 1).operations == divided.sequence().operations > 0
