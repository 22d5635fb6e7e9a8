"""Specs hold the options of every layer, loss, optimizer and learning-rate schedule, with their defaults.

Each is a frozen dataclass, so that the configuration is checked against it and `model.h5` can store it. The first field
may be given alone (`dropout: 0.25`). Formulas and defaults are PyTorch's where it has the same thing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from math import inf
from typing import Any, ClassVar, Literal

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

    name: str | None = field(default=None, kw_only=True)

    def widths(self) -> tuple[int, ...]:
        """Return the number of neurons or filters of each inner layer with weights, which cols of a team can divide."""
        return ()


@dataclass(frozen=True)
class Linear(LayerSpec):
    kind = "linear"
    weighted = True
    units: int
    activation: Activation | None = None
    bias: bool = True
    initial: Initial = "auto"

    def widths(self) -> tuple[int, ...]:
        return (self.units,)


@dataclass(frozen=True)
class Conv2d(LayerSpec):
    kind = "conv2d"
    weighted = True
    filters: int
    kernel: Pair = 3
    stride: Pair = 1
    padding: Padding = "valid"
    activation: Activation | None = None
    bias: bool = True
    initial: Initial = "auto"

    def widths(self) -> tuple[int, ...]:
        return (self.filters,)


@dataclass(frozen=True)
class MaxPool2d(LayerSpec):
    kind = "max_pool2d"
    size: Pair = 2
    stride: Pair | None = None  # None: the size


@dataclass(frozen=True)
class AvgPool2d(LayerSpec):
    kind = "avg_pool2d"
    size: Pair = 2
    stride: Pair | None = None


@dataclass(frozen=True)
class GlobalAvgPool2d(LayerSpec):
    kind = "global_avg_pool2d"


@dataclass(frozen=True)
class Flatten(LayerSpec):
    kind = "flatten"
    reads_whole = True


@dataclass(frozen=True)
class Dropout(LayerSpec):
    kind = "dropout"
    rate: float = 0.5


@dataclass(frozen=True)
class BatchNorm(LayerSpec):
    kind = "batch_norm"
    momentum: float = 0.1
    eps: float = 1e-5


@dataclass(frozen=True)
class LayerNorm(LayerSpec):
    kind = "layer_norm"
    eps: float = 1e-5


@dataclass(frozen=True)
class Relu(LayerSpec):
    kind = "relu"
    activates = True
    limits = (0.0, inf)


@dataclass(frozen=True)
class LeakyRelu(LayerSpec):
    kind = "leaky_relu"
    activates = True
    slope: float = 0.01


@dataclass(frozen=True)
class Sigmoid(LayerSpec):
    kind = "sigmoid"
    activates = True
    limits = (0.0, 1.0)


@dataclass(frozen=True)
class Tanh(LayerSpec):
    kind = "tanh"
    activates = True
    limits = (-1.0, 1.0)


@dataclass(frozen=True)
class Gelu(LayerSpec):
    kind = "gelu"  # the exact one, with erf
    activates = True
    limits = (-0.17, inf)


@dataclass(frozen=True)
class Residual(LayerSpec):
    kind = "residual"
    weighted = True
    layers: tuple[LayerSpec, ...]
    shortcut: tuple[LayerSpec, ...] = ()  # empty: the input itself

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
    kind = "cross_entropy"  # of logits: softmax and the negative log likelihood of whole-number labels
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class BinaryCrossEntropy(Spec):
    kind = "binary_cross_entropy"  # of logits; whole-number labels for several outputs become one-hot


@dataclass(frozen=True)
class MeanSquaredError(Spec):
    kind = "mean_squared_error"  # whole-number labels for several outputs become one-hot


LOSSES: dict[str, type[Spec]] = {s.kind: s for s in (CrossEntropy, BinaryCrossEntropy, MeanSquaredError)}


@dataclass(frozen=True)
class Sgd(Spec):
    kind = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Adagrad(Spec):
    kind = "adagrad"
    lr: float = 0.01
    lr_decay: float = 0.0
    initial_accumulator: float = 0.0
    eps: float = 1e-10
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Rmsprop(Spec):
    kind = "rmsprop"
    lr: float = 0.01
    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Adam(Spec):
    kind = "adam"
    lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class AdamW(Spec):
    kind = "adamw"
    lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01


OPTIMIZERS: dict[str, type[Spec]] = {s.kind: s for s in (Sgd, Adagrad, Rmsprop, Adam, AdamW)}


@dataclass(frozen=True)
class Constant(Spec):
    kind = "constant"
    warmup_steps: int = 0


@dataclass(frozen=True)
class Step(Spec):
    kind = "step"  # times `factor` every so many epochs, or every so many steps
    every_epochs: int | None = None  # one of the two is given
    every_steps: int | None = None
    factor: float = 0.1
    warmup_steps: int = 0


@dataclass(frozen=True)
class Exponential(Spec):
    kind = "exponential"  # times this factor every epoch, smoothly
    factor_per_epoch: float
    warmup_steps: int = 0


@dataclass(frozen=True)
class Cosine(Spec):
    kind = "cosine"  # half a cosine from lr down to `final` * lr at the last step
    final: float = 0.0
    warmup_steps: int = 0


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
