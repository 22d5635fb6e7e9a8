"""PyTorch's side: the same network with the same weights, trained on the same rows."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("PyTorch, to compare with, is not installed (the extra `compare`)", allow_module_level=True)

import torch

from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.data.augment import Augment
from nettorrent_mpi.device.arrays import Workspace
from nettorrent_mpi.device.device import make_device
from nettorrent_mpi.engine.model_file import read_arrays
from nettorrent_mpi.engine.setup import Setup, set_up
from nettorrent_mpi.nn.layer import Context
from nettorrent_mpi.speedup import torch_peer, torch_rows
from nettorrent_mpi.torch.networks import TorchNetwork

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"mnist": (28, 28, 1), "mnist_wide": (28, 28, 1), "letters": (28, 28, 1), "digits": (8, 8, 1)}
NORMED = """\
dtype: float64
data: {name: synthetic, rows: 70, test_rows: 20, shape: [6, 6, 3], classes: 4, augment: [flip, crop], std: [0.5, 1, 1]}
model:
  layers:
    - conv2d: {filters: 5, padding: same, bias: false}
    - batch_norm
    - relu
    - residual: {layers: [{conv2d: {filters: 5, padding: same, activation: gelu}}]}
    - max_pool2d: 2
    - flatten
    - linear: 4
  loss: {cross_entropy: {label_smoothing: 0.1, class_weights: [1, 0.2, 3, 0.5]}}
train: {steps: 8, batch_size: 32, micro_batches: 3, clip_norm: 0.5, schedule: cosine, optimizer: {adamw: {lr: 0.01}}}
"""


def synthetic(name: str) -> Setup:
    """A shipped configuration in float64 on a few rows of the right shape."""
    shape = list(SHAPES.get(name, (32, 32, 3)))
    classes = 26 if name == "letters" else 10
    data = f"data={{name: synthetic, rows: 8, test_rows: 0, shape: {shape}, classes: {classes}}}"
    return set_up(configuration.load(f"{ROOT}/configs/{name}.yaml", [data, "dtype=float64", "train.batch_size=8"]), 1)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
def test_same_parameters_and_outputs(name: str) -> None:
    torch.set_num_threads(1)
    setup = synthetic(name)
    whole = setup.network.stage(0, setup.network.weight_layers, 1, 0)
    random = np.random.default_rng(3)
    weights = {
        key: value + 0.1 * random.random(value.shape) for key, value in torch_peer.initial_weights(setup).items()
    }
    x = random.random((3, *setup.dataset.shape))
    theirs = TorchNetwork(setup.network).double()
    theirs.load(weights)
    parameters = sum(parameter.numel() for parameter in theirs.parameters())
    assert parameters == sum(layer.parameters for layer in setup.network.facts)
    for key, array in theirs.arrays().items():
        np.testing.assert_array_equal(array, weights[key])
    theirs.eval()
    ours, _ = whole.forward(
        weights, x.copy(), Context(make_device().ops, Workspace(np.dtype(np.float64)), training=False, count=3)
    )
    with torch.no_grad():
        y = theirs(torch.tensor(np.moveaxis(x, -1, 1))).numpy()
    np.testing.assert_allclose(y, ours, rtol=1e-9, atol=1e-11)


def test_why_compiling_fails_is_told_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand many more lines")

    monkeypatch.setattr(torch, "compile", broken)
    path = tmp_path / "normed.yaml"
    path.write_text(NORMED)
    monkeypatch.setattr("sys.argv", ["torch_peer", str(path), "--compile"])
    assert torch_peer.main() == 1
    assert capsys.readouterr().err.splitlines()[-1] == "RuntimeError: no compiler"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("augment", [(), ("flip", "crop")])
@pytest.mark.parametrize("shape", [(6, 6, 3), (9,)])
def test_same_rows(shape: tuple[int, ...], augment: tuple[str, ...], channels_last: bool) -> None:
    if augment and len(shape) == 1:
        pytest.skip("only images are augmented")
    data = f"data={{name: synthetic, rows: 40, shape: {list(shape)}, classes: 3, mean: 0.3, std: 0.7}}"
    layers = "model.layers=[flatten, {linear: 3}]" if len(shape) == 3 else "model.layers=[{linear: 3}]"
    setup = set_up(configuration.load(None, [data, layers]), 1)
    made = Augment(augment, shape) if augment else None
    rows = setup.sampler.rows(0)
    x, targets = torch_rows.Rows(setup.dataset.train, torch.float64, made, channels_last).batch(rows, 5)
    wanted = np.empty((len(rows), *shape))
    setup.dataset.train.inputs().batch(rows, wanted, made, 5)
    np.testing.assert_allclose(np.moveaxis(x.numpy(), 1, -1) if len(shape) == 3 else x.numpy(), wanted, rtol=1e-14)
    np.testing.assert_array_equal(targets.numpy(), setup.dataset.train.targets()[rows])
    assert x.is_contiguous(
        memory_format=torch.channels_last if channels_last and len(shape) == 3 else torch.contiguous_format
    )


@pytest.mark.parametrize("names", [("flip",), ("crop",), ("flip", "crop")])
@pytest.mark.parametrize("shape", [(6, 5, 3), (3, 9, 1)])
def test_rows_are_augmented_on_a_gpu_as_here(names: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """By operations of PyTorch's, which a CPU has, too."""
    random = np.random.default_rng(1)
    rows, chosen = random.integers(0, 256, (31, *shape), np.uint8), random.permutation(31)[:17]
    augment = Augment(names, shape)
    for key in (0, 5, (1 << 64) - 3, 1 << 63):
        tensors = torch.tensor(rows), torch.tensor(chosen), key, augment
        theirs, ours = torch_rows.augmented(*tensors), torch_rows.augmented_on_host(*tensors)
        np.testing.assert_array_equal(theirs.numpy(), ours.numpy())
        assert (ours.numpy() != rows[chosen]).any()


