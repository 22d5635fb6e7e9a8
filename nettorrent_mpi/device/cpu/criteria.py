"""The losses and their gradients on the CPU; nn.losses names their sources.

Suffixes: b rows of a micro-batch, O outputs.
"""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.cpu.flat import Operations
from nettorrent_mpi.device.cpu.loop import Loop
from nettorrent_mpi.device.cpu.tuning import Tuning

FEW = 64  # outputs up to which a compiled loop, with one exponential at a time, is faster than NumPy


class CriterionOperations(Operations):
    """Losses: see device.ops."""

    def __init__(self, tuning: Tuning):
        super().__init__(tuning)
        self._starts: dict[int, Array] = {}  # number of outputs -> start of each row in the flat outputs

    def cross_entropy(
        self, y_bO: Array, labels_b: Array, smoothing: float, total_1: Array, dy_bO: Array | None, metrics: Array,
        weights_O: Array | None = None,
    ) -> None:  # fmt: skip
        (b, outputs), dtype, memory = y_bO.shape, y_bO.dtype, self.memory(y_bO.dtype)
        exp_bO = memory.scratch("exponentials", (b, outputs)) if dy_bO is None else dy_bO
        smooth, share, total = smoothing / outputs, 1.0 - smoothing, float(total_1[0])
        label_b = memory.scratch("index", (b,), np.intp)
        np.copyto(label_b, labels_b, casting="unsafe")
        share_b = memory.scratch("label shares", (b,))  # of the label's log likelihood in the loss of a row
        if weights_O is None:
            share_b.fill(share)
        else:
            np.take(weights_O, label_b, out=share_b, mode="clip")
            metrics[4] += float(np.sum(share_b, dtype=np.float64)) - b
            share_b *= share
        if outputs <= FEW and self._tuning.compiled:
            weights = memory.keep("no weights", (0,)) if weights_O is None else weights_O
            numbers = dtype.type(1.0 / total), dtype.type(smooth)
            loss, right = cross_entropy(y_bO, label_b, share_b, *numbers, weights, exp_bO, dy_bO is not None)
            metrics[0] += float(loss)
            metrics[1] += int(right)
            return
        self.count_right(y_bO, labels_b, metrics)
        index_b = self._places(labels_b, outputs)
        shift_b1 = memory.scratch("shift", (b, 1))
        picked_b, sum_b, loss_b = (memory.scratch(name, (b,)) for name in ("picked", "sum", "row losses"))
        np.max(y_bO, axis=1, keepdims=True, out=shift_b1)
        np.subtract(y_bO, shift_b1, out=exp_bO)
        np.take(exp_bO.reshape(-1), index_b, out=picked_b, mode="clip")
        picked_b *= share_b
        if smoothing:
            if weights_O is None:
                np.sum(exp_bO, axis=1, out=sum_b)
            else:
                np.matmul(exp_bO, weights_O, out=sum_b)
            sum_b *= smooth
            picked_b += sum_b
        np.exp(exp_bO, out=exp_bO)
        np.sum(exp_bO, axis=1, out=sum_b)
        np.log(sum_b, out=loss_b)
        if weights_O is not None:
            whole_b = memory.scratch("whole shares", (b,))  # of all log likelihoods
            np.add(share_b, smooth * np.sum(weights_O), out=whole_b)
            loss_b *= whole_b
        loss_b -= picked_b
        metrics[0] += float(np.sum(loss_b))
        if dy_bO is None:
            return
        sum_b *= total
        exp_bO /= sum_b.reshape(b, 1)
        if weights_O is not None:
            exp_bO *= whole_b.reshape(b, 1)
        if smoothing:
            part = smooth / total
            exp_bO -= part if weights_O is None else weights_O * part
        flat = exp_bO.reshape(-1)
        np.take(flat, index_b, out=picked_b, mode="clip")
        share_b /= total
        picked_b -= share_b
        np.put(flat, index_b, picked_b, mode="clip")

    def binary_cross_entropy(
        self, y_bO: Array, wanted_bO: Array, total_1: Array, dy_bO: Array | None, metrics: Array
    ) -> None:
        memory = self.memory(y_bO.dtype)
        loss_bO, work_bO = (memory.scratch(name, y_bO.shape) for name in ("row losses", "loss work"))
        np.abs(y_bO, out=work_bO)
        np.negative(work_bO, out=work_bO)
        np.exp(work_bO, out=work_bO)  # exp(-|x|)
        if dy_bO is not None:  # s(x) = exp(min(x, 0)) / (1 + exp(-|x|))
            np.minimum(y_bO, 0, out=dy_bO)
            np.exp(dy_bO, out=dy_bO)
            np.add(work_bO, 1, out=loss_bO)
            dy_bO /= loss_bO
            dy_bO -= wanted_bO
            dy_bO *= 1.0 / (y_bO.shape[1] * float(total_1[0]))
        np.log1p(work_bO, out=loss_bO)
        np.maximum(y_bO, 0, out=work_bO)
        loss_bO += work_bO
        np.multiply(wanted_bO, y_bO, out=work_bO)
        loss_bO -= work_bO
        metrics[0] += float(np.sum(loss_bO)) / y_bO.shape[1]

    def squared_error(self, y_bO: Array, wanted_bO: Array, total_1: Array, dy_bO: Array | None, metrics: Array) -> None:
        error_bO = self.memory(y_bO.dtype).scratch("row losses", y_bO.shape) if dy_bO is None else dy_bO
        np.subtract(y_bO, wanted_bO, out=error_bO)
        flat = error_bO.reshape(-1)
        metrics[0] += float(np.dot(flat, flat)) / y_bO.shape[1]
        if dy_bO is not None:
            dy_bO *= 2.0 / (y_bO.shape[1] * float(total_1[0]))

    def one_hot(self, labels_b: Array, out_bO: Array) -> None:
        out_bO.fill(0)
        np.put(out_bO.reshape(-1), self._places(labels_b, out_bO.shape[1]), 1, mode="clip")

    def count_right(self, y_bO: Array, labels_b: Array, metrics: Array) -> None:
        memory = self.memory(y_bO.dtype)
        index_b, largest_b = (memory.scratch(name, labels_b.shape, np.intp) for name in ("index", "largest"))
        right_b = memory.scratch("right", labels_b.shape, np.bool_)
        np.copyto(index_b, labels_b, casting="unsafe")
        np.argmax(y_bO, axis=1, out=largest_b)
        np.equal(index_b, largest_b, out=right_b)
        metrics[1] += np.count_nonzero(right_b)

    def count_same_side(self, y_bO: Array, wanted_bO: Array, metrics: Array) -> None:
        memory = self.memory(y_bO.dtype)
        told_bO, right_bO = (memory.scratch(name, y_bO.shape, np.bool_) for name in ("told", "right"))
        np.greater(y_bO, 0, out=told_bO)
        np.greater(wanted_bO, 0.5, out=right_bO)
        np.equal(told_bO, right_bO, out=right_bO)
        metrics[1] += np.count_nonzero(right_bO)

    def _places(self, labels_b: Array, outputs: int) -> Array:
        """Return the positions of the labels' outputs in the flat outputs, in scratch memory."""
        starts = self._starts.get(outputs)
        if starts is None or len(starts) < len(labels_b):
            starts = self._starts[outputs] = np.arange(len(labels_b), dtype=np.intp) * outputs
        index_b = self.memory(np.intp).scratch("places", labels_b.shape)
        np.copyto(index_b, labels_b, casting="unsafe")
        index_b += starts[: len(labels_b)]
        return index_b


