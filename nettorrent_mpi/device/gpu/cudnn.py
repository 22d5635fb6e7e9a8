"""Convolutions by cuDNN's graphs (https://docs.nvidia.com/deeplearning/cudnn/latest/operations/Convolutions.html).

A plan is an engine that cuDNN's heuristic chose for one graph, with the bytes that it works in. It depends on the GPU's
properties alone, so plans can be built where no GPU is. All plans are deterministic, and each sum is rounded once:

    float32   without tensor cores, which would round the factors to TF32
    tf32      with them
    float64   has engines for all three passes (but none for a relu without a bias)
    bfloat16  added up in float32; the weight gradient is rounded to bfloat16, since no engine writes it in float32
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import cudnn

from nettorrent_mpi.device.arrays import Array, DType, as_dtype
from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.plan.errors import NoPlanError

X, FILTERS, Y, BIAS = 1, 2, 3, 4  # the tensors' numbers


class CudnnProduct:
    """A Product (see runtime): a plan, and the addresses that it is executed with."""

    def __init__(self, graph: Any, addresses: dict[int, int], space: Array, where: int, handle: Any, *kept: Any):
        self._graph, self._addresses, self._handle, self._where = graph, addresses, handle, where
        self._kept = space, kept

    def run(self, stream: Any) -> None:
        cudnn.set_stream(handle=self._handle, stream=stream.ptr)
        self._graph.execute(self._addresses, self._where, self._handle)


class Cudnn:
    """Cudnn prepares convolutions on the present GPU. `address` gives an array's address."""

    def __init__(self, address: Callable[[Array], int]):
        self._address = address
        self._handle = cudnn.create_handle()
        self._where = {"handle": self._handle}
        self._plans: dict[tuple[Any, ...], Any] = {}

    def convolution(
        self,
        kind: str,
        x: Array,
        weight: Array,
        y: Array,
        geometry: Geometry,
        bias: Array | None,
        relu: bool,
        tf32: bool,
        workspace: Callable[[int], Array],
    ) -> CudnnProduct:
        """Prepare a convolution: see Runtime."""
        key = kind, geometry, len(x), x.dtype, tf32, bias is not None, relu
        if key not in self._plans:
            self._plans[key] = plan(self._where, *key)
        graph, arrays = self._plans[key], {X: x, FILTERS: weight, Y: y}
        if bias is not None:
            arrays[BIAS] = bias
        addresses = {number: self._address(array) for number, array in arrays.items()}
        space = workspace(max(graph.get_workspace_size(), 1))
        return CudnnProduct(graph, addresses, space, self._address(space), self._handle, *arrays.values())


def properties_of(facts: Mapping[str, Any]) -> Any:
    """Return the properties of a GPU that is not here, as `create_device_properties(0).serialize()` gives them where it
    is."""
    return cudnn.create_device_properties(json.dumps(facts))


def plan_workspace(
    properties: Any,
    kind: str,
    geometry: Geometry,
    rows: int,
    dtype: DType,
    tf32: bool = False,
    bias: bool = False,
    relu: bool = False,
) -> int:
    """Return the bytes that a convolution works in on a GPU with these properties. Needs no GPU."""
    return int(
        plan({"device_property": properties}, kind, geometry, rows, dtype, tf32, bias, relu).get_workspace_size()
    )


def plan(
    where: Mapping[str, Any],
    kind: str,
    geometry: Geometry,
    rows: int,
    dtype: DType,
    tf32: bool,
    bias: bool,
    relu: bool,
) -> Any:
    """Return a graph with its plan: "forward", "grad_x" or "grad_w" of images (rows, height, width, channels).

    `where` is {"handle": of the present GPU}, or {"device_property": of another}; then it is only planned.
    """
    name = as_dtype(dtype).name
    types = {"float32": cudnn.data_type.FLOAT, "float64": cudnn.data_type.DOUBLE, "bfloat16": cudnn.data_type.BFLOAT16}
    computed = types["float64" if name == "float64" else "float32"]
    graph = cudnn.pygraph(
        io_data_type=types[name],
        intermediate_data_type=computed,
        compute_data_type=computed,
        **where,
    )
    images, outputs = _images(rows, geometry.image), _images(rows, geometry.output)
    filters = _images(geometry.output[2], (*geometry.kernel, geometry.image[2]))
    around = {
        "pre_padding": [geometry.vertical[0], geometry.horizontal[0]],
        "post_padding": [geometry.vertical[1], geometry.horizontal[1]],
        "stride": list(geometry.stride),
        "dilation": [1, 1],
    }
    tensor = graph.tensor
    if kind == "forward":
        shape, number = outputs, Y
        image, weight = tensor(name="x", uid=X, **images), tensor(name="weight", uid=FILTERS, **filters)
        out = _shaped(graph.conv_fprop(image=image, weight=weight, **around), shape)
        if bias:
            one = _images(1, (1, 1, geometry.output[2]))
            out = _shaped(graph.bias(input=out, bias=tensor(name="bias", uid=BIAS, **one)), shape)
        if relu:
            out = _shaped(graph.relu(out), shape)
    elif kind == "grad_x":
        shape, number = images, X
        loss, weight = tensor(name="dy", uid=Y, **outputs), tensor(name="weight", uid=FILTERS, **filters)
        out = _shaped(graph.conv_dgrad(loss=loss, filter=weight, **around), shape)
    else:
        assert kind == "grad_w", kind
        shape, number = filters, FILTERS
        image, loss = tensor(name="x", uid=X, **images), tensor(name="dy", uid=Y, **outputs)
        out = _shaped(graph.conv_wgrad(image=image, loss=loss, **around), shape)
    out.set_output(True).set_data_type(types[name]).set_uid(number)
    notes = cudnn.numerical_note
    barred = [notes.NONDETERMINISTIC, notes.REDUCED_PRECISION_REDUCTION]
    if name == "float32" and not tf32:
        barred += [notes.TENSOR_CORE, notes.DOWN_CONVERT_INPUTS]
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.deselect_numeric_notes(barred)
        graph.build_plans()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        what = f"{kind} of {rows} {name} images {geometry}{' + bias' if bias else ''}{', relu' if relu else ''}"
        raise NoPlanError(
            f"cuDNN {cudnn.backend_version()} has no plan for {what}: choose another dtype or kernel, or device: cpu"
        ) from error
    return graph


def _images(rows: int, shape: tuple[int, int, int]) -> dict[str, list[int]]:
    """Return cuDNN's sizes and strides of (rows, height, width, channels): it names channels before height."""
    high, wide, channels = shape
    return {"dim": [rows, channels, high, wide], "stride": [high * wide * channels, 1, wide * channels, channels]}


def _shaped(tensor: Any, shape: dict[str, list[int]]) -> Any:
    return tensor.set_dim(shape["dim"]).set_stride(shape["stride"])
