"""The layers against PyTorch's, in float64: outputs, gradients, running statistics."""

from __future__ import annotations

import numpy as np
import pytest

from nettorrent_mpi.plan import specs as s

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def to_torch(array, *, channels_first=True):
    array = np.moveaxis(array, -1, 1) if channels_first and array.ndim == 4 else array
    return torch.tensor(np.ascontiguousarray(array), requires_grad=True)


def to_numpy(tensor):
    array = tensor.detach().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def compare(result, x, y, dy):
    y.backward(to_torch(dy).detach())
    np.testing.assert_allclose(result.y, to_numpy(y), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(result.dx, to_numpy(x.grad), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("size", [(7, 9), (8, 8)])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("kernel", [1, 2, 3, (5, 3)])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_conv2d(bench, size, stride, kernel, padding):
    b = bench([s.Conv2d(4, kernel, stride, padding)], (*size, 3))
    x, dy = b.data(3)
    kh, kw = s.pair(kernel)
    sh, sw = s.pair(stride)
    tx, bias = to_torch(x), to_torch(b.params["conv2d1/bias"])
    weight = torch.tensor(np.ascontiguousarray(b.params["conv2d1/weight"].transpose(3, 2, 0, 1)), requires_grad=True)
    padded, margin = tx, (0, 0)
    if padding == "same" and kh % 2 and kw % 2:
        margin = (kh // 2, kw // 2)
    elif padding == "same":  # even kernels: what ceil(size / stride) places need, the larger half at the end
        more = [max((-(-n // t) - 1) * t + k - n, 0) for n, t, k in zip(size, (sh, sw), (kh, kw), strict=True)]
        padded = torch.nn.functional.pad(
            tx, (more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2)
        )
    y = torch.nn.functional.conv2d(padded, weight, bias, (sh, sw), margin)
    result = b.run(x, dy)
    compare(result, tx, y, dy)
    np.testing.assert_allclose(
        result.grads["conv2d1/weight"], weight.grad.numpy().transpose(2, 3, 1, 0), rtol=1e-10, atol=1e-11
    )
    np.testing.assert_allclose(result.grads["conv2d1/bias"], bias.grad.numpy(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("size", "stride"), [(2, None), (3, 2), ((3, 2), 1), (2, 3), ((1, 4), None)])
@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pools(bench, kind, size, stride):
    spec, function = {
        "max": (s.MaxPool2d, torch.nn.functional.max_pool2d),
        "avg": (s.AvgPool2d, torch.nn.functional.avg_pool2d),
    }[kind]
    b = bench([spec(size, stride)], (8, 9, 3))
    x, dy = b.data(3)
    x = np.round(x * 2) if kind == "max" else x  # many equal numbers: the first has to win
    tx = to_torch(x)
    compare(b.run(x, dy), tx, function(tx, size, stride), dy)


def test_global_avg_pool(bench):
    b = bench([s.GlobalAvgPool2d()], (5, 4, 3))
    x, dy = b.data(2)
    tx = to_torch(x)
    compare(b.run(x, dy), tx, tx.mean((2, 3)), dy)


@pytest.mark.parametrize("shape", [(5,), (4, 3, 5)])
def test_batch_norm_with_running_statistics(bench, shape):
    b = bench([s.BatchNorm(momentum=0.2)], shape)
    module = (torch.nn.BatchNorm1d if len(shape) == 1 else torch.nn.BatchNorm2d)(5, momentum=0.2, dtype=torch.float64)
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if name != "num_batches_tracked":
                value.copy_(torch.tensor(b.params[f"batch_norm1/{name}"]))
    for _ in range(3):
        x, dy = b.data(6)
        result, tx = b.run(x, dy), to_torch(x)
        module.zero_grad()
        compare(result, tx, module(tx), dy)
        np.testing.assert_allclose(result.grads["batch_norm1/weight"], module.weight.grad.numpy(), rtol=1e-10)
        np.testing.assert_allclose(result.grads["batch_norm1/bias"], module.bias.grad.numpy(), rtol=1e-10)
        b.params = result.params
        for name in ("running_mean", "running_var"):
            np.testing.assert_allclose(b.params[f"batch_norm1/{name}"], getattr(module, name).numpy(), rtol=1e-12)
    module.eval()
    x, dy = b.data(4)
    tx = to_torch(x)
    compare(b.run(x, dy, training=False), tx, module(tx), dy)


@pytest.mark.parametrize("shape", [(6,), (3, 2, 6)])
def test_layer_norm(bench, shape):
    b = bench([s.LayerNorm()], shape)
    x, dy = b.data(4)
    tx = torch.tensor(x, requires_grad=True)
    weight, bias = (to_torch(b.params[f"layer_norm1/{name}"]) for name in ("weight", "bias"))
    y = torch.nn.functional.layer_norm(tx, (6,), weight, bias)
    y.backward(torch.tensor(dy))
    result = b.run(x, dy)
    np.testing.assert_allclose(result.y, y.detach().numpy(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(result.dx, tx.grad.numpy(), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(result.grads["layer_norm1/weight"], weight.grad.numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(result.grads["layer_norm1/bias"], bias.grad.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "function"),
    [
        (s.Relu(), torch.nn.functional.relu),
        (s.LeakyRelu(0.3), lambda x: torch.nn.functional.leaky_relu(x, 0.3)),
        (s.Sigmoid(), torch.sigmoid),
        (s.Tanh(), torch.tanh),
        (s.Gelu(), torch.nn.functional.gelu),
    ],
)
def test_activations(bench, spec, function):
    b = bench([spec], (50,))
    x, dy = b.data(20)
    x *= 5
    x[0, :4] = [0.0, -0.0, 60.0, -60.0]
    tx = to_torch(x)
    compare(b.run(x, dy), tx, function(tx), dy)


def test_linear(bench):
    b = bench([s.Linear(4)], (6,))
    x, dy = b.data(5)
    tx, weight, bias = to_torch(x), to_torch(b.params["linear1/weight"]), to_torch(b.params["linear1/bias"])
    result = b.run(x, dy)
    compare(result, tx, tx @ weight + bias, dy)
    np.testing.assert_allclose(result.grads["linear1/weight"], weight.grad.numpy(), rtol=1e-11)
    np.testing.assert_allclose(result.grads["linear1/bias"], bias.grad.numpy(), rtol=1e-11)
