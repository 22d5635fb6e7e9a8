"""Specs hold the options of every layer, loss, optimizer and learning-rate schedule, with their defaults.

Each is a frozen dataclass, so that the configuration is checked against it and `model.h5` can store it. The first field
may be given alone (`dropout: 0.25`). Formulas and defaults are PyTorch's where it has the same thing. The schema and
the reference show a class's docstring and the comment beside or above each field (config/described.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, field, fields
from math import inf
from typing import Any, ClassVar, Literal

from nettorrent_mpi.plan.records import dataclass

Activation = Literal["relu", "leaky_relu", "sigmoid", "tanh", "gelu"]
Initial = Literal[
    "auto",  # he_normal where a relu, leaky_relu or gelu follows, otherwise glorot_uniform
    "he_normal",
    "he_uniform",
    "glorot_normal",
    "glorot_uniform",
    "lecun_normal",
    "lecun_uniform",
]
Padding = Literal["valid", "same"]
MOST = 2**31 - 1  # of whatever is counted: a number above it cannot be meant
Pair = int | tuple[int, int]  # one number for both height and width, or (height, width)


def pair(value: Pair | list[int]) -> tuple[int, int]:
    """Return (height, width) of an option that may be one number."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


@dataclass(frozen=True)
class Spec:
    """The options of one component. `kind` is its name in a configuration."""

    kind: ClassVar[str] = ""
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    def options(self) -> dict[str, Any]:
        """Return the options as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class LayerSpec(Spec):
    """The options of a layer; every layer may have a name (default: kind and count, `conv2d1`)."""

    weighted: ClassVar[bool] = False  # whether it is a layer with weights, by which stages are counted
    reads_whole: ClassVar[bool] = False  # whether it needs all features of a row, as layers with weights do
    activates: ClassVar[bool] = False  # whether it is an activation, by which initial values are chosen
    limits: ClassVar[tuple[float, float]] = (-inf, inf)  # of the numbers that it gives, for what a loss can take

    name: str | None = field(default=None, kw_only=True)  # in messages, files and exports; None: its kind and number

    def widths(self) -> tuple[int, ...]:
        """Return the number of neurons or filters of each inner layer with weights, which cols of a team can divide."""
        return ()


@dataclass(frozen=True)
class Linear(LayerSpec):
    """A linear layer multiplies each row by a matrix of weights, and adds a bias: y = x W + b."""

    kind = "linear"
    weighted = True
    units: int  # neurons: the outputs for each row
    activation: Activation | None = None  # applied to the outputs
    bias: bool = True  # whether a trained number is added to each output
    initial: Initial = "auto"  # the distribution of the initial weights

    def widths(self) -> tuple[int, ...]:
        return (self.units,)


@dataclass(frozen=True)
class Conv2d(LayerSpec):
    """A convolution of images (row, height, width, channel) by filters that look at all channels."""

    kind = "conv2d"
    weighted = True
    filters: int  # the channels of the output
    kernel: Pair = 3  # height and width of a filter, in pixels
    stride: Pair = 1  # pixels from one position of a filter to the next
    padding: Padding = "valid"  # same: zeros around the image, so that stride 1 keeps its size; valid: none
    activation: Activation | None = None  # applied to the outputs
    bias: bool = True  # whether a trained number is added to each channel
    initial: Initial = "auto"  # the distribution of the initial weights

    def widths(self) -> tuple[int, ...]:
        return (self.filters,)


@dataclass(frozen=True)
class MaxPool2d(LayerSpec):
    """The largest value of each window of an image, channel by channel."""

    kind = "max_pool2d"
    size: Pair = 2  # height and width of the window, in pixels
    stride: Pair | None = None  # pixels from one window to the next; None: the size


@dataclass(frozen=True)
class AvgPool2d(LayerSpec):
    """The mean of each window of an image, channel by channel."""

    kind = "avg_pool2d"
    size: Pair = 2  # height and width of the window, in pixels
    stride: Pair | None = None  # pixels from one window to the next; None: the size


@dataclass(frozen=True)
class GlobalAvgPool2d(LayerSpec):
    """The mean of each channel of an image over all its pixels."""

    kind = "global_avg_pool2d"


@dataclass(frozen=True)
class Flatten(LayerSpec):
    """An image becomes a row of numbers, which a linear layer can take; in the order height, width, channel."""

    kind = "flatten"
    reads_whole = True


@dataclass(frozen=True)
class Dropout(LayerSpec):
    """Dropout sets a part of the values to 0 in training, and scales the others up, so that the mean stays."""

    kind = "dropout"
    rate: float = 0.5  # the part of the values


@dataclass(frozen=True)
class BatchNorm(LayerSpec):
    """Each feature or channel is scaled to mean 0 and variance 1 over the rows that a piece of a mini-batch has on all
    ranks together, then scaled and shifted by trained numbers; an evaluation takes running means."""

    kind = "batch_norm"
    momentum: float = 0.1  # the weight of a step's mean and variance in the running ones
    eps: float = 1e-5  # added to the variance


@dataclass(frozen=True)
class LayerNorm(LayerSpec):
    """Each row is scaled to mean 0 and variance 1 over its features, then scaled and shifted by trained numbers."""

    kind = "layer_norm"
    eps: float = 1e-5  # added to the variance


@dataclass(frozen=True)
class Relu(LayerSpec):
    """max(x, 0)."""

    kind = "relu"
    activates = True
    limits = (0.0, inf)


@dataclass(frozen=True)
class LeakyRelu(LayerSpec):
    """x where it is positive, slope * x elsewhere."""

    kind = "leaky_relu"
    activates = True
    slope: float = 0.01  # of the negative part


@dataclass(frozen=True)
class Sigmoid(LayerSpec):
    """1 / (1 + exp(-x))."""

    kind = "sigmoid"
    activates = True
    limits = (0.0, 1.0)


@dataclass(frozen=True)
class Tanh(LayerSpec):
    """The hyperbolic tangent."""

    kind = "tanh"
    activates = True
    limits = (-1.0, 1.0)


@dataclass(frozen=True)
class Gelu(LayerSpec):
    """x times the normal distribution's cumulative function at x, exactly, by erf (Hendrycks and Gimpel 2016)."""

    kind = "gelu"
    activates = True
    limits = (-0.17, inf)


