"""Training equals PyTorch: 20 full-batch steps of every layer, loss, optimizer and schedule, in float64, to 1e-8.

A run of no steps gives the initial weights, with which PyTorch trains the same network on the same rows
(programs/train_with_torch.py); a run of 20 steps gives those it is compared with. Both go through the command line, in
one process for nearly all cases. A bias before a batch norm has no gradient but rounding, which Adam and its like would
scale up to a step of full length, so there is none.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

if importlib.util.find_spec("torch") is None:
    pytest.skip("PyTorch, to compare with, is not installed (the extra `compare`)", allow_module_level=True)

pytestmark = pytest.mark.slow  # tests/nn compares layers and optimizers one by one

HERE = Path(__file__).resolve().parent
Run = subprocess.CompletedProcess[str]
STEPS, ROWS, LR = 20, 22, 0.05
INPUTS: dict[str, tuple[int, ...]] = {"row": (6,), "image": (7, 6, 3), "bytes": (7, 6, 3)}
BYTES: dict[str, Any] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}

MLP: list[Any] = [{"linear": {"units": 7, "activation": "tanh"}}, {"linear": 4}]
MOMENTUM = {"sgd": {"lr": LR, "momentum": 0.9}}
HEAD = ["flatten", {"linear": 4}]


def case(
    layers: list[Any],
    *,
    inputs: str = "row",
    targets: str = "classes",
    loss: Any = "cross_entropy",
    optimizer: Any = MOMENTUM,
    micro_batches: int = 3,  # batch norm has the statistics of a micro-batch: 1 there
    **train: Any,
) -> dict[str, Any]:
    told = {"optimizer": optimizer, "steps": STEPS, "batch_size": ROWS, "micro_batches": micro_batches, **train}
    data = {"name": "hdf5", "root": f"{inputs} {targets}.h5", **(BYTES if inputs == "bytes" else {})}
    report = {"report_every": 1}
    return {"dtype": "float64", "data": data, "model": {"layers": layers, "loss": loss}, "train": told | report}


def image(*layers: Any, **options: Any) -> dict[str, Any]:
    return case([*layers, *HEAD], inputs="image", **options)


def conv(**options: Any) -> dict[str, Any]:
    return {"conv2d": {"filters": 4, **options}}


BLOCK = {"layers": [conv(padding="same", bias=False), "batch_norm", "relu", conv(padding="same", bias=False)]}
PROJECTION = {
    "layers": [conv(padding="same", stride=2, activation="gelu"), conv(padding="same")],
    "shortcut": [conv(kernel=1, stride=2, bias=False)],
}
ADAM = {"adam": {"lr": 0.01}}
CASES: dict[str, dict[str, Any]] = {
    # optimizers
    "sgd": case(MLP, optimizer={"sgd": {"lr": 0.1}}),
    "sgd with momentum": case(MLP),
    "sgd with Nesterov": case(MLP, optimizer={"sgd": {"lr": LR, "momentum": 0.8, "nesterov": True}}),
    "sgd with dampening": case(MLP, optimizer={"sgd": {"lr": LR, "momentum": 0.9, "dampening": 0.4}}),
    "sgd with decay": case(MLP, optimizer={"sgd": {"lr": LR, "momentum": 0.9, "weight_decay": 0.03}}),
    "adagrad": case(MLP, optimizer={"adagrad": {"lr": LR}}),
    "adagrad with decays": case(
        MLP, optimizer={"adagrad": {"lr": LR, "lr_decay": 0.1, "initial_accumulator": 0.01, "weight_decay": 0.02}}
    ),
    "rmsprop": case(MLP, optimizer={"rmsprop": {"lr": 0.01}}),
    "rmsprop with momentum": case(MLP, optimizer={"rmsprop": {"lr": 0.003, "alpha": 0.9, "momentum": 0.8}}),
    "rmsprop centered": case(MLP, optimizer={"rmsprop": {"lr": 0.01, "centered": True, "eps": 1e-3}}),
    "rmsprop with all": case(
        MLP, optimizer={"rmsprop": {"lr": 0.003, "centered": True, "momentum": 0.7, "weight_decay": 0.02, "eps": 1e-4}}
    ),
    "adam": case(MLP, optimizer=ADAM),
    "adam with decay": case(MLP, optimizer={"adam": {"lr": 0.01, "betas": [0.8, 0.95], "weight_decay": 0.05}}),
    "adam with eps": case(MLP, optimizer={"adam": {"lr": 0.01, "eps": 1e-3}}),
    "adamw": case(MLP, optimizer={"adamw": {"lr": 0.01}}),
    "adamw with decay": case(MLP, optimizer={"adamw": {"lr": 0.02, "betas": [0.7, 0.99], "weight_decay": 0.3}}),
    # clipping, schedules
    "clipped": case(MLP, clip_norm=0.05),
    "clipped at times": case(MLP, clip_norm=0.35),
    "clipped with decay": case(MLP, optimizer={"adam": {"lr": 0.01, "weight_decay": 0.1}}, clip_norm=0.1),
    "never clipped": case(MLP, clip_norm=1e6),
    "step": case(MLP, schedule={"step": {"every_steps": 6, "factor": 0.5}}),
    "exponential": case(MLP, schedule={"exponential": 0.9}),
    "cosine": case(MLP, schedule="cosine"),
    "cosine to a part": case(MLP, optimizer=ADAM, schedule={"cosine": {"final": 0.1}}),
    "warm-up": case(MLP, schedule={"constant": {"warmup_steps": 5}}),
    "warm-up and step": case(MLP, schedule={"step": {"every_steps": 4, "warmup_steps": 3}}),
    "warm-up and exponential": case(MLP, schedule={"exponential": {"factor_per_epoch": 0.8, "warmup_steps": 4}}),
    "warm-up and cosine": case(MLP, schedule={"cosine": {"final": 0.2, "warmup_steps": 6}}),
    # losses
    "label smoothing": case(MLP, loss={"cross_entropy": 0.2}),
    "class weights": case(MLP, loss={"cross_entropy": {"label_smoothing": 0.2, "class_weights": [1, 0, 0.3, 4]}}),
    "balanced classes": case(MLP, loss={"cross_entropy": {"class_weights": "balanced"}}),
    "binary, one logit": case([{"linear": 1}], targets="two classes", loss="binary_cross_entropy"),
    "binary, one number": case([{"linear": 1}], targets="number", loss="binary_cross_entropy"),
    "binary, numbers": case(MLP, targets="numbers", loss="binary_cross_entropy"),
    "binary, one-hot": case(MLP, loss="binary_cross_entropy"),
    "squared error, one number": case([{"linear": 1}], targets="number", loss="mean_squared_error"),
    "squared error, one label": case([{"linear": 1}], loss="mean_squared_error"),
    "squared error, numbers": case(MLP, targets="numbers", loss="mean_squared_error"),
    "squared error, one-hot": case(MLP, loss="mean_squared_error"),
    # layers
    "linear without bias": case([{"linear": {"units": 5, "bias": False}}, {"linear": {"units": 4, "bias": False}}]),
    **{
        f"activation {kind}": case([{"linear": {"units": 9, "activation": kind}}, {"linear": 4}])
        for kind in ("relu", "leaky_relu", "sigmoid", "tanh", "gelu")
    },
    **{
        f"layer {kind}": case([{"linear": 9}, kind if slope is None else {kind: slope}, {"linear": 4}], optimizer=ADAM)
        for kind, slope in (("relu", None), ("leaky_relu", 0.3), ("sigmoid", None), ("tanh", None), ("gelu", None))
    },
    "flatten": case(["flatten", *MLP], inputs="image"),
    "bytes": case(["flatten", *MLP], inputs="bytes"),
    "dropout of nothing": case([MLP[0], {"dropout": 0.0}, MLP[1]]),
    "conv2d": image(conv(activation="relu"), conv(activation="relu")),
    "conv2d same": image(conv(padding="same", activation="relu"), conv(padding="same"), optimizer=ADAM),
    "conv2d 1x1": image(conv(kernel=1, activation="tanh"), conv(kernel=1, stride=2)),
    "conv2d stride 2": image(conv(stride=2), conv(stride=2, padding="same")),
    "conv2d same stride 2": image(conv(stride=2, padding="same"), conv(stride=2, padding="same")),
    "conv2d uneven": image(conv(kernel=[3, 5], stride=[2, 1], padding="same"), conv(kernel=[2, 3], stride=[1, 2])),
    "conv2d even same": image(conv(kernel=2, padding="same"), conv(kernel=4, padding="same", bias=False)),
    "conv2d stride over kernel": image(conv(kernel=1), conv(kernel=2, stride=3)),
    "max_pool2d": image(conv(padding="same"), {"max_pool2d": 2}),
    "max_pool2d overlapping": image(conv(padding="same"), {"max_pool2d": {"size": 3, "stride": [1, 2]}}),
    "max_pool2d with gaps": image(conv(padding="same"), {"max_pool2d": {"size": [1, 2], "stride": 3}}),
    "avg_pool2d": image(conv(padding="same"), {"avg_pool2d": 2}),
    "avg_pool2d overlapping": image(conv(padding="same"), {"avg_pool2d": {"size": [3, 2], "stride": 1}}),
    "pools first": image({"avg_pool2d": {"size": 2, "stride": 1}}, {"max_pool2d": 2}, conv(kernel=2)),
    "global_avg_pool2d": case([conv(activation="relu"), "global_avg_pool2d", {"linear": 4}], inputs="image"),
    "batch_norm": case([{"linear": {"units": 8, "bias": False}}, "batch_norm", "relu", MLP[1]], micro_batches=1),
    "batch_norm with options": case(
        [{"batch_norm": {"momentum": 0.3, "eps": 0.01}}, MLP[0], {"batch_norm": {"momentum": 0.02}}, MLP[1]],
        optimizer=ADAM, micro_batches=1,
    ),
    "batch_norm of images": image(conv(bias=False), "batch_norm", "relu", {"max_pool2d": 2}, micro_batches=1),
    "layer_norm": case([MLP[0], "layer_norm", MLP[1]], optimizer=ADAM),
    "layer_norm with eps": case([{"linear": 8}, {"layer_norm": 0.1}, "gelu", MLP[1]]),
    "layer_norm of images": image(conv(), "layer_norm", "relu", conv(stride=2)),
    "residual": image(conv(activation="relu"), {"residual": BLOCK}, "batch_norm", "relu", micro_batches=1),
    "residual with projection": image({"residual": PROJECTION}, "relu", {"residual": PROJECTION}),
    "residual of rows": case(
        [{"linear": 7}, {"residual": {"layers": [MLP[0], "layer_norm"]}}, MLP[1]]
    ),
    "all together": image(
        conv(bias=False, padding="same"), "batch_norm", "relu", {"residual": BLOCK}, "batch_norm", {"dropout": 0.0},
        {"residual": PROJECTION | {"name": "last"}}, "gelu", {"avg_pool2d": 2},
        loss={"cross_entropy": 0.1}, optimizer={"adamw": {"lr": 0.01, "weight_decay": 0.1}},
        schedule={"cosine": {"warmup_steps": 3}}, clip_norm=0.5, micro_batches=1,
    ),
}  # fmt: skip


# ---- running and comparing ---------------------------------------------------------------------------------------
def write_data(path: Path) -> None:
    """The data set "INPUTS TARGETS.h5"."""
    inputs, _, targets = path.stem.partition(" ")
    random = np.random.default_rng(7)
    x = random.normal(size=(ROWS, *INPUTS[inputs]))
    y: Any = random.integers(0, 4, ROWS)
    if targets == "two classes":
        y %= 2
    elif targets != "classes":
        y = random.uniform(size=(ROWS, 1 if targets == "number" else 4))
    with h5py.File(path, "w") as file:
        file["x"] = random.integers(0, 256, x.shape, np.uint8) if inputs == "bytes" else x
        file["y"] = y


def prepare(folder: Path, config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Write configuration and data; gives the arguments of the run of no steps and of the whole one."""
    folder.mkdir()
    data = folder.parent / config["data"]["root"]
    if not data.exists():
        write_data(data)
    config = config | {"data": config["data"] | {"root": str(data)}}
    path = folder / "config.json"
    path.write_text(json.dumps(config))  # YAML too
    initial = [str(path), "--output", str(folder / "initial"), "--set", "train.steps=0"]
    return initial, [str(path), "--output", str(folder / "run")]


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file["parameters"].visititems(
            lambda key, item: arrays.update({key: item[...]}) if isinstance(item, h5py.Dataset) else None
        )
    return arrays


