"""A loss measures the error of the network's outputs and gives the gradient that backward starts from.

Formulas are PyTorch's (torch.nn.CrossEntropyLoss, BCEWithLogitsLoss, MSELoss, all with reduction="mean"). Shape legend:
nn/layer.py; N = rows of a data set, k = numbers in one row's float target.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import inf, log

from nettorrent_mpi.device.arrays import Array, DType, Shape
from nettorrent_mpi.device.ops import Ops
from nettorrent_mpi.nn.layer import Context
from nettorrent_mpi.plan.errors import DataError
from nettorrent_mpi.plan.specs import BinaryCrossEntropy, CrossEntropy, MeanSquaredError, Spec


class Loss(ABC):
    """A Loss compares outputs_bO (one row of O numbers per sample; b may be 0) with the targets of the same rows.

    Targets are whole-number labels of shape (b,), or, except for cross-entropy, numbers of shape (b,) or (b, O).
    """

    def forward(
        self, outputs_bO: Array, targets: Array, total_1: Array, ctx: Context, metrics: Array, gradient: bool = True
    ) -> Array | None:
        """Return the gradient of these rows' loss with respect to outputs_bO, which stays unchanged; None without
        `gradient`.

        It is the gradient of the sum of the rows' losses over `total_1` (float64, on the device): the number of rows of
        the whole mini-batch, over all ranks, or with class weights the sum of these rows' weights. It lies in memory of
        ctx.workspace that is valid until this slot is used again. Adds to `metrics` (float64, on the device): [0] the
        sum of the rows' losses, [1] the number of correct rows, [2] the rows, [3] 1 where correctness is not defined,
        [4] the sum of the rows' weights less their number. Targets must have passed `check_targets`. Allocates nothing
        after the first call.
        """
        dy = ctx.workspace.keep("gradient of the loss", outputs_bO.shape) if gradient else None
        self.compare(outputs_bO, targets, total_1, ctx, metrics, dy)
        ctx.ops.increase(metrics[2:], len(targets))
        return dy

    @abstractmethod
    def compare(
        self, outputs_bO: Array, targets: Array, total_1: Array, ctx: Context, metrics: Array, dy: Array | None
    ) -> None:
        """Add to metrics [0], [1], [3] and [4], and write dy where there is one."""

    @abstractmethod
    def check_targets(self, targets: Array, outputs: Shape, most: float = sys.float_info.max) -> None:
        """Raise DataError if one of `targets` (N rows) is invalid for this loss with outputs of shape `outputs` per
        row, whose type holds numbers up to `most`.

        Called once for a whole data set: it reads all targets, and `forward` checks none.
        """

    @abstractmethod
    def of_zeros(self, targets: Array, units: int) -> float:
        """Return the mean loss of a network whose `units` outputs are all 0, where the host can read the weights of
        classes. Targets have passed `check_targets`."""


def make_loss(spec: Spec, weights_O: Array | None = None) -> Loss:
    """Make the loss that `spec` (one of specs.LOSSES) describes. The weights of the classes are what its
    `class_weights` come to for the rows of a data set (None: each weighs 1): on the device, float32, or float64 where
    outputs are."""
    if isinstance(spec, CrossEntropy):
        return _CrossEntropy(spec.label_smoothing, weights_O)
    if isinstance(spec, BinaryCrossEntropy):
        return _BinaryCrossEntropy()
    assert isinstance(spec, MeanSquaredError), spec
    return _MeanSquaredError()


class _CrossEntropy(Loss):
    """Softmax and the negative log likelihood of the label: (1 - e) * -log p_label + e / O * sum(-log p), where e =
    label_smoothing is spread over all O outputs, and each log p is multiplied by the weight of its class. Rows are
    shifted by their largest output, so exp cannot overflow."""

    def __init__(self, label_smoothing: float, weights_O: Array | None):
        self._smoothing, self._weights_O = label_smoothing, weights_O

    def compare(
        self, outputs_bO: Array, targets: Array, total_1: Array, ctx: Context, metrics: Array, dy: Array | None
    ) -> None:
        ctx.ops.cross_entropy(outputs_bO, targets, self._smoothing, total_1, dy, metrics, self._weights_O)

    def check_targets(self, targets: Array, outputs: Shape, most: float = sys.float_info.max) -> None:
        if not are_labels(targets.dtype, targets.ndim):
            raise DataError(
                f"cross_entropy needs whole-number labels of shape (N,), not {targets.dtype} of shape {targets.shape}"
            )
        _check_labels(targets, outputs[-1])

    def of_zeros(self, targets: Array, units: int) -> float:
        if self._weights_O is None:
            return log(units)
        shared, rows = float(self._weights_O.mean()), float(self._weights_O[targets].mean())
        return log(units) * (1 - self._smoothing + self._smoothing * shared / (rows or inf))


class _Elementwise(Loss):
    """The base of losses that compare each output with its own target: the mean over all elements."""

    _name: str
    _range: str
    _least: float
    _most: float

    def compare(
        self, outputs_bO: Array, targets: Array, total_1: Array, ctx: Context, metrics: Array, dy: Array | None
    ) -> None:
        wanted_bO = ctx.workspace.scratch("wanted outputs", outputs_bO.shape)
        if outputs_bO.shape[1] > 1 and are_labels(targets.dtype, targets.ndim):
            ctx.ops.count_right(outputs_bO, targets, metrics)
            ctx.ops.one_hot(targets, wanted_bO)
        else:
            ctx.ops.copy(wanted_bO, targets.reshape(outputs_bO.shape))
            self._count(outputs_bO, wanted_bO, ctx, metrics)
        self._operation(ctx.ops)(outputs_bO, wanted_bO, total_1, dy, metrics)

    def check_targets(self, targets: Array, outputs: Shape, most: float = sys.float_info.max) -> None:
        if outputs[-1] > 1 and are_labels(targets.dtype, targets.ndim):
            _check_labels(targets, outputs[-1])
            return
        if targets.size != len(targets) * outputs[-1]:
            raise DataError(f"targets of shape {targets.shape} do not fit {outputs[-1]} outputs per row")
        least, most = max(self._least, -most), min(self._most, most)
        if targets.size and not (least <= float(targets.min()) and float(targets.max()) <= most):  # also catches nan
            wide = targets.astype("float64")
            row = int((~((wide >= least) & (wide <= most))).argmax()) // outputs[-1]
            wanted = self._range + (f" up to {most:.2g}" if most < self._most else "")
            raise DataError(
                f"the target of row {row} is {targets[row]}, but {self._name} needs {wanted}: correct the data"
            )

    @abstractmethod
    def _operation(self, ops: Ops) -> Callable[[Array, Array, Array, Array | None, Array], None]:
        """Return what adds the loss to the metrics and writes the gradient, from (outputs, wanted, total_1, dy,
        metrics)."""

    def _count(self, outputs_bO: Array, wanted_bO: Array, ctx: Context, metrics: Array) -> None:
        """Count correct rows where the targets are numbers: not defined, unless a loss defines it."""
        ctx.ops.increase(metrics[3:], 1)


class _BinaryCrossEntropy(_Elementwise):
    """Binary cross-entropy: -t log s(x) - (1 - t) log(1 - s(x)) with s the sigmoid, as max(x, 0) - x t + log(1 +
    exp(-|x|)): no overflow.

    A single logit is correct if it is above 0 exactly where the target is above 1/2; with class labels for several
    outputs the largest logit counts; for several float targets correctness is not defined.
    """

    _name, _range, _least, _most = "binary_cross_entropy", "numbers from 0 to 1", 0.0, 1.0

    def of_zeros(self, targets: Array, units: int) -> float:
        return log(2)

    def _operation(self, ops: Ops) -> Callable[[Array, Array, Array, Array | None, Array], None]:
        return ops.binary_cross_entropy

    def _count(self, outputs_bO: Array, wanted_bO: Array, ctx: Context, metrics: Array) -> None:
        if outputs_bO.shape[1] == 1:
            ctx.ops.count_same_side(outputs_bO, wanted_bO, metrics)
        else:
            super()._count(outputs_bO, wanted_bO, ctx, metrics)


class _MeanSquaredError(_Elementwise):
    """Squared error: (x - t)^2. A row is correct if its largest output is the label's; not defined for targets that are
    numbers."""

    _name, _range = "mean_squared_error", "finite numbers"
    _least, _most = -inf, inf

    def of_zeros(self, targets: Array, units: int) -> float:
        if units > 1 and are_labels(targets.dtype, targets.ndim):
            return 1 / units
        return float((targets.astype("float64") ** 2).mean())

    def _operation(self, ops: Ops) -> Callable[[Array, Array, Array, Array | None, Array], None]:
        return ops.squared_error


def are_labels(dtype: DType, ndim: int) -> bool:
    """Whether targets of this type and number of dimensions are labels."""
    return bool(dtype.kind in "iu" and ndim == 1)


def _check_labels(labels: Array, outputs: int) -> None:
    if labels.size and not (labels.min() >= 0 and labels.max() < outputs):
        row = int(((labels < 0) | (labels >= outputs)).argmax())
        raise DataError(
            f"the label of row {row} is {labels[row]}, but the network has {outputs} outputs, for labels 0 to "
            f"{outputs - 1}: give the last layer {max(int(labels.max()) + 1, outputs)} units, or correct the data"
        )
