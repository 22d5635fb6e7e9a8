"""Losses: how wrong the network's outputs are, and the gradient that backward starts from.

Formulas are PyTorch's (torch.nn.CrossEntropyLoss, BCEWithLogitsLoss, MSELoss, all with reduction="mean"). Shape legend:
nn/layer.py; N = rows of a data set, k = numbers in one row's float target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np

from nettorrent_mpi.device.arrays import Array, DType, Shape, Workspace
from nettorrent_mpi.device.cpu import passes
from nettorrent_mpi.device.cpu.loop import compiled
from nettorrent_mpi.plan.errors import ConfigError, DataError, ShapeError
from nettorrent_mpi.plan.specs import BinaryCrossEntropy, CrossEntropy, MeanSquaredError, Spec

FEW = 64  # outputs, up to which a compiled loop, which takes one exponential at a time, beats NumPy
UNKNOWN = -1  # LossResult.correct where right and wrong are not defined


class LossResult(NamedTuple):
    """What the last stage learns from some rows of a mini-batch.

    `loss_sum` is the sum over these rows of the loss of a row, so that the sum over all ranks and micro-batches,
    divided by the rows of the mini-batch, is its mean loss. `correct` counts the rows that were told right, or
    is UNKNOWN. `dy` has the shape of the outputs, lies in the workspace until this slot is used again, and is None if
    it was not asked for.
    """

    loss_sum: float
    correct: int
    dy: Array | None


class Loss(ABC):
    """A loss of outputs_bO (one row of O numbers per sample; b may be 0) and the targets of the same rows.

    Targets are whole-number labels of shape (b,), or, except for cross-entropy, numbers of shape (b,) or (b, O).
    """

    @abstractmethod
    def forward(
        self, outputs_bO: Array, targets: Array, total: int, workspace: Workspace, *, gradient: bool = True
    ) -> LossResult:
        """The loss of these rows and its gradient with respect to outputs_bO, which stays unchanged.

        `dy` is the gradient of the mean over the `total` rows of the whole mini-batch, whoever holds the others.
        Targets have to be such as `check_targets` lets pass. Allocates nothing after the first call.
        """

    @abstractmethod
    def check_targets(self, targets: Array, outputs: Shape) -> None:
        """Raise DataError if one of `targets` (N rows) is none that this loss can have for one row of shape `outputs`.

        Meant for a whole data set, once: it reads all targets, and `forward` checks none.
        """


def make_loss(spec: Spec) -> Loss:
    """The loss that `spec` (one of specs.LOSSES) asks for. Raises ConfigError for an option out of range."""
    if isinstance(spec, CrossEntropy):
        return _CrossEntropy(spec.label_smoothing)
    if isinstance(spec, BinaryCrossEntropy):
        return _BinaryCrossEntropy()
    assert isinstance(spec, MeanSquaredError), spec
    return _MeanSquaredError()


def check_fit(spec: Spec, layer: str, outputs: Shape, target: Shape, dtype: DType, classes: int | None) -> None:
    """Raise ShapeError if the last layer and the data do not fit under the loss `spec`, before anything is trained.

    `layer` is the last layer's name and `outputs` the shape of one row of its outputs; `target` is the shape of one
    row's target (() for labels), `dtype` the targets' type, `classes` how many classes the data has (None: none).
    """
    is_label = _are_labels(np.dtype(dtype), 1 + len(target))
    if len(outputs) != 1:
        shape = " x ".join(map(str, outputs))
        raise ShapeError(
            f"layer {layer}, the last one, gives {shape} numbers per row, but {spec.kind} needs one row of them: "
            "end the network with flatten or global_avg_pool2d and a linear layer"
        )
    units = outputs[0]
    if isinstance(spec, CrossEntropy) and not is_label:
        raise ShapeError(
            f"the targets of the data are {np.dtype(dtype)} of shape {target} per row, but cross_entropy after layer "
            f"{layer} needs one whole-number label per row: store whole numbers, or use mean_squared_error"
        )
    if is_label and classes is not None:
        single_logit = isinstance(spec, BinaryCrossEntropy) and units == 1 and classes == 2
        single_value = isinstance(spec, MeanSquaredError) and units == 1
        if units < classes and not single_logit and not single_value:
            raise ShapeError(
                f"layer {layer}, the last one, has {units} units, but the data has {classes} classes: "
                f"give it {classes} units"
            )
    if not is_label and np.prod(target, dtype=np.int64) != units:
        raise ShapeError(
            f"layer {layer}, the last one, has {units} units, but each row of the data has a target of shape {target}: "
            f"give it {np.prod(target, dtype=np.int64)} units"
        )


class _CrossEntropy(Loss):
    """Softmax and the negative log likelihood of the label: (1 - e) * -log p_label + e / O * sum(-log p), where
    e = label_smoothing is spread over all O outputs. Rows are shifted by their largest output: exp cannot overflow."""

    def __init__(self, label_smoothing: float):
        if not 0.0 <= label_smoothing <= 1.0:
            raise ConfigError(
                f"{label_smoothing} is not between 0 and 1", key="model.loss.cross_entropy.label_smoothing"
            )
        self._smoothing = label_smoothing
        self._labels = _Labels()

    def forward(
        self, outputs_bO: Array, targets: Array, total: int, workspace: Workspace, *, gradient: bool = True
    ) -> LossResult:
        b, outputs = outputs_bO.shape
        if outputs <= FEW and compiled():
            return self._forward_compiled(outputs_bO, targets, total, workspace, gradient)
        correct = self._labels.read(outputs_bO, targets, workspace)
        index_b = self._labels.index_b
        shift_b1 = workspace.scratch("loss_shift", (b, 1), outputs_bO.dtype)
        if gradient:
            exp_bO = workspace.keep("loss_dy", (b, outputs), outputs_bO.dtype)
        else:  # not loss_dy: the last gradient may still be wanted
            exp_bO = workspace.scratch("loss_work", (b, outputs), outputs_bO.dtype)
        picked_b = workspace.scratch("loss_picked", (b,), outputs_bO.dtype)
        sum_b = workspace.scratch("loss_sum", (b,), outputs_bO.dtype)
        loss_b = workspace.scratch("loss_rows", (b,), outputs_bO.dtype)

        np.max(outputs_bO, axis=1, keepdims=True, out=shift_b1)
        np.subtract(outputs_bO, shift_b1, out=exp_bO)
        np.take(exp_bO.reshape(-1), index_b, out=picked_b, mode="clip")
        smooth, picked_share = self._smoothing / outputs, 1.0 - self._smoothing
        if self._smoothing:
            picked_b *= picked_share
            np.sum(exp_bO, axis=1, out=sum_b)
            sum_b *= smooth
            picked_b += sum_b
        np.exp(exp_bO, out=exp_bO)
        np.sum(exp_bO, axis=1, out=sum_b)
        np.log(sum_b, out=loss_b)
        loss_b -= picked_b
        loss_sum = float(np.sum(loss_b))
        if not gradient:
            return LossResult(loss_sum, correct, None)

        sum_b *= total
        exp_bO /= sum_b.reshape(b, 1)
        if self._smoothing:
            exp_bO -= smooth / total
        flat = exp_bO.reshape(-1)
        np.take(flat, index_b, out=picked_b, mode="clip")
        picked_b -= picked_share / total
        np.put(flat, index_b, picked_b, mode="clip")
        return LossResult(loss_sum, correct, exp_bO)

    def _forward_compiled(
        self, outputs_bO: Array, targets: Array, total: int, workspace: Workspace, gradient: bool
    ) -> LossResult:
        """For few outputs, where NumPy would do many small passes."""
        dtype, shape = outputs_bO.dtype, outputs_bO.shape
        labels_b = workspace.scratch("loss_index", shape[:1], np.intp)
        np.copyto(labels_b, targets, casting="unsafe")
        make = workspace.keep if gradient else workspace.scratch
        dy_bO = make("loss_dy" if gradient else "loss_work", shape, dtype)
        numbers = [dtype.type(x) for x in (1.0 / total, self._smoothing / shape[1], 1.0 - self._smoothing)]
        loss_sum, correct = passes.cross_entropy(outputs_bO, labels_b, *numbers, dy_bO, gradient)
        return LossResult(float(loss_sum), int(correct), dy_bO if gradient else None)

    def check_targets(self, targets: Array, outputs: Shape) -> None:
        if not _are_labels(targets.dtype, targets.ndim):
            raise DataError(
                f"cross_entropy needs whole-number labels of shape (N,), not {targets.dtype} of shape {targets.shape}"
            )
        _check_labels(targets, outputs[-1])


class _Elementwise(Loss):
    """What the losses that compare each output with a number of its own have in common: the mean over all elements."""

    def __init__(self) -> None:
        self._labels = _Labels()

    def forward(
        self, outputs_bO: Array, targets: Array, total: int, workspace: Workspace, *, gradient: bool = True
    ) -> LossResult:
        b, outputs = outputs_bO.shape
        wanted_bO = workspace.scratch("loss_wanted", (b, outputs), outputs_bO.dtype)
        if outputs > 1 and _are_labels(targets.dtype, targets.ndim):
            correct = self._labels.read(outputs_bO, targets, workspace)
            wanted_bO.fill(0)
            np.put(wanted_bO.reshape(-1), self._labels.index_b, 1, mode="clip")
        else:
            np.copyto(wanted_bO, targets.reshape(b, outputs), casting="unsafe")
            correct = self._count(outputs_bO, wanted_bO, workspace)
        dy = workspace.keep("loss_dy", (b, outputs), outputs_bO.dtype) if gradient else None
        loss_sum = self._compare(outputs_bO, wanted_bO, dy, workspace)
        if dy is not None:
            dy *= self._slope / (outputs * total)
        return LossResult(loss_sum / outputs, correct, dy)

    def check_targets(self, targets: Array, outputs: Shape) -> None:
        if outputs[-1] > 1 and _are_labels(targets.dtype, targets.ndim):
            _check_labels(targets, outputs[-1])
            return
        if targets.size != len(targets) * outputs[-1]:
            raise DataError(f"targets of shape {targets.shape} do not fit {outputs[-1]} outputs per row")
        if targets.size and not (self._least <= targets.min() and targets.max() <= self._most):  # also catches nan
            row = int(np.flatnonzero(~((targets >= self._least) & (targets <= self._most)))[0]) // outputs[-1]
            raise DataError(
                f"the target of row {row} is {targets[row]}, but {self._name} needs {self._range}: correct the data"
            )

    _name: str
    _range: str
    _least: float
    _most: float
    _slope: float  # dy is this times what _compare writes into it

    @abstractmethod
    def _compare(self, outputs_bO: Array, wanted_bO: Array, dy: Array | None, workspace: Workspace) -> float:
        """The sum of all elements' losses, and the gradient but for a factor. May overwrite wanted_bO."""

    @abstractmethod
    def _count(self, outputs_bO: Array, wanted_bO: Array, workspace: Workspace) -> int:
        """How many rows are right, where the targets are numbers."""


