"""This module writes a network as a .onnx file, which onnxruntime, TensorRT, OpenVINO, a browser and others run. Needs
no PyTorch.

    input   (batch, channels, height, width) of images, other rows as they are; uint8, as they are stored, where the
            data set has bytes, else float32
    output  (batch, outputs): what the last layer gives, so the logits for cross-entropy

The scaling of bytes, `mean` and `std` are part of the graph. All of it is float32, because runtimes have no kernels of
float64 for convolutions. Operators are of opset 13 and files of version 7 (2021), which nearly every runtime takes:
layer norm and GELU are written by simpler operators therefore, which runtimes fuse again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from nettorrent_mpi import __version__
from nettorrent_mpi.data.scaling import Scaling
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.channels_first import CONVENTIONS, Placed, channels_first, placed
from nettorrent_mpi.engine.saved_network import SavedNetwork
from nettorrent_mpi.plan import specs
from nettorrent_mpi.plan.errors import SizeError

OPSET, IR_VERSION = 13, 7
LARGEST = (1 << 31) - (1 << 20)  # bytes of a file: protobuf's limit, and room for what is not arrays
INPUT, OUTPUT, BATCH = "input", "output", "batch"
_PLAIN = {specs.Relu: "Relu", specs.Sigmoid: "Sigmoid", specs.Tanh: "Tanh"}  # operators without attributes


def write_onnx(saved: SavedNetwork, path: Path) -> None:
    """Write the network into the file at `path`, which is checked first. Raises SizeError."""
    model = onnx_model(saved)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def onnx_model(saved: SavedNetwork) -> Any:
    """Make the network as an onnx.ModelProto. Raises SizeError if it is too large for one file."""
    size = sum(array.size for array in saved.saved.arrays.values()) * 4
    if size > LARGEST:
        raise SizeError(f"{saved.saved.file}: its arrays take {size / 1e9:.1f} GB, and a .onnx file at most 2.1 GB")
    data, network = saved.saved.trained_on, saved.network
    graph = _Graph(saved.saved.arrays)
    x = graph.layers(placed(network), graph.scaled(INPUT, data.unit, saved))
    graph.nodes[-1].output[0] = OUTPUT
    assert x == graph.last
    stored = TensorProto.FLOAT if data.unit is None else TensorProto.UINT8
    inputs = helper.make_tensor_value_info(INPUT, stored, [BATCH, *channels_first(network.input_shape)])
    outputs = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [BATCH, *channels_first(network.output_shape)])
    inputs.doc_string = f"{CONVENTIONS} Values are those of the data set" + (
        ", which mean and std are still to be applied to: the graph does it."
        if data.unit is None
        else f": bytes, which the graph multiplies by {data.unit:.6g} before mean and std apply."
    )
    outputs.doc_string = f"What the loss {saved.loss.kind} reads: logits for cross entropy."
    made = helper.make_graph(graph.nodes, "network", [inputs], [outputs], graph.arrays)
    model = helper.make_model(
        made,
        producer_name="nettorrent_mpi",
        producer_version=__version__,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    texts = saved.saved.texts() | {"class_names": json.dumps(data.class_names), "conventions": CONVENTIONS}
    helper.set_model_props(model, texts)
    return model


class _Graph:
    """A _Graph collects nodes and arrays. Methods take the name of a value and return that of the result."""

    def __init__(self, arrays: Any):
        self.nodes: list[Any] = []
        self.arrays: list[Any] = []
        self.last = INPUT
        self._given, self._names = arrays, {INPUT, OUTPUT}

    def scaled(self, x: str, unit: float | None, saved: SavedNetwork) -> str:
        """Prepare the input as the data set's rows were: data.rows.Scaling."""
        shape, data = saved.network.input_shape, saved.saved.trained_on
        scaling = Scaling(shape, 1.0 if unit is None else unit, data.mean, data.std)
        if unit is not None:
            x = self._node("Cast", [x], "scaling.cast", to=TensorProto.FLOAT)
        rest = (1, 1) if len(shape) == 3 else ()
        for operator, name, values, neutral in (
            ("Mul", "factor", scaling.factor, 1.0),
            ("Sub", "offset", scaling.offset, 0.0),
        ):
            if np.any(values != neutral):
                array = self._array(f"scaling.{name}", values.reshape(-1, *rest) if len(values) > 1 else values[0])
                x = self._node(operator, [x, array], f"scaling.{operator.lower()}")
        return x

    def layers(self, layers: Sequence[Placed], x: str) -> str:
        """Add layers, one after another."""
        for layer in layers:
            x = self._layer(layer, x)
        return x

    def _layer(self, layer: Placed, x: str) -> str:
        spec, name = layer.spec, layer.name
        if isinstance(spec, specs.Dropout):
            return x
        if isinstance(spec, specs.Linear):
            return self._node("Gemm", [x, *self._of(layer, "weight", *["bias"] * spec.bias)], name, transB=1)
        if isinstance(spec, specs.Conv2d):
            geometry = layer.geometry
            before, after = zip(geometry.vertical, geometry.horizontal, strict=True)
            options = {"kernel_shape": geometry.kernel, "strides": geometry.stride, "pads": (*before, *after)}
            return self._node("Conv", [x, *self._of(layer, "weight", *["bias"] * spec.bias)], name, **options)
        if isinstance(spec, specs.MaxPool2d | specs.AvgPool2d):
            size = specs.pair(spec.size)
            stride = size if spec.stride is None else specs.pair(spec.stride)
            kind = "MaxPool" if isinstance(spec, specs.MaxPool2d) else "AveragePool"
            return self._node(kind, [x], name, kernel_shape=size, strides=stride)
        if isinstance(spec, specs.GlobalAvgPool2d):
            return self._node("Flatten", [self._node("GlobalAveragePool", [x], f"{name}.mean")], name, axis=1)
        if isinstance(spec, specs.Flatten):
            if layer.channels_last:
                x = self._node("Transpose", [x], f"{name}.transpose", perm=(0, 2, 3, 1))
            return self._node("Flatten", [x], name, axis=1)
        if isinstance(spec, specs.BatchNorm):
            return self._batch_norm(layer, spec, x)
        if isinstance(spec, specs.LayerNorm):
            return self._layer_norm(layer, spec, x)
        if isinstance(spec, specs.Residual):
            body, shortcut = self.layers(layer.body, x), self.layers(layer.shortcut, x)
            return self._node("Add", [body, shortcut], name)
        if isinstance(spec, specs.LeakyRelu):
            return self._node("LeakyRelu", [x], name, alpha=spec.slope)
        if isinstance(spec, specs.Gelu):
            return self._gelu(name, x)
        return self._node(_PLAIN[type(spec)], [x], name)

    def _batch_norm(self, layer: Placed, spec: specs.BatchNorm, x: str) -> str:
        if len(layer.inputs) in (1, 3):
            arrays = self._of(layer, "weight", "bias", "running_mean", "running_var")
            return self._node("BatchNormalization", [x, *arrays], layer.name, epsilon=spec.eps)
        weight, bias, mean, variance = (  # rows whose last axis is no channel for the operator
            np.asarray(self._given[f"{layer.name}/{each}"], np.float64)
            for each in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + spec.eps)
        for operator, each, values in (("Sub", "mean", mean), ("Mul", "scale", scale), ("Add", "bias", bias)):
            name = f"{_dotted(layer.name)}.{each}"
            x = self._node(operator, [x, self._array(name, values)], f"{layer.name}.{operator.lower()}")
        return x

    def _layer_norm(self, layer: Placed, spec: specs.LayerNorm, x: str) -> str:
        name, image = layer.name, len(layer.inputs) == 3
        axes = [1] if image else [-1]
        epsilon = self._array(f"{_dotted(name)}.eps", np.asarray(spec.eps))
        mean = self._node("ReduceMean", [x], f"{name}.mean", axes=axes, keepdims=1)
        centered = self._node("Sub", [x, mean], f"{name}.centered")
        squares = self._node("Mul", [centered, centered], f"{name}.squares")
        variance = self._node("ReduceMean", [squares], f"{name}.variance", axes=axes, keepdims=1)
        deviation = self._node("Sqrt", [self._node("Add", [variance, epsilon], f"{name}.raised")], f"{name}.deviation")
        y = self._node("Div", [centered, deviation], f"{name}.normalized")
        weight, bias = self._of(layer, "weight", "bias", more=(1, 1) if image else ())
        return self._node("Add", [self._node("Mul", [y, weight], f"{name}.scaled"), bias], name)

    def _gelu(self, name: str, x: str) -> str:
        """Compute x * (1 + erf(x / sqrt 2)) / 2, in the form that runtimes recognize."""
        constants = {"root": sqrt(2.0), "one": 1.0, "half": 0.5}
        root, one, half = (self._array(f"{_dotted(name)}.{key}", np.asarray(v)) for key, v in constants.items())
        error = self._node("Erf", [self._node("Div", [x, root], f"{name}.divided")], f"{name}.erf")
        y = self._node("Mul", [x, self._node("Add", [error, one], f"{name}.raised")], f"{name}.product")
        return self._node("Mul", [y, half], name)

    def _of(self, layer: Placed, *names: str, more: tuple[int, ...] = ()) -> list[str]:
        """Add arrays of a layer, with further axes of one element after their own."""
        found: list[str] = []
        for name in names:
            array = layer.outward(name, self._given[f"{layer.name}/{name}"])
            found.append(self._array(f"{_dotted(layer.name)}.{name}", array.reshape(*array.shape, *more)))
        return found

    def _node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.last = self._unique(name)
        self.nodes.append(helper.make_node(operator, inputs, [self.last], name=self.last, **attributes))
        return self.last

    def _array(self, name: str, values: Array) -> str:
        unique = self._unique(name)
        self.arrays.append(numpy_helper.from_array(np.asarray(values, np.float32, order="C"), unique))
        return unique

    def _unique(self, name: str) -> str:
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name


def _dotted(name: str) -> str:
    """Return a layer's path as it stands before the names of its arrays."""
    return name.replace("/", ".")