@Loop
def cross_entropy(
    y_bo: Array, labels_b: Array, share_b: Array, scale: float, smooth: float, weights_o: Array, dy_bo: Array,
    gradient: bool,
) -> tuple[float, int]:  # fmt: skip
    """Return (sum of the losses, correct rows); dy <- scale times the gradient. Rounding differs from NumPy's.

    The loss of a row is -share * log p[label] - smooth * sum(w * log p); without weights all w are 1, and so is share +
    smooth * sum(w).
    """
    total, right, weighted, weight = 0.0, 0, weights_o.size > 0, weights_o.sum()
    for b in range(y_bo.shape[0]):
        y, dy, label, share = y_bo[b], dy_bo[b], labels_b[b], share_b[b]
        whole = share + smooth * weight if weighted else y.dtype.type(1)
        largest = 0
        for o in range(1, y.size):
            if y[o] > y[largest] or (np.isnan(y[o]) and not np.isnan(y[largest])):
                largest = o
        right += largest == label
        exps, sums = y.dtype.type(0), y.dtype.type(0)
        for o in range(y.size):
            moved = y[o] - y[largest]
            sums += weights_o[o] * moved if weighted else moved
            dy[o] = np.exp(moved)
            exps += dy[o]
        total += whole * np.log(exps) - share * (y[label] - y[largest]) - smooth * sums
        if gradient:
            factor, part = whole * scale, smooth * scale
            for o in range(y.size):
                dy[o] = dy[o] / exps * factor - (weights_o[o] * part if weighted else part)
            dy[label] -= share * scale
    return total, right
