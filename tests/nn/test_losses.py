"""Losses: against finite differences, against PyTorch, in parts, and what they refuse."""

from __future__ import annotations

import gc
import tracemalloc
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.nn.fit import check_end, check_fit, has_accuracy, out_of_reach
from nettorrent_mpi.nn.layer import Context
from nettorrent_mpi.nn.layers.sequence import expanded, named
from nettorrent_mpi.nn.losses import Loss, make_loss
from nettorrent_mpi.plan.errors import ConfigError, DataError, ShapeError
from nettorrent_mpi.plan.specs import (
    BatchNorm,
    BinaryCrossEntropy,
    Conv2d,
    CrossEntropy,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    LayerSpec,
    Linear,
    MeanSquaredError,
    Residual,
    Spec,
    Tanh,
)

ROWS = 7
SMOOTHED = CrossEntropy(label_smoothing=0.1)
CASES = [
    pytest.param(CrossEntropy(), 5, "labels", id="cross_entropy"),
    pytest.param(SMOOTHED, 5, "labels", id="smoothed"),
    pytest.param(BinaryCrossEntropy(), 1, "bits", id="bce-single"),
    pytest.param(BinaryCrossEntropy(), 1, "bits_column", id="bce-single-column"),
    pytest.param(BinaryCrossEntropy(), 5, "labels", id="bce-one-hot"),
    pytest.param(BinaryCrossEntropy(), 3, "fractions", id="bce-several"),
    pytest.param(MeanSquaredError(), 1, "numbers", id="mse-single"),
    pytest.param(MeanSquaredError(), 5, "labels", id="mse-one-hot"),
    pytest.param(MeanSquaredError(), 3, "numbers", id="mse-several"),
]


class Found(NamedTuple):
    """Found holds what a loss adds to the metrics, and the gradient."""

    loss_sum: float
    correct: float
    rows: float
    unknown: float
    dy: Array | None


def context(dtype: Any = np.float64) -> Context:
    device = make_device()
    return Context(device.ops, device.workspace(dtype))


def score(
    loss: Loss, outputs: Array, targets: Array, total: int, ctx: Context | None = None, gradient: bool = True
) -> Found:
    metrics = np.zeros(5)
    dy = loss.forward(outputs, targets, np.array([float(total)]), ctx or context(), metrics, gradient)
    assert metrics[4] == 0
    return Found(*metrics[:4].tolist(), dy)


def make_targets(kind: str, rows: int, outputs: int) -> Array:
    rng = np.random.default_rng(1)
    if kind == "labels":
        return rng.integers(0, outputs, rows).astype(np.uint8)
    if kind == "bits":
        return rng.integers(0, 2, rows)
    if kind == "bits_column":
        return rng.integers(0, 2, (rows, 1)).astype(np.float32)
    shape = (rows,) if outputs == 1 else (rows, outputs)
    return rng.random(shape) if kind == "fractions" else rng.standard_normal(shape)


def make_outputs(rows: int, outputs: int) -> Array:
    return np.random.default_rng(2).standard_normal((rows, outputs)) * 3