@dataclass(frozen=True)
class Residual(LayerSpec):
    """The sum of what inner layers make of the input and of a shortcut around them (He et al. 2015)."""

    kind = "residual"
    weighted = True
    layers: tuple[LayerSpec, ...]  # the inner layers, as in model.layers
    shortcut: tuple[LayerSpec, ...] = ()  # the layers of the shortcut; empty: the input itself

    def widths(self) -> tuple[int, ...]:
        return tuple(width for inner in (*self.layers, *self.shortcut) for width in inner.widths())


LAYERS: dict[str, type[LayerSpec]] = {
    spec.kind: spec
    for spec in (
        Linear, Conv2d, MaxPool2d, AvgPool2d, GlobalAvgPool2d, Flatten, Dropout, BatchNorm, LayerNorm,
        Relu, LeakyRelu, Sigmoid, Tanh, Gelu, Residual,
    )
}  # fmt: skip


@dataclass(frozen=True)
class CrossEntropy(Spec):
    """Softmax and the negative log likelihood of labels that are whole numbers; the outputs are logits."""

    kind = "cross_entropy"
    label_smoothing: float = 0.0  # the part of a label's weight that all classes share
    # the weight of each class's rows in the loss: a list of numbers, one for each class, or balanced, by which classes
    # weigh alike however many training rows they have; a mean loss is then the sum of weighted losses over the sum of
    # the rows' weights, in evaluations too, and accuracies are not weighted
    class_weights: tuple[float, ...] | Literal["balanced"] | None = None


@dataclass(frozen=True)
class BinaryCrossEntropy(Spec):
    """Sigmoid and the negative log likelihood of targets from 0 to 1; whole-number labels become one-hot."""

    kind = "binary_cross_entropy"


@dataclass(frozen=True)
class MeanSquaredError(Spec):
    """The mean of the squared differences from the targets; whole-number labels become one-hot."""

    kind = "mean_squared_error"


LOSSES: dict[str, type[Spec]] = {s.kind: s for s in (CrossEntropy, BinaryCrossEntropy, MeanSquaredError)}


@dataclass(frozen=True)
class Sgd(Spec):
    """Stochastic gradient descent, as PyTorch's SGD."""

    kind = "sgd"
    lr: float = 0.01  # the learning rate
    momentum: float = 0.0  # the part of the former step that goes into the next one
    dampening: float = 0.0  # the part of a gradient that stays out of the momentum
    nesterov: bool = False  # Nesterov's momentum
    weight_decay: float = 0.0  # the factor on the weights that is added to their gradients


