"""A network is a list of layers with names and shapes that can be divided into stages."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from math import prod

from nettorrent_mpi.device.arrays import Shape
from nettorrent_mpi.nn.layer import Features, Layer
from nettorrent_mpi.nn.layers.form import Gather
from nettorrent_mpi.nn.layers.norm import BatchNormLayer
from nettorrent_mpi.nn.layers.registry import Site
from nettorrent_mpi.nn.layers.residual import ResidualLayer
from nettorrent_mpi.nn.layers.sequence import Sequence, expanded, named
from nettorrent_mpi.plan.errors import ConfigError, ShapeError
from nettorrent_mpi.plan.specs import BatchNorm, Flatten, LayerSpec, flat
from nettorrent_mpi.plan.topology import LayerFacts

LARGEST = 2**45  # parameters of a layer, or outputs for one row


class Network:
    """A Network is a list of layers applied to rows of `input_shape`.

    Weight layers (linear, conv2d, residual) are counted; each includes the layers that follow it, except that flatten,
    and what comes after it, belongs to the weight layer that reads it; layers before the first weight layer belong to
    it. Raises ShapeError if two layers do not fit, ConfigError if there is no weight layer or a name occurs twice.
    """

    def __init__(self, layers: Seq[LayerSpec], input_shape: Shape):
        self.layers = named(layers)
        self.expanded = expanded(self.layers)  # with each activation as a layer of its own
        self.input_shape = input_shape
        self._starts = _starts(self.layers)
        try:
            self.whole = whole = Sequence(self.layers, Site("", Features.whole(input_shape)))  # undivided, in one stage
        except ShapeError as error:
            names = [layer.name for layer in self.layers]
            error.key = f"model.layers[{names.index(error.layer)}]" if error.layer in names else None
            raise
        self.output_shape = whole.outputs.shape
        self.output_name = whole.layers[-1].name
        norms = (layer for layer in _all_layers(whole) if isinstance(layer, BatchNormLayer))
        # The batch norms with one value per row and feature, which cannot work on one row.
        self.batch_norms_of_vectors = [layer.name for layer in norms if len(layer.outputs.shape) == 1]
        self._inputs: list[Shape] = []
        self.facts: list[LayerFacts] = []
        shape = input_shape
        for i in range(len(self._starts)):
            self._inputs.append(shape)
            part = Sequence(self.layers[self._slice(i, i + 1)], Site("", Features.whole(shape)))
            shape = part.outputs.shape
            self.facts.append(_facts(self.layers[self._slice(i, i + 1)], part))
        self._inputs.append(shape)
        largest = max(self.facts, key=lambda facts: max(facts.parameters, facts.outputs))
        most = max(largest.parameters, largest.outputs)
        if most > LARGEST:
            text = f"layer {largest.name}: {most:.2g} parameters or outputs a row are more than any computer holds"
            raise ShapeError(f"{text}; make it smaller")

    @property
    def has_batch_norm(self) -> bool:
        """Whether a row's output depends on the other rows of its micro-batch."""
        return any(isinstance(layer, BatchNorm) for layer in flat(self.layers))

    @property
    def weight_layers(self) -> int:
        """The number of weight layers: the most stages that the network can have."""
        return len(self._starts)

    def _slice(self, first: int, stop: int) -> slice:
        return slice(self._starts[first], self._starts[stop] if stop < len(self._starts) else len(self.layers))

    def inputs(self, weight_layer: int) -> Shape:
        """Return the shape of one row entering this weight layer's part; for index weight_layers, of the outputs."""
        return self._inputs[weight_layer]

    def stage(self, first: int, stop: int, cols: int, col: int) -> Sequence:
        """Return the layers of weight layers first..stop-1 for col `col` of `cols`.

        At the network's end divided outputs are gathered, since the loss needs whole rows.
        """
        specs = self.layers[self._slice(first, stop)]
        stage = Sequence(specs, Site("", Features.whole(self._inputs[first]), cols, col))
        if stop == self.weight_layers and cols > 1 and not stage.outputs.is_whole:
            stage.append(Gather("gather", stage.outputs, partial=False))
        stage.needs_dx = first > 0
        return stage


def _all_layers(sequence: Sequence) -> Iterator[Layer]:
    """Yield the layers of a sequence and those inside them."""
    for layer in sequence.layers:
        yield layer
        if isinstance(layer, ResidualLayer):
            yield from _all_layers(layer.body)
            yield from _all_layers(layer.shortcut)


def _starts(layers: Seq[LayerSpec]) -> list[int]:
    """Return the start of each weight layer's part."""
    starts: list[int] = []
    flatten: int | None = None
    for i, layer in enumerate(layers):
        if isinstance(layer, Flatten) and flatten is None:
            flatten = i
        if layer.weighted:
            starts.append(0 if not starts else i if flatten is None else flatten)
            flatten = None
    if not starts:
        raise ConfigError("the model has no layer with weights (linear, conv2d or residual)", key="model.layers")
    return starts


def _facts(specs: Seq[LayerSpec], part: Sequence) -> LayerFacts:
    weights = next(spec for spec in specs if spec.weighted)
    matrix = next((parameter.shape for _, parameter in part.parameters if parameter.product), (0, 0))
    return LayerFacts(
        name=weights.name or weights.kind,
        operations=part.operations,
        parameters=sum(prod(p.shape) for _, p in part.parameters if p.trainable),
        units=part.most_cols,
        inputs=prod(part.inputs.shape),
        outputs=prod(part.outputs.shape),
        matrix=(matrix[0], matrix[1]),
    )