@pytest.mark.parametrize(("spec", "outputs", "kind"), CASES)
def test_gradient_is_the_finite_difference(spec: Spec, outputs: int, kind: str) -> None:
    loss, ctx = make_loss(spec), context()
    x, targets = make_outputs(ROWS, outputs), make_targets(kind, ROWS, outputs)
    total = 11  # rows of the whole mini-batch, the others held elsewhere
    dy = score(loss, x, targets, total, ctx).dy
    assert dy is not None
    for place in np.ndindex(x.shape):
        sums = []
        for shift in (1e-5, -1e-5):
            moved = x.copy()
            moved[place] += shift
            sums.append(score(loss, moved, targets, total, ctx, gradient=False).loss_sum)
        assert dy[place] == pytest.approx((sums[0] - sums[1]) / 2e-5 / total, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("spec", "outputs", "kind"), CASES)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_equals_pytorch(spec: Spec, outputs: int, kind: str, scale: float) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch, the reference, is not installed")
    x, targets = make_outputs(ROWS, outputs) * scale, make_targets(kind, ROWS, outputs)
    tensor = torch.tensor(x, requires_grad=True)
    if isinstance(spec, CrossEntropy):
        wanted = torch.tensor(targets.astype(np.int64))
        expected = torch.nn.CrossEntropyLoss(label_smoothing=spec.label_smoothing)(tensor, wanted)
    else:
        dense = np.eye(outputs)[targets] if kind == "labels" else targets.reshape(x.shape).astype(np.float64)
        module = torch.nn.BCEWithLogitsLoss() if isinstance(spec, BinaryCrossEntropy) else torch.nn.MSELoss()
        expected = module(tensor, torch.tensor(dense))
    expected.backward()
    result = score(make_loss(spec), x, targets, ROWS)
    assert result.dy is not None
    assert result.loss_sum / ROWS == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(result.dy, tensor.grad.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("outputs", [5, 100])  # a compiled loop, and NumPy
def test_class_weights_are_pytorchs(outputs: int, smoothing: float, scale: float) -> None:
    """A mini-batch that is cut in two divides by the sum of the whole one's weights."""
    torch = pytest.importorskip("torch", reason="PyTorch, the reference, is not installed")
    x, targets = make_outputs(ROWS, outputs) * scale, make_targets("labels", ROWS, outputs)
    weights = np.random.default_rng(3).uniform(0, 3, outputs)
    weights[targets[2]] = 0
    tensor = torch.tensor(x, requires_grad=True)
    module = torch.nn.CrossEntropyLoss(torch.tensor(weights), label_smoothing=smoothing)
    expected = module(tensor, torch.tensor(targets.astype(np.int64)))
    expected.backward()
    loss, total = make_loss(CrossEntropy(smoothing), weights), weights[targets].sum(keepdims=True)
    metrics, parts = np.zeros(5), []
    for part in (slice(0, 3), slice(3, 3), slice(3, ROWS)):
        parts.append(loss.forward(x[part], targets[part], total, context(), metrics))
        assert loss.forward(x[part], targets[part], np.ones(1), context(), np.zeros(5), gradient=False) is None
    assert metrics[2] + metrics[4] == pytest.approx(total[0], rel=1e-14)
    assert metrics[0] / total[0] == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(np.concatenate(parts), tensor.grad.numpy(), rtol=1e-11, atol=1e-15)
    nothing = loss.forward(x, targets, np.full(1, np.inf), context(), np.zeros(5))
    assert nothing is not None
    assert not nothing.any(), "of a mini-batch whose rows weigh nothing"
    metrics[:] = 0
    loss.forward(x * 0, targets, np.ones(1), context(), metrics, gradient=False)
    assert loss.of_zeros(targets, outputs) == pytest.approx(metrics[0] / total[0], rel=1e-12)


@pytest.mark.parametrize(("spec", "outputs", "kind"), CASES)
def test_parts_add_up_and_outputs_stay(spec: Spec, outputs: int, kind: str) -> None:
    loss = make_loss(spec)
    x, targets = make_outputs(ROWS, outputs), make_targets(kind, ROWS, outputs)
    before = x.copy()
    whole = score(loss, x, targets, ROWS)
    cuts = [slice(0, 3), slice(3, 3), slice(3, 7)]
    parts = [score(loss, x[cut], targets[cut], ROWS) for cut in cuts]
    assert sum(part.loss_sum for part in parts) == pytest.approx(whole.loss_sum, rel=1e-13)
    assert sum(part.correct for part in parts) == whole.correct
    assert [part.rows for part in parts] == [3, 0, 4]
    assert {part.unknown for part in parts} == {whole.unknown}
    assert parts[1].loss_sum == 0.0
    assert parts[1].dy is not None
    assert parts[1].dy.shape == (0, outputs)
    assert whole.dy is not None
    np.testing.assert_allclose(np.concatenate([p.dy for p in parts if p.dy is not None]), whole.dy, rtol=1e-13)
    without = score(loss, x, targets, ROWS, gradient=False)
    assert without == whole._replace(dy=None)
    np.testing.assert_array_equal(x, before)


def test_correct_rows() -> None:
    x = np.array([[3.0, 1.0, 2.0], [0.0, 1.0, 5.0], [0.0, 1.0, -5.0]])
    labels = np.array([0, 1, 1])
    for spec in (CrossEntropy(), BinaryCrossEntropy(), MeanSquaredError()):
        assert score(make_loss(spec), x, labels, 3)[1:4] == (2, 3, 0)
    logits = np.array([[3.0], [-1.0], [2.0], [-2.0]])
    bits = np.array([1.0, 0.0, 0.0, 1.0])
    assert score(make_loss(BinaryCrossEntropy()), logits, bits, 4)[1:4] == (2, 4, 0)
    assert score(make_loss(BinaryCrossEntropy()), logits, bits.astype(int), 4)[1:4] == (2, 4, 0)
    assert score(make_loss(BinaryCrossEntropy()), x, x * 0, 3)[1:4:2] == (0, 1)
    assert score(make_loss(MeanSquaredError()), logits, bits, 4)[1:4:2] == (0, 1)


@pytest.mark.parametrize(("spec", "outputs", "kind"), CASES)
def test_float32_stays_float32_and_the_steady_state_allocates_nothing(spec: Spec, outputs: int, kind: str) -> None:
    loss, ctx, rows = make_loss(spec), context(np.float32), 65536
    x = make_outputs(rows, outputs).astype(np.float32)
    targets = make_targets(kind, rows, outputs)
    first = score(loss, x, targets, rows, ctx)
    assert first.dy is not None
    assert first.dy.dtype == np.float32
    exact = score(loss, x.astype(np.float64), targets, rows)
    assert first.loss_sum == pytest.approx(exact.loss_sum, rel=1e-5)
    score(loss, x, targets, rows, ctx, gradient=False)
    score(loss, x[:100], targets[:100], rows, ctx)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for part in (slice(None), slice(0, 100)):
        score(loss, x[part], targets[part], rows, ctx)
    score(loss, x, targets, rows, ctx, gradient=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - before < rows  # less than one byte a row: no array, only NumPy's iteration buffer of 8192 elements


@pytest.mark.parametrize(
    ("spec", "targets", "outputs", "message"),
    [
        (CrossEntropy(), np.array([0, 9, 10, 3]), 10, "label of row 2 is 10, but the network has 10 outputs"),
        (CrossEntropy(), np.array([0, -1]), 10, "label of row 1 is -1"),
        (CrossEntropy(), np.array([0.0, 1.0]), 10, "needs whole-number labels"),
        (MeanSquaredError(), np.array([0, 4]), 3, "label of row 1 is 4"),
        (MeanSquaredError(), np.array([[0.0, 1.0], [np.nan, 1.0]]), 2, "target of row 1"),
        (MeanSquaredError(), np.array([[0.0, 1.0], [0.0, 1.0]]), 3, "do not fit 3 outputs"),
        (BinaryCrossEntropy(), np.array([0, 1, 2]), 1, "target of row 2 is 2"),
    ],
)
def test_impossible_targets_are_refused(spec: Spec, targets: Array, outputs: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_loss(spec).check_targets(targets, (outputs,))


@pytest.mark.parametrize(("spec", "outputs", "kind"), CASES)
def test_possible_targets_pass(spec: Spec, outputs: int, kind: str) -> None:
    targets = make_targets(kind, ROWS, outputs)
    make_loss(spec).check_targets(targets, (outputs,))
    make_loss(spec).check_targets(targets[:0], (outputs,))
    classes = {"labels": outputs, "bits": 2}.get(kind)
    check_fit(spec, "linear3", (outputs,), targets.shape[1:], targets.dtype, classes)


@pytest.mark.parametrize(("spec", "outputs", "kind"), [case for case in CASES if case.id != "smoothed"])
def test_the_loss_of_zeros(spec: Spec, outputs: int, kind: str) -> None:
    targets, loss = make_targets(kind, ROWS, outputs), make_loss(spec)
    found = score(loss, np.zeros((ROWS, outputs)), targets, ROWS)
    assert loss.of_zeros(targets, outputs) == pytest.approx(found.loss_sum / ROWS, rel=1e-12)


@pytest.mark.parametrize(("spec", "outputs", "kind"), CASES)
def test_accuracy_is_defined_where_rows_are_counted(spec: Spec, outputs: int, kind: str) -> None:
    targets = make_targets(kind, ROWS, outputs)
    found = score(make_loss(spec), np.zeros((ROWS, outputs)), targets, ROWS)
    classes = {"labels": max(outputs, 2), "bits": 2}.get(kind)
    assert has_accuracy(spec, outputs, classes) == (found.unknown == 0)


def test_a_last_layer_that_does_not_fit_is_refused() -> None:
    for spec in (CrossEntropy(), BinaryCrossEntropy(), MeanSquaredError()):
        with pytest.raises(ShapeError, match=r"linear2.* 5 units, but the data has 10 classes: give it 10 units"):
            check_fit(spec, "linear2", (5,), (), np.uint8, 10)
    with pytest.raises(ShapeError, match="conv2d4, the last one, gives 8 x 8 x 3"):
        check_fit(CrossEntropy(), "conv2d4", (8, 8, 3), (), np.uint8, 10)
    with pytest.raises(ShapeError, match=r"linear2.*needs one whole-number label"):
        check_fit(CrossEntropy(), "linear2", (5,), (5,), np.float32, None)
    with pytest.raises(ShapeError, match=r"linear2.* 5 units.* shape \(4,\): give it 4 units"):
        check_fit(MeanSquaredError(), "linear2", (5,), (4,), np.float32, None)
    with pytest.raises(ShapeError, match="give it 3 units"):
        check_fit(BinaryCrossEntropy(), "linear2", (1,), (), np.uint8, 3)


HIDDEN = Linear(8, activation="relu", name="linear1")


@pytest.mark.parametrize(
    ("spec", "end", "classes", "told"),
    [
        (
            BinaryCrossEntropy(),
            [Linear(1, activation="sigmoid")],
            2,
            "linear2.sigmoid .* 0 to 1, .* sigmoid itself",
        ),
        (CrossEntropy(), [Linear(5, activation="sigmoid")], 5, "linear2.sigmoid .* the softmax itself: leave sigmoid"),
        (CrossEntropy(), [Linear(5), Tanh(name="squash")], 5, "layer squash comes last and gives numbers from -1 to 1"),
        (CrossEntropy(), [Linear(5, activation="relu")], 5, "linear2.relu .* from 0 on"),
        (CrossEntropy(), [Linear(5, activation="gelu")], 5, "leave gelu out"),
        (CrossEntropy(), [Conv2d(5, activation="relu"), Flatten()], 5, "conv2d1.relu"),
        (CrossEntropy(), [Conv2d(5, activation="sigmoid"), GlobalAvgPool2d()], 5, "conv2d1.sigmoid"),
        (BinaryCrossEntropy(), [Conv2d(1, activation="relu"), GlobalAvgPool2d()], 2, "conv2d1.relu"),
        (CrossEntropy(), [Linear(5), Dropout(0.5)], 5, "dropout1 comes last and sets outputs to 0 at random"),
        (MeanSquaredError(), [Linear(1), Dropout(0.5)], None, "before the last layer with weights"),
        (CrossEntropy(), [Linear(5, activation="relu"), Dropout(0.0)], 5, "linear2.relu"),
        (
            MeanSquaredError(),
            [Linear(1, activation="sigmoid")],
            3,
            "linear2.sigmoid .* targets .* go from 0 to 2",
        ),
    ],
)
def test_an_end_that_the_loss_does_not_take_is_refused(
    spec: Spec, end: list[LayerSpec], classes: int | None, told: str
) -> None:
    units = 1 if classes in (None, 2) or isinstance(spec, MeanSquaredError) else 5
    with pytest.raises(ConfigError, match=told):
        check_end(spec, expanded(named([HIDDEN, *end])), units, classes)


@pytest.mark.parametrize(
    ("spec", "end", "classes"),
    [
        (CrossEntropy(), [Linear(5, activation="leaky_relu")], 5),
        (CrossEntropy(), [Dropout(0.5), Linear(5), BatchNorm()], 5),
        (CrossEntropy(), [Conv2d(5, activation="relu"), GlobalAvgPool2d()], 5),
        (CrossEntropy(), [Residual((Linear(5, activation="relu"),), (Linear(5),))], 5),
        (CrossEntropy(), [Linear(5), Dropout(0.0)], 5),
        (MeanSquaredError(), [Linear(5, activation="sigmoid")], 5),
        (MeanSquaredError(), [Linear(5, activation="tanh")], None),
        (MeanSquaredError(), [Linear(5, activation="relu")], 5),
    ],
)
def test_an_end_that_the_loss_takes_passes(spec: Spec, end: list[LayerSpec], classes: int | None) -> None:
    check_end(spec, expanded(named([HIDDEN, *end])), 5, classes)


def test_targets_that_an_activation_cannot_reach() -> None:
    layers = expanded(named([Linear(1, activation="tanh")]))
    assert out_of_reach(MeanSquaredError(), layers, -1, 1) is None
    text = out_of_reach(MeanSquaredError(), layers, -0.5, 1.5)
    assert text is not None
    assert "linear1.tanh comes last and gives numbers from -1 to 1" in text
    assert "targets of mean_squared_error go from -0.5 to 1.5: leave tanh out, or scale the targets" in text


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_targets_of_any_type_are_checked_without_a_warning(dtype: type) -> None:
    loss = make_loss(MeanSquaredError())
    targets = np.ones((4, 2), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.check_targets(targets, (2,))
        targets[3, 1] = np.nan
        with pytest.raises(DataError, match=r"row 3 is \[ *1. nan\], but mean_squared_error needs finite"):
            loss.check_targets(targets, (2,))
        with pytest.raises(DataError, match=r"row 0 is .* needs finite numbers up to 0\.5"):
            loss.check_targets(targets, (2,), 0.5)
