"""`nettorrent export`: the same run as a file of each kind, which gives the run's answers without this package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nettorrent_mpi as nt
from nettorrent_mpi.__main__ import main
from nettorrent_mpi.cli import export as exporting
from nettorrent_mpi.data.rows import private, unlimited
from nettorrent_mpi.engine.model_file import read_arrays
from nettorrent_mpi.plan import specs

CONFIG = """\
data: {name: digits, mean: 0.3, std: 0.4}
model:
  layers:
    - conv2d: {filters: 6, padding: same, activation: relu}
    - max_pool2d: 2
    - flatten
    - batch_norm
    - linear: 10
train: {epochs: 2, batch_size: 32, optimizer: {adam: 0.01}}
"""


INSTALLED = [ending for ending, name in {".pt": "torch", ".onnx": "onnx"}.items() if importlib.util.find_spec(name)]


class Run:
    """A trained network, the rows of its test set as they are stored, and its own answers."""

    def __init__(self, folder: Path):
        config = folder / "config.yaml"
        config.write_text(CONFIG)
        self.folder = folder / "run"
        assert main(["train", str(config), "--output", str(self.folder)]) == 0
        planned = nt.plan(nt.load_config(self.folder / "config.yaml"))
        test = planned.setup.dataset.test
        assert test is not None
        raw = np.empty((test.rows, int(np.prod(test.shape))), np.uint8)
        test.open_rows(private, unlimited)(np.arange(test.rows), raw)
        self.x, self.labels = raw.reshape(test.rows, *test.shape), test.targets()
        self.x_first = np.ascontiguousarray(np.moveaxis(self.x, -1, 1))
        with nt.Trainer(planned) as trainer:
            trainer.load(self.folder)
            self.y = trainer.predict(self.x)
        self.accuracy = json.loads((self.folder / "summary.json").read_text())["test_accuracy"]

    def check(self, y: Any) -> None:
        np.testing.assert_allclose(y, self.y, rtol=1e-4, atol=1e-5 * np.abs(self.y).max())
        np.testing.assert_array_equal(np.argmax(y, 1), np.argmax(self.y, 1))
        assert float(np.mean(np.argmax(y, 1) == self.labels)) == pytest.approx(self.accuracy, abs=1e-9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = Run(tmp_path_factory.mktemp("run"))
    assert made.accuracy > 0.8
    return made


def test_npz(run: Run, tmp_path: Path) -> None:
    """NumPy alone computes the network's outputs by what the file says."""
    assert main(["export", str(run.folder), "-o", str(tmp_path / "run.npz")]) == 0
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        arrays = dict(file)
    data, model = json.loads(str(arrays.pop("data"))), json.loads(str(arrays.pop("model")))
    assert "(height, width, channels, filters)" in str(arrays.pop("conventions")).replace("\n", " ")
    assert arrays.keys() == read_arrays(run.folder / "model.h5").keys()
    assert [next(iter(layer)) for layer in model["layers"]] == [
        "conv2d", "max_pool2d", "flatten", "batch_norm", "linear",
    ]  # fmt: skip
    assert data["class_names"] == list("0123456789")
    x = (run.x * data["unit"] - data["mean"][0]) / data["std"][0]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))  # (row, height, width, in, kh, kw)
    y = np.maximum(np.einsum("bhwipq,pqio->bhwo", windows, arrays["conv2d1/weight"]) + arrays["conv2d1/bias"], 0)
    y = y.reshape(len(x), 4, 2, 4, 2, 6).max((2, 4)).reshape(len(x), -1)
    norm = {name: arrays[f"batch_norm1/{name}"] for name in ("weight", "bias", "running_mean", "running_var")}
    eps = model["layers"][3]["batch_norm"]["eps"]
    y = (y - norm["running_mean"]) / np.sqrt(norm["running_var"] + eps) * norm["weight"] + norm["bias"]
    run.check(y @ arrays["linear1/weight"] + arrays["linear1/bias"])


@pytest.mark.parametrize("place", ["", "model.h5", "checkpoints"])
def test_pt(run: Run, tmp_path: Path, place: str) -> None:
    torch = pytest.importorskip("torch")
    from nettorrent_mpi.torch import load_run

    target = tmp_path / "run.pt"
    assert main(["export", str(run.folder / place), "-o", str(target)]) == 0
    for loaded in (load_run(run.folder / place), load_run(target)):
        assert (loaded.class_names, loaded.classes, loaded.input_shape) == (tuple("0123456789"), 10, (1, 8, 8))
        with torch.no_grad():
            run.check(loaded(torch.as_tensor(run.x_first)).numpy())
    # By PyTorch alone.
    found = torch.load(target, weights_only=True)
    plain = torch.nn.Sequential()
    plain.add_module("conv2d1", torch.nn.Conv2d(1, 6, 3, padding=1))
    plain.add_module("relu", torch.nn.ReLU())
    plain.add_module("pool", torch.nn.MaxPool2d(2))
    plain.add_module("flatten", torch.nn.Flatten())
    plain.add_module("batch_norm1", torch.nn.BatchNorm1d(96))
    plain.add_module("linear1", torch.nn.Linear(96, 10))
    plain.load_state_dict(found["state_dict"])
    x = (torch.as_tensor(run.x_first) * found["data"]["unit"] - found["data"]["mean"][0]) / found["data"]["std"][0]
    with torch.no_grad():
        run.check(plain.eval()(x).numpy())


