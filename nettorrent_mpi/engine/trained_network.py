"""A TrainedNetwork answers for new rows, in one process.

import nettorrent_mpi as nt

network = nt.load("runs/cifar")                # or its model.h5, or a checkpoint
labels = network.predict(images)               # (rows,), from 0 on
names = [network.classes[label] for label in labels]
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nettorrent_mpi.data.from_arrays import unlabelled
from nettorrent_mpi.data.rows import BYTE, Split
from nettorrent_mpi.data.scaling import Scaling
from nettorrent_mpi.device.arrays import Array, Shape, Workspace, quiet
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.answers import Answers
from nettorrent_mpi.engine.saved_network import SavedArrays, SavedNetwork
from nettorrent_mpi.nn.layer import Context
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.errors import DataError, UserError

MOST_ROWS, MOST_BYTES = 256, 64 << 20  # of a block: the activations of all layers lie in memory at a time


def load(run: str | Path) -> TrainedNetwork:
    """Return the network of a run. It needs no MPI, no GPU, and not the data that it was trained on.

    run: the run's folder (its model.h5, or its newest checkpoint where the run has not ended), a file model.h5, or a
    checkpoint's folder. Raises DataError for what is missing, damaged or not the package's, UserError for a layer
    of your own that is not registered yet.
    """
    return TrainedNetwork(SavedNetwork.of(SavedArrays.read(Path(run)), for_others=False))


class TrainedNetwork:
    """A TrainedNetwork gives the answers of a network that was trained, computed by this process alone.

    classes: the name of each class, its number where nobody has named it; empty where the targets were numbers.
    shape: that of a row: (features,) or (height, width, channels).
    loss: the options of the loss that it was trained with.
    trained_on: what it was trained on, and how rows are prepared.

    The methods take rows (rows, *shape): uint8 as in the data set that it was trained on, if that holds bytes, or
    floating-point values, which are taken to be on the scale of bytes / 255 (of 0..1) then. `mean` and `std` of the run
    apply in both cases. Grey images may come without their axis of channels. They raise DataError for other rows, and
    where the network's outputs are not finite.
    """

    def __init__(self, saved: SavedNetwork):
        self.file, self.trained_on, self.loss = saved.saved.file, saved.saved.trained_on, saved.loss
        self._network = network = saved.network
        found = self.trained_on
        self.shape: Shape = found.shape
        self.answers = Answers(found, saved.loss, prod(network.output_shape))
        self.classes = self.answers.classes
        arrays = saved.saved.arrays
        self.dtype = np.result_type(np.float32, *(array.dtype for array in arrays.values()))
        self._params = {key: array.astype(self.dtype, copy=False) for key, array in arrays.items()}
        scaling = Scaling(found.shape, 1.0 if found.unit is None else found.unit, found.mean, found.std)
        dtype = self.dtype if found.unit is None else BYTE
        self._like = Split.of_array(np.empty((0, *found.shape), dtype), scaling, None)
        of_a_row = sum(prod(layer.outputs.shape) for layer in network.whole.layers) * self.dtype.itemsize
        self._block = max(1, min(MOST_ROWS, MOST_BYTES // of_a_row))
        self._ctx = Context(make_device("cpu", "numpy").ops, Workspace(self.dtype), training=False)

    def predict(self, x: npt.ArrayLike) -> Array:
        """Return the label of each row, (rows,) int64, the number of its class; where the targets were numbers, the
        outputs (rows, outputs)."""
        outputs = self.outputs(x)
        return self.answers.labels(outputs) if self.classes else outputs

    def probabilities(self, x: npt.ArrayLike) -> Array:
        """Return the probability of each class, (rows, classes).

        After cross_entropy they are the softmax of the outputs. After binary_cross_entropy they are the sigmoid of each
        output, which need not add up to 1; where one output stands for two classes, the probabilities of both. Raises
        UserError after mean_squared_error, whose outputs tell none.
        """
        if not self.answers.tells_probabilities:
            text = f"it was trained with {self.loss.kind}, whose outputs are no probabilities of classes"
            raise UserError(f"{self.file}: {text}; take outputs()")
        return self.answers.probabilities(self.outputs(x))

    def outputs(self, x: npt.ArrayLike) -> Array:
        """Return the numbers that the last layer gives, (rows, outputs): logits after a cross-entropy."""
        given = np.asarray(x)
        if given.ndim == len(self.shape) and self.takes(given.shape[1:]):
            given = given[..., np.newaxis]
        split = unlabelled(given, self._like, self.dtype)
        inputs, found = split.inputs(), np.empty((split.rows, *self._network.output_shape), self.dtype)
        for first in range(0, split.rows, self._block):
            rows = np.arange(first, min(first + self._block, split.rows))
            scaled = self._ctx.workspace.keep("x", (len(rows), *self.shape))
            inputs.batch(rows, scaled)
            self._ctx.rows, self._ctx.count = Span(0, len(rows)), len(rows)
            with quiet():
                found[rows] = self._network.whole.forward(self._params, scaled, self._ctx)[0]
        if not np.isfinite(found).all():
            text = "its outputs are not finite, though the rows are: its training has diverged; train it anew"
            raise DataError(text, file=self.file)
        return found.reshape(len(found), prod(self._network.output_shape))

    def takes(self, shape: Shape) -> bool:
        """Whether it takes rows of this shape: its own, that of grey images without the axis of channels, too."""
        return shape == self.shape or (len(self.shape) == 3 and shape == self.shape[:-1] and self.shape[-1] == 1)

    def __repr__(self) -> str:
        return f"TrainedNetwork({self.file!r}, shape={self.shape}, classes={len(self.classes)})"
