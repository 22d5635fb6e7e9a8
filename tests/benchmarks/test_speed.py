"""The benchmarks: that both sides train the same network on rows of the same shape, and how figures are summed up."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from nettorrent_mpi.app import config
from nettorrent_mpi.nn import specs

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


speed = load("speed")


@pytest.mark.parametrize("name", speed.CASES)
def test_our_command_is_a_valid_configuration(name: str) -> None:
    case = speed.CASES[name]
    command = speed.our_command(case, 2, 30, "mpirun", "runs/speed")
    sets = [value for key, value in pairwise(command) if key == "--set"]
    loaded = config.load(str(ROOT / case.config), sets)
    weights = [layer for layer in loaded.model.layers if isinstance(layer, specs.Linear | specs.Conv2d)]
    assert len(weights) == case.weight_layers
    assert (loaded.train.steps, loaded.train.batch_size) == (30 + speed.UNTIMED_STEPS, case.batch)
    assert isinstance(loaded.layout, config.Layout)
    assert [(s.layers, s.rows, s.cols) for s in loaded.layout.swarms] == [(case.weight_layers, 2, 1)]


@pytest.mark.parametrize("name", speed.CASES)
def test_pytorch_trains_the_same_network(name: str) -> None:
    pytest.importorskip("torch", reason="PyTorch, the peer, is not installed")
    peers, case = load("torch_models"), speed.CASES[name]
    peer = peers.PEERS[case.model]
    loaded = config.load(str(ROOT / case.config), ["data=" + case.data])
    assert loaded.data.shape is not None
    height, width, channels = loaded.data.shape
    assert (channels, height, width) == peer.shape
    assert loaded.data.rows == peer.rows
    ours = [
        layer.units if isinstance(layer, specs.Linear) else layer.filters
        for layer in loaded.model.layers
        if isinstance(layer, specs.Linear | specs.Conv2d)
    ]
    network = peer.build()
    theirs = [getattr(m, "out_features", None) or getattr(m, "out_channels", None) for m in network]
    assert ours == [units for units in theirs if units]
    optimizer = {specs.Adam: "Adam", specs.Rmsprop: "RMSprop"}[type(loaded.train.optimizer)]
    assert type(peer.optimizer(network)).__name__ == optimizer
    drop = [layer.rate for layer in loaded.model.layers if isinstance(layer, specs.Dropout)]
    assert drop == [m.p for m in network if type(m).__name__ == "Dropout"]


@pytest.mark.parametrize("more", [[], ["--processes", "2"]])
def test_pytorch_prints_one_line(more: list[str]) -> None:
    pytest.importorskip("torch", reason="PyTorch, the peer, is not installed")
    command = [
        sys.executable,
        "benchmarks/torch_models.py",
        "--model",
        "mlp",
        "--batch",
        "9",
        "--steps",
        "2",
        "--warmup",
        "1",
    ]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["samples_per_second"] == pytest.approx(18 / measured["seconds"])
    assert measured["parameters"] == 532_490


def test_medians_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {speed.OURS: [30.0, 10.0, 20.0], speed.TORCH: [8.0, 12.0, 10.0], speed.OURS_2: [36.0, 35.0, 37.0]}
    turns = {name: iter(values) for name, values in figures.items()}
    monkeypatch.setattr(speed, "measure", lambda case, side, steps, mpirun: next(turns[side.name]))
    case = speed.compare(speed.CASES["mlp-128"], 3, 0.01, False, "mpirun")
    rows = {row["side"]: row for row in case["sides"]}
    assert rows[speed.OURS]["median"] == 20.0
    assert rows[speed.OURS]["spread"] == 1.0
    assert rows[speed.OURS]["ratio"] == 2.0
    assert rows[speed.OURS_2]["ratio"] == 1.8
    assert rows[speed.TORCH]["ratio"] is None
    host = {"cpu": "A", "cores": 2, "python": "3", "packages": {"numpy": "2"}, "blas": [], "commit": "c", "date": "d"}
    table = speed.to_markdown({"repeats": 3, "host": host, "command": "speed", "cases": [case]})
    assert "| mlp | 128 | 2 ranks, rows | 36 | 6% | 1.80 | 1 rank |" in table


def test_the_processor_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    env = speed.environment()
    assert "OPENBLAS_CORETYPE" not in env
    assert env["OMP_NUM_THREADS"] == env["OPENBLAS_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "1"
