"""These checks tell whether the end of a network, its loss and the targets fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod

from nettorrent_mpi.device.arrays import DType, Shape, as_dtype
from nettorrent_mpi.nn.losses import are_labels
from nettorrent_mpi.plan.errors import ConfigError, ShapeError
from nettorrent_mpi.plan.specs import (
    AvgPool2d,
    BinaryCrossEntropy,
    CrossEntropy,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    LayerSpec,
    MaxPool2d,
    MeanSquaredError,
    Spec,
)


def check_fit(spec: Spec, layer: str, outputs: Shape, target: Shape, dtype: DType, classes: int | None) -> None:
    """Raise ShapeError if the last layer and the data do not fit the loss `spec`, before training.

    `layer` is the last layer's name and `outputs` the shape of one row of its outputs; `target` is the shape of one
    row's target (() for labels), `dtype` the targets' type, `classes` the number of classes in the data (None: none).
    """
    dtype = as_dtype(dtype)
    is_label = are_labels(dtype, 1 + len(target))
    if len(outputs) != 1:
        shape = " x ".join(map(str, outputs))
        raise ShapeError(
            f"layer {layer}, the last one, gives {shape} numbers per row, but {spec.kind} needs one row of them: "
            "end the network with flatten or global_avg_pool2d and a linear layer"
        )
    units = outputs[0]
    if isinstance(spec, CrossEntropy) and not is_label:
        raise ShapeError(
            f"the targets of the data are {dtype} of shape {target} per row, but cross_entropy after layer "
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
    if not is_label and prod(target) != units:
        raise ShapeError(
            f"layer {layer}, the last one, has {units} units, but each row of the data has a target of shape {target}: "
            f"give it {prod(target)} units"
        )


def check_class_weights(spec: Spec, units: int) -> None:
    """Raise ConfigError if class weights are not one for each of the network's outputs."""
    if not isinstance(spec, CrossEntropy) or spec.class_weights is None:
        return
    if spec.class_weights != "balanced" and len(spec.class_weights) != units:
        count = len(spec.class_weights)
        raise ConfigError(
            f"has {count} number{'s' if count != 1 else ''}, but the last layer has {units} units: give one for each "
            "class, in the order of their labels, or write balanced"
        )


def has_accuracy(spec: Spec, units: int, classes: int | None) -> bool:
    """Whether this loss counts correct rows, for so many outputs; `classes` is None if the targets are no labels."""
    if isinstance(spec, BinaryCrossEntropy) and units == 1:
        return True
    return classes is not None and (units > 1 or not isinstance(spec, MeanSquaredError))


def unusual_labels(spec: Spec, units: int, classes: int | None) -> str | None:
    """Return a warning if labels are taken for numbers, or if there are outputs that no label is for."""
    if classes is None or units == 1 == classes - 1:
        return None
    if units == 1 and isinstance(spec, MeanSquaredError):
        return (
            f"model.loss: {spec.kind} of 1 output takes the {classes} classes for the numbers 0 to {classes - 1}: give "
            f"the last layer {classes} units, or write targets that are numbers as floating-point (rows, 1)"
        )
    if units > classes:
        return f"model.layers: the last layer has {units} units, but the data has {classes} classes: give it {classes}"
    return None


def check_end(spec: Spec, layers: Sequence[LayerSpec], units: int, classes: int | None) -> None:
    """Raise ConfigError if the network ends with what cannot be meant before the loss `spec`: outputs that are dropped
    at random, logits that an activation limits, an activation that cannot give the labels.

    `layers` are the network's, each activation one of its own; `units` is the number of outputs, `classes` that of the
    classes in the data (None: the targets are no labels, see `out_of_reach`).
    """
    last, averaged = _end(layers)
    text = None
    if isinstance(last, Dropout):
        text = (
            f"layer {last.name} comes last and sets outputs to 0 at random, which {spec.kind} takes for the network's "
            "answer: put it before the last layer with weights"
        )
    elif isinstance(spec, MeanSquaredError):
        if classes is not None:
            text = out_of_reach(spec, layers, 0, classes - 1 if units == 1 else 1)
    elif last.limits != (-inf, inf) and not (averaged and last.limits[1] == inf and isinstance(spec, CrossEntropy)):
        # To a softmax only differences matter, so that averages of numbers above 0 can stand for any probabilities:
        # relu before global_avg_pool2d is usual (Lin, Chen, Yan, arXiv:1312.4400).
        own = "softmax" if isinstance(spec, CrossEntropy) else "sigmoid"
        text = (
            f"layer {last.name} comes last and gives numbers {_between(last)}, but {spec.kind} takes logits, numbers "
            f"of either sign and any size, and applies the {own} itself: leave {last.kind} out"
        )
    if text is not None:
        raise ConfigError(text)


def out_of_reach(spec: Spec, layers: Sequence[LayerSpec], lowest: float, highest: float) -> str | None:
    """Return a text if the outputs cannot reach the targets of the loss `spec`, from `lowest` to `highest`."""
    last, _ = _end(layers)
    if last.limits[0] <= lowest and highest <= last.limits[1]:
        return None
    return (
        f"layer {last.name} comes last and gives numbers {_between(last)}, but the targets of {spec.kind} go from "
        f"{lowest:.6g} to {highest:.6g}: leave {last.kind} out, or scale the targets"
    )


def _end(layers: Sequence[LayerSpec]) -> tuple[LayerSpec, bool]:
    """Return the last layer that does more than arrange or pool numbers, and whether they are averaged after it."""
    averaged = False
    for layer in reversed(layers):
        averaged = averaged or isinstance(layer, AvgPool2d | GlobalAvgPool2d)
        idle = isinstance(layer, Dropout) and (averaged or layer.rate == 0)
        if not idle and not isinstance(layer, Flatten | MaxPool2d | AvgPool2d | GlobalAvgPool2d):
            return layer, averaged
    return layers[0], averaged


def _between(layer: LayerSpec) -> str:
    low, high = layer.limits
    return f"from {low:g} to {high:g}" if high < inf else f"from {low:g} on"