def test_onnx(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    target = tmp_path / "run.onnx"
    assert main(["export", str(run.folder), "-o", str(target)]) == 0
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    run.check(session.run(None, {"input": run.x_first})[0])
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == list("0123456789")


def test_h5(run: Run, tmp_path: Path) -> None:
    """A checkpoint becomes a file that the package itself reads."""
    target = tmp_path / "run.h5"
    assert main(["export", str(run.folder / "checkpoints"), "-o", str(target)]) == 0
    with nt.Trainer(nt.plan(nt.load_config(run.folder / "config.yaml"))) as trainer:
        trainer.load(target)
        run.check(trainer.predict(run.x))
    pytest.importorskip("torch")
    from nettorrent_mpi.torch import load_run

    assert load_run(target).classes == 10


def refusal(capfd: pytest.CaptureFixture[str], *command: str | Path) -> str:
    capfd.readouterr()
    assert main([*map(str, command)]) == 2
    told = capfd.readouterr().err
    assert told.startswith("nettorrent: error: ")
    assert told.count("\n") == 1
    return told


def test_refusals(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run.npz"
    target.write_bytes(b"mine")
    told = refusal(capfd, "export", run.folder, "-o", target)
    assert "run.npz exists: choose another name with --output FILE, or replace it with --overwrite" in told
    assert target.read_bytes() == b"mine"
    assert main(["export", str(run.folder), "-o", str(target), "--overwrite"]) == 0
    assert np.load(target)["linear1/bias"].shape == (10,)
    told = refusal(capfd, "export", run.folder, "-o", tmp_path / "run.txt")
    assert "the file's name must end in .h5, .npz, .pt, .onnx" in told
    for ending in (".h5", ".npz", *INSTALLED):
        assert "missing does not exist: name the folder of a run" in refusal(
            capfd, "export", tmp_path / "missing", "-o", tmp_path / f"x{ending}"
        )
        assert "make it (mkdir -p " in refusal(capfd, "export", run.folder, "-o", tmp_path / "no" / f"x{ending}")
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]


@pytest.mark.parametrize(("ending", "package"), [(".pt", "torch"), (".onnx", "onnx")])
def test_a_missing_package_is_named(
    run: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
    package: str,
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("importlib.import_module", missing)
    told = refusal(capfd, "export", run.folder, "-o", tmp_path / f"run{ending}")
    assert f"needs the package {package}, which is not installed: pip install 'nettorrent_mpi[{package}]'" in told
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_leaves_nothing(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(part: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nettorrent_mpi.data.storage.flush", full)
    told = refusal(capfd, "export", run.folder, "-o", tmp_path / "run.npz")
    assert "run.npz could not be written: the disk is full" in told
    assert not [*tmp_path.iterdir()]


OWN = """
from dataclasses import dataclass
import numpy as np
import nettorrent_mpi as nt
from nettorrent_mpi.nn.layers.activations import Activation

@dataclass(frozen=True)
class Doubled(nt.LayerSpec):
    kind = "doubled"

@nt.register_layer(Doubled)
class DoubledLayer(Activation):
    def apply(self, x, y, ctx):
        np.multiply(x, 2, out=y)
        return y

    def differentiate(self, saved, dy, ctx):
        dy *= 2
"""


def test_layers_of_somebodys_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Others have no formulas for them, whether or not this process has."""
    scope: dict[str, Any] = {"__name__": "somebodys"}
    exec(OWN, scope)

    def check() -> None:
        assert main(["export", str(tmp_path / "own.h5"), "-o", str(tmp_path / "own.npz"), "--overwrite"]) == 0
        for ending in INSTALLED:
            told = refusal(capfd, "export", tmp_path / "own.h5", "-o", tmp_path / f"own{ending}")
            assert "own.h5: its layer doubled is not one of the package's" in told
            assert "export the arrays to .npz or .h5" in told

    try:
        x, y = np.random.default_rng(0).normal(size=(12, 3)), np.arange(12) % 2
        layers = [nt.Linear(4), nt.Residual((scope["Doubled"](), nt.Linear(4))), nt.Linear(2)]
        with nt.Trainer(layers, (x, y), batch_size=4, epochs=1) as trainer:
            list(trainer.train())
            trainer.save(tmp_path / "own.h5")
        check()
    finally:
        del specs.LAYERS["doubled"]
    check()
    assert {path.name for path in tmp_path.iterdir()} == {"own.h5", "own.npz"}


def test_every_kind_of_file_is_written_by_one_function() -> None:
    assert [*exporting._WRITERS] == [".h5", ".npz", ".pt", ".onnx"]
