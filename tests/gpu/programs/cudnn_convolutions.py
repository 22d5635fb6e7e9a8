"""Prepares convolutions by device/gpu/cudnn.py without a GPU, and computes them on the CPU from what cuDNN's own graphs
then say, at the addresses that are handed to it."""

from __future__ import annotations

import ctypes
import json
from types import SimpleNamespace
from typing import Any

import cudnn
import ml_dtypes
import numpy as np
import pytest

from nettorrent_mpi.device.geometry import Geometry
from nettorrent_mpi.device.gpu.cudnn import Cudnn, properties_of
from nettorrent_mpi.device.gpu.known import KNOWN
from nettorrent_mpi.plan.errors import NoPlanError
from tests.gpu.host import convolution

TYPES = {"FLOAT": np.dtype(np.float32), "DOUBLE": np.dtype(np.float64), "BFLOAT16": np.dtype(ml_dtypes.bfloat16)}
STREAM, BACKEND = 77, 5  # a stream, and cuDNN's handle

GEOMETRIES = [
    Geometry.of((9, 7, 3), 5, (3, 2), (2, 1), "same"),
    Geometry.of((8, 6, 16), 32, (1, 1), (2, 2), "valid"),
    Geometry.of((11, 5, 1), 4, (4, 2), (3, 2), "same"),
    Geometry.of((8, 8, 4), 8, (3, 3), (1, 1), "same"),
    Geometry.of((12, 12, 2), 7, (5, 5), (1, 1), "valid"),
]


class Lowered:
    """A lowered graph, which is computed on the CPU instead of executed."""

    def __init__(self, graph: Any):
        self._graph = graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)

    def _execute_with_raw_ptrs(self, addresses: int, count: int, space: int, handle: int, index: int) -> None:
        said = json.loads(str(self._graph))
        tensors = {tensor["uid"]: tensor for tensor in said["tensors"]}
        real = sorted(uid for uid, tensor in tensors.items() if not tensor["is_virtual"])
        places = dict(zip(real, (ctypes.c_uint64 * count).from_address(addresses), strict=True))
        assert space == workspaces[-1].ctypes.data
        assert handle == BACKEND
        values: dict[int, np.ndarray] = {}

        def get(uid: int) -> np.ndarray:
            if uid not in values:
                tensor = tensors[uid]
                dtype, shape, steps = TYPES[tensor["data_type"]], tensor["dim"], tensor["stride"]
                if tensor["is_virtual"]:
                    values[uid] = np.zeros(shape, dtype)
                else:
                    reach = 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
                    memory = (ctypes.c_uint8 * (reach * dtype.itemsize)).from_address(places[uid])
                    values[uid] = np.ndarray(shape, dtype, memory, strides=[step * dtype.itemsize for step in steps])
            return values[uid]

        for node in said["nodes"]:
            wide = TYPES[node["compute_data_type"]]
            inputs = {name: get(uid).astype(wide) for name, uid in node["inputs"].items()}
            ((_, uid),) = node["outputs"].items()
            out = get(uid)
            if node["tag"] == "POINTWISE":
                first = inputs["IN_0"]
                assert node["mode"] in {"ADD", "RELU_FWD"}
                result = first + inputs["IN_1"] if node["mode"] == "ADD" else np.maximum(first, 0)
            else:
                result = convolved(node, inputs, out.shape)
            out[...] = result


def convolved(node: dict[str, Any], inputs: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The convolution of a node, of (images, channels, height, width) and (outputs, inputs, height, width)."""
    assert node["math_mode"] == "CROSS_CORRELATION"
    assert node["dilation"] == [1, 1]
    kind = node["tag"]
    around = list(zip(node["pre_padding"], node["post_padding"], strict=True))
    down, across = node["stride"]
    images = np.zeros(shape, inputs["W"].dtype) if kind == "CONV_DGRAD" else inputs["X"]
    padded = np.pad(images, ((0, 0), (0, 0), *around))
    size = (shape if kind == "CONV_WGRAD" else inputs["W"].shape)[2:]
    result = np.zeros(shape, padded.dtype)
    high, wide = (result if kind == "CONV_FPROP" else inputs["DY"]).shape[2:]
    assert [high, wide] == [(padded.shape[i] - size[i - 2]) // node["stride"][i - 2] + 1 for i in (2, 3)]
    for p in range(size[0]):
        for q in range(size[1]):
            seen = padded[:, :, p : p + (high - 1) * down + 1 : down, q : q + (wide - 1) * across + 1 : across]
            if kind == "CONV_FPROP":
                result += np.einsum("nchw,kc->nkhw", seen, inputs["W"][:, :, p, q])
            elif kind == "CONV_DGRAD":
                seen += np.einsum("nkhw,kc->nchw", inputs["DY"], inputs["W"][:, :, p, q])
            else:
                result[:, :, p, q] = np.einsum("nkhw,nchw->kc", inputs["DY"], seen)
    if kind == "CONV_DGRAD":
        (top, _), (left, _) = around
        result = padded[:, :, top : top + shape[2], left : left + shape[3]]
    return result


workspaces: list[np.ndarray] = []


def workspace(size: int) -> np.ndarray:
    workspaces.append(np.empty(size, np.uint8))
    return workspaces[-1]


def check(dtype: np.dtype, geometry: Geometry, biased: bool, relu: bool) -> None:
    rng, rows = np.random.default_rng(1), 5

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    x, y = random(rows, *geometry.image), random(rows, *geometry.output)
    weight = random(geometry.output[2], *geometry.kernel, geometry.image[2])
    bias = random(geometry.output[2]) if biased else None
    for kind in ("forward",) if biased or relu else ("forward", "grad_x", "grad_w"):
        arrays = {"x": x.copy(), "weight": weight.copy(), "y": y.copy()}
        prepared = library.convolution(kind, *arrays.values(), geometry, bias, relu, False, workspace)
        ((key, graph),) = list(library._plans.items())[-1:]
        assert key[0] == kind
        graph._lowered_graph = Lowered(graph._lowered_graph)
        prepared.run(SimpleNamespace(ptr=STREAM))
        wanted = {"x": x.copy(), "weight": weight.copy(), "y": y.copy()}
        more = {"bias": bias, "relu": relu} if kind == "forward" else {}
        getattr(convolution, kind)(*wanted.values(), geometry, **more)
        rounding = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 2e-2}[dtype.name]
        for name, array in arrays.items():
            expected = wanted[name].astype(np.float64)
            error = np.abs(array.astype(np.float64) - expected).max()
            assert error <= rounding * np.abs(expected).max(), (kind, dtype, geometry, name, error)
        global checked
        checked += 1


checked = 0
properties = properties_of(KNOWN["H200"])
cudnn.create_handle = lambda: cudnn.Handle(BACKEND, 0, STREAM)
library = Cudnn(lambda array: array.ctypes.data)
library._where = {"device_property": properties}
for dtype in TYPES.values():
    for geometry in GEOMETRIES:
        for biased, relu in ((False, False), (True, False), (True, True), (False, True)):
            if dtype != np.float64 or biased or not relu:
                check(dtype, geometry, biased, relu)
x, weight, y = np.zeros((1, 9, 7, 3)), np.zeros((5, 3, 2, 3)), np.zeros((1, 5, 7, 5))
with pytest.raises(NoPlanError, match="float64 images 9x7x3"):
    library.convolution("forward", x, weight, y, GEOMETRIES[0], None, True, False, workspace)
print(f"{checked} convolutions")