class _BinaryCrossEntropy(_Elementwise):
    """-t log s(x) - (1 - t) log(1 - s(x)) with s the sigmoid, as max(x, 0) - x t + log(1 + exp(-|x|)): no overflow.

    A single logit is right if it is above 0 exactly where the target is above 1/2; with class labels for several
    outputs the largest logit counts; for several float targets `correct` is UNKNOWN.
    """

    _name, _range, _least, _most, _slope = "binary_cross_entropy", "numbers from 0 to 1", 0.0, 1.0, 1.0

    def _compare(self, outputs_bO: Array, wanted_bO: Array, dy: Array | None, workspace: Workspace) -> float:
        loss_bO = workspace.scratch("loss_rows", outputs_bO.shape, outputs_bO.dtype)
        work_bO = workspace.scratch("loss_work", outputs_bO.shape, outputs_bO.dtype)
        np.abs(outputs_bO, out=work_bO)
        np.negative(work_bO, out=work_bO)
        np.exp(work_bO, out=work_bO)  # exp(-|x|)
        if dy is not None:  # s(x) = exp(min(x, 0)) / (1 + exp(-|x|))
            np.minimum(outputs_bO, 0, out=dy)
            np.exp(dy, out=dy)
            np.add(work_bO, 1, out=loss_bO)
            dy /= loss_bO
            dy -= wanted_bO
        np.log1p(work_bO, out=loss_bO)
        np.maximum(outputs_bO, 0, out=work_bO)
        loss_bO += work_bO
        wanted_bO *= outputs_bO
        loss_bO -= wanted_bO
        return float(np.sum(loss_bO))

    def _count(self, outputs_bO: Array, wanted_bO: Array, workspace: Workspace) -> int:
        if outputs_bO.shape[1] != 1:
            return UNKNOWN
        told_bO = workspace.scratch("loss_told", outputs_bO.shape, np.bool_)
        right_bO = workspace.scratch("loss_right", outputs_bO.shape, np.bool_)
        np.greater(outputs_bO, 0, out=told_bO)
        np.greater(wanted_bO, 0.5, out=right_bO)
        np.equal(told_bO, right_bO, out=right_bO)
        return int(np.count_nonzero(right_bO))


