"""Optimizers: against PyTorch, in shares, and without allocating."""

from __future__ import annotations

import gc
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu.updates import BLOCK_BYTES
from nettorrent_mpi.device.device import Kernels, make_device
from nettorrent_mpi.nn.optimizers import Optimizer, make_optimizer
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.specs import Adagrad, Adam, AdamW, Rmsprop, Sgd, Spec

SPECS: list[Spec] = [
    Sgd(),
    Sgd(lr=0.1, weight_decay=0.01),
    Sgd(lr=0.1, momentum=0.9),
    Sgd(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    Sgd(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    Adagrad(),
    Adagrad(lr=0.1, lr_decay=0.05, initial_accumulator=0.2, eps=1e-4, weight_decay=0.1),
    Rmsprop(),
    Rmsprop(lr=0.1, alpha=0.9, eps=1e-3, weight_decay=0.1),
    Rmsprop(momentum=0.9),
    Rmsprop(centered=True, weight_decay=0.1),
    Rmsprop(alpha=0.8, momentum=0.5, centered=True),
    Adam(),
    Adam(lr=0.1, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.1),
    AdamW(),
    AdamW(lr=0.1, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.3),
    AdamW(weight_decay=0.0),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)
BLOCK64 = BLOCK_BYTES // 8


def gradient(params: Array, step: int) -> Array:
    """Some smooth function of the parameters, another one at each step."""
    grads: Array = np.sin(3.0 * params + step) + 0.1 * params
    return grads.astype(params.dtype)


def numbers(optimizer: Optimizer, lr: float, step: int, scale: float | None = None) -> tuple[Array, Array | None]:
    """What the optimizer and clipping tell the device of a step."""
    return np.array(optimizer.numbers(lr, step)), None if scale is None else np.array([scale])


def clip_scale(squares: float, limit: float) -> float:
    scale = np.zeros(1)
    make_device().ops.clip_scale(np.array([squares]), limit, scale)
    return float(scale[0])


def train(
    spec: Spec, start: Array, steps: int, shares: int = 1, scale: float = 1.0, kernels: Kernels = "fastest"
) -> tuple[Array, dict[str, Array]]:
    """Parameters and states after some steps, each share updated on its own as by a rank that holds only this one."""
    params, device = start.copy(), make_device("cpu", kernels)
    cuts = [slice(*span(len(params), shares, index)) for index in range(shares)]
    optimizers = [make_optimizer(spec) for _ in cuts]
    states = [o.init(device, len(params[cut]), params.dtype) for o, cut in zip(optimizers, cuts, strict=True)]
    for step in range(1, steps + 1):
        grads = gradient(params, step)
        before = grads.copy()
        for optimizer, cut, state in zip(optimizers, cuts, states, strict=True):
            told = numbers(optimizer, spec.options()["lr"] / step, step, scale)
            optimizer.update(device.ops, params[cut], grads[cut], state, *told)
        np.testing.assert_array_equal(grads, before)
    return params, {name: np.concatenate([state[name] for state in states]) for name in optimizers[0].states}


def make_torch(torch: Any, spec: Spec, param: Any) -> Any:
    options = spec.options()
    if isinstance(spec, Adagrad):
        options["initial_accumulator_value"] = options.pop("initial_accumulator")
    kind = {"sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop", "adam": "Adam", "adamw": "AdamW"}[spec.kind]
    return getattr(torch.optim, kind)([param], **options)


@every_spec
@pytest.mark.parametrize("limit", [None, 30.0])
def test_equals_pytorch_after_20_steps(spec: Spec, limit: float | None) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch, the reference, is not installed")
    start = np.random.default_rng(3).standard_normal(BLOCK64 + 37)
    param = torch.tensor(start, requires_grad=True)
    reference = make_torch(torch, spec, param)
    optimizer, device = make_optimizer(spec), make_device()
    params, state = start.copy(), optimizer.init(device, len(start), np.float64)
    for step in range(1, 21):
        lr = reference.param_groups[0]["lr"] = spec.options()["lr"] / step
        param.grad = torch.tensor(gradient(param.detach().numpy(), step))
        grads = gradient(params, step)
        scale = 1.0
        if limit is not None:
            torch.nn.utils.clip_grad_norm_([param], limit)
            squares = np.zeros(1)
            device.ops.sum_of_squares(grads, squares)
            scale = clip_scale(squares[0], limit)
            assert scale < 1.0
        reference.step()
        optimizer.update(device.ops, params, grads, state, *numbers(optimizer, lr, step, scale))
    np.testing.assert_allclose(params, param.detach().numpy(), rtol=1e-12, atol=1e-12)
    assert np.abs(params - start).max() > 1e-3


@every_spec
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_division_gives_the_same_bits(spec: Spec, dtype: Any) -> None:
    start = np.random.default_rng(4).standard_normal(2 * BLOCK_BYTES // np.dtype(dtype).itemsize + 11).astype(dtype)
    whole, whole_state = train(spec, start, 5, scale=0.7)
    for shares in (2, 3, 7):
        parts, state = train(spec, start, 5, shares, scale=0.7)
        np.testing.assert_array_equal(parts, whole)
        for name, values in state.items():
            np.testing.assert_array_equal(values, whole_state[name])
    assert whole.dtype == dtype


@every_spec
def test_float32_follows_float64(spec: Spec) -> None:
    start = np.random.default_rng(5).standard_normal(500).astype(np.float32)
    params32, state32 = train(spec, start, 20)
    params64, _ = train(spec, start.astype(np.float64), 20)
    assert all(values.dtype == np.float32 for values in state32.values())
    np.testing.assert_allclose(params32, params64, rtol=1e-4, atol=1e-4)


@every_spec
def test_update_allocates_nothing(spec: Spec) -> None:
    size = 4 * BLOCK_BYTES // 4
    params, grads = np.zeros(size, np.float32), np.ones(size, np.float32)
    optimizer, device = make_optimizer(spec), make_device()
    state = optimizer.init(device, size, np.float32)
    told = [numbers(optimizer, 0.1, step, 0.5) for step in (1, 2, 3)]
    optimizer.update(device.ops, params, grads, state, *told[1])
    gc.collect()
    tracemalloc.start()
    for each, scale in told:
        optimizer.update(device.ops, params, grads, state, each, scale)
        optimizer.update(device.ops, params, grads, state, each)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8192  # a block has 131,072 bytes


def test_an_empty_share_is_fine() -> None:
    for spec in SPECS:
        params, state = train(spec, np.empty(0, np.float32), 2)
        assert params.size == 0
        assert all(values.size == 0 for values in state.values())


def test_clip_scale() -> None:
    assert clip_scale(0.25, 1.0) == 1.0
    assert clip_scale(0.0, 1.0) == 1.0
    assert clip_scale(16.0, 1.0) == pytest.approx(1 / (4 + 1e-6), rel=1e-15)
    assert math.isnan(clip_scale(math.nan, 1.0))


@every_spec
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_compiled_loops_give_the_same_bits(spec: Spec, dtype: Any, scale: float) -> None:
    pytest.importorskip("numba", reason="Numba, which compiles them, is not installed")
    start = np.random.default_rng(3).standard_normal(BLOCK64 + 37).astype(dtype)
    found = [train(spec, start, 5, 2, scale, kernels) for kernels in ("fastest", "numpy")]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    for name, state in found[0][1].items():
        np.testing.assert_array_equal(state, found[1][1][name])