def compare(folder: Path, run: Path) -> None:
    """Every array of the run, and how far it came, to 1e-8 of the largest number in it; the curve of the loss."""
    ours, initial = arrays_of(run / "model.h5"), arrays_of(folder / "initial" / "model.h5")
    theirs = dict(np.load(folder / "torch.npz"))
    losses, rates = theirs.pop("losses"), theirs.pop("rates")
    assert ours.keys() == theirs.keys() == initial.keys()
    for key, array in ours.items():
        assert array.dtype == np.float64, key
        assert array.shape == theirs[key].shape, key
        far, apart = np.abs(theirs[key] - initial[key]).max(), np.abs(array - theirs[key]).max()
        assert far > 1e-4, f"{key} has hardly been trained: {far}"
        assert apart <= 1e-8 * min(far, np.abs(theirs[key]).max()), f"{key}: {apart} apart, having come {far}"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([record["train_loss"] for record in metrics], losses, rtol=1e-9)
    np.testing.assert_allclose([record["learning_rate"] for record in metrics], rates, rtol=1e-12, atol=1e-18)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mpirun: Callable[..., Run]) -> dict[str, tuple[Path, str]]:
    """The folder of each case, trained by both, and what our two runs told where one of them failed."""
    root = tmp_path_factory.mktemp("against_torch")
    folders = {name: root / name for name in CASES}
    commands = [["train", *args] for name, config in CASES.items() for args in prepare(folders[name], config)]
    (root / "commands").write_text(json.dumps(commands))
    done = mpirun(1, [HERE / "programs" / "commands.py", root / "commands"], timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads((root / "commands.done").read_text())
    told = ["".join(text for code, text in results[i : i + 2] if code) for i in range(0, len(results), 2)]
    good = [str(folder) for folder, text in zip(folders.values(), told, strict=True) if not text]
    program = [sys.executable, str(HERE / "programs" / "train_with_torch.py"), *good]
    torch = subprocess.run(program, capture_output=True, text=True, timeout=120)  # mpirun is not needed
    assert torch.returncode == 0, torch.stderr
    return {name: (folders[name], text) for name, text in zip(CASES, told, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_training_equals_pytorch(trained: dict[str, tuple[Path, str]], name: str) -> None:
    folder, failure = trained[name]
    assert not failure, failure
    compare(folder, folder / "run")


@pytest.mark.parametrize("ranks", [1, 3])
def test_from_the_command_line(
    mpirun: Callable[..., Run], tmp_path: Path, trained: dict[str, tuple[Path, str]], ranks: int
) -> None:
    folder, failure = trained["all together"]
    assert not failure, failure
    done = mpirun(ranks, ["-m", "nettorrent_mpi.train", folder / "config.json", "--output", tmp_path / "run"])
    assert done.returncode == 0, done.stderr
    compare(folder, tmp_path / "run")