def test_epochs_are_ordered_alike_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = set_up(configuration.load(None, ["train.batch_size=100"]), 1)
    options = argparse.Namespace(processes=1, channels_last=False, compile=False, device="cpu")
    peer, steps = torch_peer.Peer(setup, options, 0), setup.sampler.steps_per_epoch
    monkeypatch.setattr(peer, "_device", torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    for n in (0, 1, steps - 1, steps, 2 * steps + 1, 0):
        np.testing.assert_array_equal(np.asarray(peer._rows(n)), setup.sampler.rows(n))
        assert setup.sampler.size(n) == len(setup.sampler.rows(n))


def test_bfloat16_keeps_weights_of_float32() -> None:
    torch.set_num_threads(1)
    setup = set_up(configuration.load(None, ["device=gpu", "dtype=bfloat16", "train.batch_size=64"]), 1)
    options = argparse.Namespace(processes=1, channels_last=False, compile=False, device="cpu")
    peer = torch_peer.Peer(setup, options, 0)
    before = {key: array.copy() for key, array in peer.network.arrays().items()}
    kinds: list[torch.dtype] = []
    peer.network.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    peer.step(0, 0.01)
    assert kinds == [torch.bfloat16]
    for key, array in peer.network.arrays().items():
        assert array.dtype == np.float32
        assert (array != before[key]).any()


def test_no_gpu_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    path = tmp_path / "normed.yaml"
    path.write_text(NORMED)
    monkeypatch.setattr("sys.argv", ["torch_peer", str(path), "--device", "cuda"])
    assert torch_peer.main() == 2
    assert capsys.readouterr().err == (
        f"torch_peer: error: PyTorch {torch.__version__} finds no GPU: is it one for CPUs only?\n"
    )


def test_same_training(tmp_path: Path, mpirun: Any) -> None:
    """Batch norm of micro-batches, augmentation, clipping, a shorter mini-batch at the end of an epoch."""
    torch.set_num_threads(1)
    path = tmp_path / "normed.yaml"
    path.write_text(NORMED)
    done = mpirun(1, ["-m", "nettorrent_mpi.train", path, "--output", tmp_path / "run"])
    assert done.returncode == 0, done.stderr
    setup = set_up(configuration.load(str(path)), 1)
    options = argparse.Namespace(processes=1, channels_last=True, compile=False, device="cpu")
    peer = torch_peer.Peer(setup, options, 0)
    train = setup.config.train
    (norm,) = (module for module in peer.network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    for n in range(8):  # 6 rows, in place of 10 or 11, move the running statistics less
        norm.momentum = 0.1 * ((6 * 36 - 1) / (10 * 36 - 1) if n % 3 == 2 else 1)
        peer.step(n, torch_peer.make_rate(train.schedule, 0.01, 8, 3)(n))
    ours = read_arrays(tmp_path / "run" / "model.h5")
    for key, array in peer.network.arrays().items():
        np.testing.assert_allclose(array, ours[key], rtol=1e-8, atol=1e-10, err_msg=key)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert peer.accuracy() is None
    peer.read_judged()
    assert peer.accuracy() == summary["test_accuracy"]
