"""Networks as ONNX, computed by onnxruntime."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None:
    pytest.skip("onnx and onnxruntime are not installed (the extra `compare`)", allow_module_level=True)

import onnx
import onnxruntime

from nettorrent_mpi.engine import onnx_file
from nettorrent_mpi.engine.onnx_file import onnx_model, write_onnx
from nettorrent_mpi.engine.saved_network import SavedNetwork
from nettorrent_mpi.plan import specs as s
from nettorrent_mpi.plan.errors import SizeError
from tests.networks import EVERY, case, random_layers

LIMIT = 1e-5


def run(saved: SavedNetwork, x: Any) -> Any:
    model = onnx_model(saved)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(["output"], {"input": x})
    return y


@pytest.mark.parametrize("name", EVERY)
def test_each_layer_computes_the_same(name: str) -> None:
    made = case(*EVERY[name], np.float32)
    assert made.off(run(made.saved, made.x_first)) <= LIMIT


@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 300), marks=pytest.mark.slow)])
def test_random_networks_compute_the_same(seeds: range) -> None:
    for seed in seeds:
        stored, dtype = bool(seed % 2), (np.float32, np.float64)[seed // 2 % 2]
        made = case(*random_layers(seed), dtype, seed, stored=stored)
        x = made.x_first if stored else made.x_first.astype(np.float32)
        assert made.off(run(made.saved, x)) <= LIMIT, (seed, made.saved.network.layers)


def test_the_file_describes_itself(tmp_path: Path) -> None:
    made = case((4, 3, 2), [s.Conv2d(3), s.Flatten(), s.Linear(5)], np.float32, stored=True)
    path = tmp_path / "model.onnx"
    write_onnx(made.saved, path)
    model = onnx.load(path)
    (read,), (written,) = model.graph.input, model.graph.output

    def described(value: Any) -> tuple[str, int, list[Any]]:
        tensor = value.type.tensor_type
        return value.name, tensor.elem_type, [each.dim_param or each.dim_value for each in tensor.shape.dim]

    assert described(read) == ("input", onnx.TensorProto.UINT8, ["batch", 2, 4, 3])
    assert described(written) == ("output", onnx.TensorProto.FLOAT, ["batch", 5])
    assert (model.ir_version, [(each.domain, each.version) for each in model.opset_import]) == (7, [("", 13)])
    texts = {each.key: each.value for each in model.metadata_props}
    assert json.loads(texts["class_names"]) == ["a", "b", "c"]
    assert json.loads(texts["data"])["shape"] == [4, 3, 2]
    assert [*json.loads(texts["model"])["layers"][0]] == ["conv2d"]
    assert "(row, channel, height, width)" in texts["conventions"]
    assert [node.name for node in model.graph.node] == [
        "scaling.cast", "scaling.mul", "scaling.sub", "conv2d1", "flatten1", "linear1",
    ]  # fmt: skip
    for rows in (1, 4):  # any number of rows
        assert run(made.saved, made.x_first[:rows]).shape == (rows, 5)
    floats = case((4,), [s.Linear(5)]).saved
    assert described(onnx_model(floats).graph.input[0]) == ("input", onnx.TensorProto.FLOAT, ["batch", 4])


def test_what_no_file_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST", 80)
    with pytest.raises(SizeError, match=r"test: its arrays take .* GB, and a \.onnx file at most"):
        onnx_model(case((4,), [s.Linear(5)]).saved)