class _MeanSquaredError(_Elementwise):
    """(x - t)^2. `correct`: the largest output is the class label's; UNKNOWN for targets that are numbers."""

    _name, _range, _slope = "mean_squared_error", "finite numbers", 2.0
    _least, _most = -float(np.finfo(np.float64).max), float(np.finfo(np.float64).max)

    def _compare(self, outputs_bO: Array, wanted_bO: Array, dy: Array | None, workspace: Workspace) -> float:
        error_bO = wanted_bO if dy is None else dy
        np.subtract(outputs_bO, wanted_bO, out=error_bO)
        flat = error_bO.reshape(-1)
        return float(np.dot(flat, flat))

    def _count(self, outputs_bO: Array, wanted_bO: Array, workspace: Workspace) -> int:
        return UNKNOWN


class _Labels:
    """Where the labels' outputs lie, and how many labels are the largest output."""

    def __init__(self) -> None:
        self._starts: dict[int, Array] = {}  # number of outputs -> where each row begins in the flat outputs
        self.index_b: Array = np.empty(0, np.intp)

    def read(self, outputs_bO: Array, labels_b: Array, workspace: Workspace) -> int:
        """Set index_b, the labels' places in the flat outputs (scratch memory), and return how many are right."""
        b, outputs = outputs_bO.shape
        starts = self._starts.get(outputs)
        if starts is None or len(starts) < b:
            starts = self._starts[outputs] = np.arange(b, dtype=np.intp) * outputs
        index_b = workspace.scratch("loss_index", (b,), np.intp)
        largest_b = workspace.scratch("loss_largest", (b,), np.intp)
        right_b = workspace.scratch("loss_right", (b,), np.bool_)
        np.copyto(index_b, labels_b, casting="unsafe")
        np.argmax(outputs_bO, axis=1, out=largest_b)
        np.equal(index_b, largest_b, out=right_b)
        index_b += starts[:b]
        self.index_b = index_b
        return int(np.count_nonzero(right_b))


def _are_labels(dtype: np.dtype[np.generic], ndim: int) -> bool:
    return dtype.kind in "iu" and ndim == 1


def _check_labels(labels: Array, outputs: int) -> None:
    if labels.size and not (labels.min() >= 0 and labels.max() < outputs):
        row = int(np.flatnonzero((labels < 0) | (labels >= outputs))[0])
        raise DataError(
            f"the label of row {row} is {labels[row]}, but the network has {outputs} outputs, for labels 0 to "
            f"{outputs - 1}: give the last layer {max(int(labels.max()) + 1, outputs)} units, or correct the data"
        )
