"""This module gives a network as PyTorch and ONNX have it: channels first.

                        here                                   there
    images              (row, height, width, channel)          (row, channel, height, width)
    weight of linear    (in, out)                              (out, in)
    weight of conv2d    (height, width, in, out)               (out, in, height, width)
    flatten             in the order of these axes             in the order of those
    padding `same`      see device.geometry.places             the same rows and columns of zeros

Since a flatten gives the features in another order there, the arrays of the layers after it are in that order, too, up
to the next linear layer, whose outputs are in the same order here and there. Where no linear layer follows, as at the
end of a network or before a residual block, the flatten itself has to move the channels last.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from nettorrent_mpi.device.arrays import Array, Shape
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.nn.layers.residual import ResidualLayer
from nettorrent_mpi.nn.layers.sequence import Sequence
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.records import dataclass

CONVENTIONS = """\
Images are (row, channel, height, width), where the rows of the data set are (row, height, width, channel). Weights \
are (outputs, inputs) of linear layers and (filters, channels, height, width) of convolutions. A flatten is in the \
order (channel, height, width). The rows are upright images where the files of the data set have them transposed."""


@dataclass(frozen=True)
class Placed:
    """A Placed layer knows what it reads: `inputs` and `outputs` are shapes of one row, as they are here.

    `name` is its path, as in model.h5; an activation that belongs to another layer is one of its own,
    "<layer>.<activation>". `flattened` is the shape of the images whose features the layer reads in the order of
    channels first; None: the order is the same. `channels_last`: a flatten that gives the features in the order that
    they have here. `body` and `shortcut` are the branches of a residual block.
    """

    name: str
    spec: specs.LayerSpec
    inputs: Shape
    outputs: Shape
    flattened: Shape | None = None
    channels_last: bool = False
    body: tuple[Placed, ...] = ()
    shortcut: tuple[Placed, ...] = ()

    @property
    def geometry(self) -> Geometry:
        """Return the geometry of a convolution."""
        spec = self.spec
        assert isinstance(spec, specs.Conv2d)
        height, width, channels = self.inputs
        kernel, stride = specs.pair(spec.kernel), specs.pair(spec.stride)
        return Geometry.of((height, width, channels), spec.filters, kernel, stride, spec.padding)

    def outward(self, name: str, array: Array) -> Array:
        """Return an array of the layer ("weight", "bias", ...) as it is there."""
        if name == "weight" and array.ndim > 1:
            array = np.transpose(array, (3, 2, 0, 1) if array.ndim == 4 else (1, 0))
        if self._reordered(name):
            array = array[..., self._order()]
        return np.ascontiguousarray(array)

    def inward(self, name: str, array: Array) -> Array:
        """Return an array that is as it is there as it is here: the inverse of `outward`."""
        if self._reordered(name):
            array = array[..., np.argsort(self._order())]
        if name == "weight" and array.ndim > 1:
            array = np.transpose(array, (2, 3, 1, 0) if array.ndim == 4 else (1, 0))
        return np.ascontiguousarray(array)

    def _reordered(self, name: str) -> bool:
        """Whether the last axis of an array (there) is that of the inputs, and these are in another order."""
        return self.flattened is not None and (name == "weight" or not isinstance(self.spec, specs.Linear))

    def _order(self) -> Array:
        """Return which feature here is feature i there, of those that the layer reads."""
        assert self.flattened is not None
        return np.arange(self.inputs[0]).reshape(self.flattened).transpose(2, 0, 1).ravel()


def placed(network: Network) -> tuple[Placed, ...]:
    """Return the layers of a network, all of which are the package's own."""
    return _placed(network.whole)


def channels_first(shape: Shape) -> Shape:
    """Return the shape of a row there."""
    return (shape[2], *shape[:2]) if len(shape) == 3 else shape


def _placed(sequence: Sequence) -> tuple[Placed, ...]:
    found: list[Placed] = []
    flattened: Shape | None = None
    for i, (spec, layer) in enumerate(zip(sequence.specs, sequence.layers, strict=True)):
        inputs, outputs = layer.inputs.shape, layer.outputs.shape
        if isinstance(layer, ResidualLayer):
            branches = _placed(layer.body), _placed(layer.shortcut)
            found.append(Placed(layer.name, spec, inputs, outputs, None, False, *branches))
        elif isinstance(spec, specs.Flatten) and len(inputs) == 3:
            same = inputs[2] == 1 or inputs[:2] == (1, 1)
            reordered = not same and _end_in_linear(sequence.specs[i + 1 :])
            found.append(Placed(layer.name, spec, inputs, outputs, channels_last=not same and not reordered))
            flattened = inputs if reordered else None
        else:
            found.append(Placed(layer.name, spec, inputs, outputs, flattened))
            if isinstance(spec, specs.Linear):
                flattened = None
    return tuple(found)


def _end_in_linear(following: Seq[specs.LayerSpec]) -> bool:
    """Whether the features after a flatten come to a linear layer, and only to layers before it that do not care about
    their order, or have an array with a number for each."""
    readers = (spec for spec in following if isinstance(spec, specs.Linear | specs.Residual))
    return isinstance(next(readers, None), specs.Linear)