@dataclass(frozen=True)
class Adagrad(Spec):
    """Each weight's learning rate falls by the sum of its squared gradients (Duchi et al. 2011)."""

    kind = "adagrad"
    lr: float = 0.01  # the learning rate
    lr_decay: float = 0.0  # the learning rate is divided by 1 + steps * lr_decay
    initial_accumulator: float = 0.0  # the sum of squared gradients at the start
    eps: float = 1e-10  # added to the root that a step is divided by
    weight_decay: float = 0.0  # the factor on the weights that is added to their gradients


@dataclass(frozen=True)
class Rmsprop(Spec):
    """Each weight's step is divided by the root of a running mean of its squared gradients."""

    kind = "rmsprop"
    lr: float = 0.01  # the learning rate
    alpha: float = 0.99  # the weight of the past in the running mean
    eps: float = 1e-8  # added to the root that a step is divided by
    momentum: float = 0.0  # the part of the former step that goes into the next one
    centered: bool = False  # whether the squared mean gradient is subtracted from the mean square
    weight_decay: float = 0.0  # the factor on the weights that is added to their gradients


@dataclass(frozen=True)
class Adam(Spec):
    """Running means of gradients and of their squares make each step (Kingma and Ba 2014)."""

    kind = "adam"
    lr: float = 0.001  # the learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # the weights of the past in the two running means
    eps: float = 1e-8  # added to the root that a step is divided by
    weight_decay: float = 0.0  # the factor on the weights that is added to their gradients


@dataclass(frozen=True)
class AdamW(Spec):
    """Adam, with a weight decay that does not pass through its means (Loshchilov and Hutter 2017)."""

    kind = "adamw"
    lr: float = 0.001  # the learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # the weights of the past in the two running means
    eps: float = 1e-8  # added to the root that a step is divided by
    weight_decay: float = 0.01  # the part of the weights that a step of rate 1 takes away


OPTIMIZERS: dict[str, type[Spec]] = {s.kind: s for s in (Sgd, Adagrad, Rmsprop, Adam, AdamW)}


@dataclass(frozen=True)
class Constant(Spec):
    """The learning rate stays the optimizer's lr."""

    kind = "constant"
    warmup_steps: int = 0  # first steps, in which the learning rate grows to lr evenly


@dataclass(frozen=True)
class Step(Spec):
    """The learning rate drops at equal intervals, of epochs or of steps: one of the two is given."""

    kind = "step"
    every_epochs: int | None = None  # epochs from one drop to the next
    every_steps: int | None = None  # steps from one drop to the next
    factor: float = 0.1  # by which each drop multiplies the learning rate
    warmup_steps: int = 0  # first steps, in which the learning rate grows to lr evenly


@dataclass(frozen=True)
class Exponential(Spec):
    """The learning rate falls smoothly, by the same factor in each epoch."""

    kind = "exponential"
    factor_per_epoch: float  # by which an epoch multiplies the learning rate
    warmup_steps: int = 0  # first steps, in which the learning rate grows to lr evenly


@dataclass(frozen=True)
class Cosine(Spec):
    """Half a cosine takes the learning rate from lr down to final * lr at the last step."""

    kind = "cosine"
    final: float = 0.0  # the part of lr that is left at the end
    warmup_steps: int = 0  # first steps, in which the learning rate grows to lr evenly


SCHEDULES: dict[str, type[Spec]] = {s.kind: s for s in (Constant, Step, Exponential, Cosine)}


def first_field(spec: type[Spec]) -> str | None:
    """Return the option that may be given alone, without its name; None if there are no options."""
    return next((f.name for f in fields(spec) if f.name != "name"), None)


def flat(layers: Iterable[LayerSpec]) -> Iterator[LayerSpec]:
    """Return all layers, including those inside residual blocks."""
    for layer in layers:
        yield layer
        if isinstance(layer, Residual):
            yield from flat((*layer.layers, *layer.shortcut))


def to_plain(layer: LayerSpec) -> dict[str, Any]:
    """Return the layer as in a configuration: {kind: {option: value, ...}}."""
    options = {k: v for k, v in layer.options().items() if v is not None}
    if isinstance(layer, Residual):
        options["layers"] = [to_plain(inner) for inner in layer.layers]
        options["shortcut"] = [to_plain(inner) for inner in layer.shortcut]
    return {layer.kind: options}
