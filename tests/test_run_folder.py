"""What a run leaves behind, and what the other commands make of it."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest

from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config import writing
from nettorrent_mpi.plan.actions import step_end
from nettorrent_mpi.plan.schedule import build

HERE = Path(__file__).resolve().parent
DIGITS = HERE.parent / "configs" / "digits.yaml"
Mpirun = Callable[..., subprocess.CompletedProcess[str]]

# Three weight layers: on three ranks each is one rank's, and there is a batch norm with running statistics.
CONFIG = """\
seed: 5
dtype: float64
data: {name: digits, validation: 0.1}
model:
  layers:
    - conv2d: {filters: 6, kernel: 3, stride: 2, bias: false, name: first}
    - batch_norm
    - relu
    - flatten
    - linear: {units: 16, activation: relu}
    - linear: {units: 10}
  loss: {cross_entropy: {label_smoothing: 0.1}}
train:
  epochs: 3
  batch_size: 50
  micro_batches: 2
  report_every: 10
  optimizer: {adam: {lr: 0.01}}
layout: {swarms: [{}, {}, {}]}
trace: true
"""
CHANGES = ["train.schedule={exponential: 0.9}", "train.clip_norm=2.5"]
ROWS, EPOCH = 1294, 26  # training rows (1438 less a tenth), steps of 50 in an epoch; tested where they are used
SHAPES = {
    "first/weight": (3, 3, 1, 6),
    **{f"batch_norm1/{name}": (6,) for name in ("weight", "bias", "running_mean", "running_var")},
    "linear1/weight": (54, 16),
    "linear1/bias": (16,),
    "linear2/weight": (16, 10),
    "linear2/bias": (10,),
}


class Done(NamedTuple):
    folder: Path
    config: Path
    told: str

    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "summary.json").read_text()))

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def arrays(self) -> dict[str, np.ndarray]:
        return read(self.folder / "model.h5")


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a model.h5, "<layer>/<name>"."""
    arrays: dict[str, np.ndarray] = {}
    with h5py.File(path) as file:
        file["parameters"].visititems(
            lambda key, item: arrays.update({key: item[...]}) if isinstance(item, h5py.Dataset) else None
        )
    return arrays


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, mpirun: Mpirun) -> Done:
    """A run of 3 epochs on 3 ranks."""
    root = tmp_path_factory.mktemp("run_folder")
    config = root / "small.yaml"
    config.write_text(CONFIG)
    changes = [word for change in CHANGES for word in ("--set", change)]
    run = mpirun(3, ["-m", "nettorrent_mpi.train", config, *changes, "--output", root / "run"])
    assert run.returncode == 0, run.stderr
    return Done(root / "run", config, run.stdout)


def commands(mpirun: Mpirun, folder: Path, *lists: Sequence[str | Path]) -> list[tuple[int, str]]:
    """(exit code, text) of each command, all run in one process."""
    file = folder / "commands"
    file.write_text(json.dumps([list(map(str, arguments)) for arguments in lists]))
    run = mpirun(1, [HERE / "programs" / "commands.py", file])
    assert run.returncode == 0, run.stderr
    return [(code, text) for code, text in json.loads(file.with_name("commands.done").read_text())]


def test_files(done: Done) -> None:
    there = {path.name for path in done.folder.iterdir()} - {"checkpoints"}
    assert there == {"config.yaml", "metrics.jsonl", "summary.json", "model.h5", "trace.json"}


def test_configuration_is_complete(done: Done, tmp_path: Path, mpirun: Mpirun) -> None:
    path = done.folder / "config.yaml"
    asked = configuration.load(str(done.config), [*CHANGES, f"output={done.folder}"])
    assert configuration.load(str(path)) == asked
    for key in ("eps: 1.0e-05", "betas:", "weight_decay:", "  allreduce: {}", "  1f1b: {}", "clip_norm: 2.5"):
        assert key in path.read_text()  # what was left out has its default written down
    run = mpirun(3, ["-m", "nettorrent_mpi.train", path, "--output", tmp_path / "again"])
    assert run.returncode == 0, run.stderr
    again = read(tmp_path / "again" / "model.h5")
    for key, array in done.arrays().items():
        np.testing.assert_allclose(again[key], array, rtol=1e-9, atol=1e-12)


def test_metrics(done: Done) -> None:
    always = {"step": int, "epoch": float, "samples": int, "time": float, "train_loss": float}
    always |= {"learning_rate": float, "samples_per_second": float}
    scores = {"test_loss": float, "test_accuracy": float, "validation_loss": float, "validation_accuracy": float}
    lines = done.metrics()
    assert [line["step"] for line in lines] == [10, 20, 26, 30, 40, 50, 52, 60, 70, 78]
    for line in lines:
        step = line["step"]
        kinds = always | (scores if step % EPOCH == 0 else {})
        assert {key: type(value) for key, value in line.items()} == kinds
        assert line["epoch"] == pytest.approx(step / EPOCH, abs=1e-4)
        assert line["samples"] == step // EPOCH * ROWS + step % EPOCH * 50
        assert line["learning_rate"] == pytest.approx(0.01 * 0.9 ** ((step - 1) / EPOCH))
        assert all(math.isfinite(value) for value in line.values())
        assert line["samples_per_second"] > 0
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    assert lines[-1]["train_loss"] < 0.6 * lines[0]["train_loss"]
    assert 0.8 < lines[-1]["test_accuracy"] <= 1


def test_summary(done: Done) -> None:
    summary, last = done.summary(), done.metrics()[-1]
    kinds = {"world_size": int, "layout": str, "steps": int, "train_seconds": float, "samples_per_second": float}
    kinds |= {"test_accuracy": float, "final_loss": float, "stopped_by": str, "mpi": str, "host": str}
    assert {key: type(summary.get(key)) for key in kinds} == kinds
    assert "commit" in summary  # null where the package is not in a checkout
    assert (summary["world_size"], summary["steps"], summary["stopped_by"]) == (3, 78, "epochs")
    assert "first" in summary["layout"]
    assert "linear2" in summary["layout"]
    assert "Open MPI" in summary["mpi"]
    assert summary["kernels"] == ["numpy"]  # a short run
    assert summary["test_accuracy"] == last["test_accuracy"]
    assert summary["final_loss"] == last["train_loss"]
    assert 0 < summary["train_seconds"] <= last["time"]
    assert summary["samples_per_second"] > 0


def test_model(done: Done) -> None:
    arrays = done.arrays()
    assert {key: array.shape for key, array in arrays.items()} == SHAPES
    assert all(array.dtype == np.float64 and np.isfinite(array).all() for array in arrays.values())
    assert (arrays["batch_norm1/running_var"] != 1).all()
    with h5py.File(done.folder / "model.h5") as file:
        assert list(file) == ["parameters"]
        model = json.loads(file.attrs["model"])
    plain = writing.to_plain(configuration.load(str(done.folder / "config.yaml")))
    assert model == plain["model"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluate(done: Done, mpirun: Mpirun, ranks: int) -> None:
    run = mpirun(ranks, ["-m", "nettorrent_mpi", "evaluate", done.folder])
    assert run.returncode == 0, run.stderr
    last = done.metrics()[-1]
    for name in ("validation", "test"):
        wanted = f"{name}: loss {last[f'{name}_loss']:.4f}, accuracy {100 * last[f'{name}_accuracy']:.2f} %\n"
        assert run.stdout.count(wanted) == 1, run.stdout
    assert len(run.stdout.splitlines()) == 2


def test_export(done: Done, tmp_path: Path, mpirun: Mpirun) -> None:
    target, other = tmp_path / "model.npz", tmp_path / "model.txt"
    export: list[str | Path] = ["export", done.folder]
    first, second, third, fourth = commands(
        mpirun, tmp_path, [*export, target], [*export, target], [*export, other], ["export", tmp_path, target]
    )
    assert first == (0, "")
    with np.load(target, allow_pickle=False) as exported:
        arrays = done.arrays()
        assert set(exported.files) == set(arrays)
        for key, array in arrays.items():
            assert exported[key].dtype == array.dtype
            np.testing.assert_array_equal(exported[key], array)
    assert second[0] == third[0] == fourth[0] == 2
    assert re.search(r"model\.npz exists; choose another name", second[1])
    assert re.search(r"model\.txt: .* \.npz", third[1])
    assert re.search(r"model\.h5: there is no such file", fourth[1])
    assert {path.name for path in tmp_path.iterdir()} == {"commands", "commands.done", "model.npz"}


def test_trace(done: Done) -> None:
    """Each rank's spans are its list of actions once per step, and the forward passes of the evaluations."""
    trace = json.loads((done.folder / "trace.json").read_text())
    names = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert {rank: re.findall(r"stage (\d) \((.*)\)", name) for rank, name in names.items()} == {
        0: [("0", "first")],
        1: [("1", "linear1")],
        2: [("2", "linear2")],
    }
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(spans) + 3 == len(trace["traceEvents"])
    assert min(span["ts"] for span in spans) == 0
    lists = [[str(action) for action in actions] for actions in build("1f1b", 3, 2, end=step_end(clip=True))]
    for rank in range(3):
        own = [span for span in spans if span["pid"] == rank]
        for before, after in pairwise(own):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.5
            assert before["dur"] >= 0
        steps: list[list[str]] = [[] for _ in range(78)]
        for span in own:
            steps[span["args"]["step"]].append(span["name"])
        length = len(lists[rank])
        assert [step[:length] for step in steps] == [lists[rank]] * 78
        for n, step in enumerate(steps):  # evaluations count as the step before, the last one of an epoch
            rest = step[length:]
            assert {name.strip("0123456789") for name in rest} <= {"PA", "RA", "F", "WA", "SA"}
            passes = sum("F" in name for name in rest)
            assert passes >= 3 + 8 if n % 26 == 25 else passes == 0  # 144 and 359 rows, at most 50 at once


def test_the_log_has_every_report(done: Done) -> None:
    lines = done.told.splitlines()
    assert [int(found) for found in re.findall(r"^step +(\d+)/78 ", done.told, re.MULTILINE)] == [
        line["step"] for line in done.metrics()
    ]
    assert any(line.startswith("layout: ") and "3 ranks" in line for line in lines)
    assert f"run folder: {done.folder}" in lines
    assert len(lines) == 13


@pytest.mark.parametrize("held_back", [0.0, 0.1])
def test_stop_at(tmp_path: Path, mpirun: Mpirun, held_back: float) -> None:
    """Training ends after the epoch in which the accuracy, of the validation rows where there are any, is reached."""
    changes = ["train.stop_at={accuracy: 0.9}", "train.batch_size=64", f"data.validation={held_back}"]
    words = [word for change in changes for word in ("--set", change)]
    run = mpirun(2, ["-m", "nettorrent_mpi.train", DIGITS, *words, "--output", tmp_path / "run"])
    assert run.returncode == 0, run.stderr
    done = Done(tmp_path / "run", DIGITS, run.stdout)
    summary, metrics, key = done.summary(), done.metrics(), "validation_accuracy" if held_back else "test_accuracy"
    assert summary["stopped_by"] == "accuracy"
    epoch = -(-round(1438 * (1 - held_back)) // 64)
    assert summary["steps"] == metrics[-1]["step"] < 20 * epoch
    assert summary["steps"] % epoch == 0
    accuracies = [line[key] for line in metrics if "test_accuracy" in line]
    assert all(accuracy < 0.9 for accuracy in accuracies[:-1])
    assert accuracies[-1] >= 0.9
    assert summary["test_accuracy"] == metrics[-1]["test_accuracy"]
    assert done.arrays().keys() >= {"conv2d1/weight", "linear2/bias"}


def test_no_steps_gives_the_initial_weights(tmp_path: Path, mpirun: Mpirun) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG)
    steps = ["--set", "train.steps=0", "--set", "train.epochs=null", "--set", "layout=layers"]
    arrays = []
    for ranks in (1, 4):
        output = tmp_path / f"on{ranks}"
        run = mpirun(ranks, ["-m", "nettorrent_mpi.train", config, *steps, "--output", output])
        assert run.returncode == 0, run.stderr
        done = Done(output, config, run.stdout)
        assert done.metrics() == []
        summary = done.summary()
        assert (summary["steps"], summary["stopped_by"], summary["world_size"]) == (0, "steps", ranks)
        assert summary["final_loss"] is None
        assert summary["train_seconds"] == 0  # evaluation and files at the end are no training
        assert json.loads((output / "trace.json").read_text())["traceEvents"]
        arrays.append(done.arrays())
    one, four = arrays
    assert {key: array.shape for key, array in one.items()} == SHAPES
    for key, array in one.items():
        np.testing.assert_array_equal(four[key], array)
    assert one["linear1/weight"].std() > 0.01
    assert (one["batch_norm1/running_var"] == 1).all()


def test_nothing_to_evaluate_on(tmp_path: Path, mpirun: Mpirun) -> None:
    random = np.random.default_rng(0)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"], file["y"] = random.normal(size=(40, 3)), random.integers(0, 2, 40)
    config = tmp_path / "config.yaml"
    data, model = f"{{name: hdf5, root: {tmp_path}/data.h5}}", "{layers: [{linear: 2}]}"
    config.write_text(f"data: {data}\nmodel: {model}\ntrain: {{steps: 2, batch_size: 8}}\n")
    run, evaluation = commands(
        mpirun, tmp_path, ["train", config, "--output", tmp_path / "run"], ["evaluate", tmp_path / "run"]
    )
    assert run[0] == 0, run[1]
    done = Done(tmp_path / "run", config, run[1])
    assert done.metrics()[-1]["test_accuracy"] is None
    assert done.summary()["test_accuracy"] is None
    assert evaluation[0] == 2
    assert re.search(r"error: .*data\.h5: has no test set", evaluation[1])


HELP = {
    "": "COMMAND",
    "train": "CONFIG",
    "evaluate": "RUN",
    "export": "FILE.npz",
    "speedup": "CONFIG",
    "data": "ACTION",
    "data fetch": "NAME",
    "data import": "FILE.h5",
}


def test_help(tmp_path: Path, mpirun: Mpirun) -> None:
    told = commands(mpirun, tmp_path, *([*command.split(), "--help"] for command in HELP))
    for (command, word), (code, text) in zip(HELP.items(), told, strict=True):
        assert code == 0
        assert text.startswith(f"usage: nettorrent {command}".rstrip())
        assert word in text


@pytest.mark.parametrize("command", ["train", "export", "data fetch"])
def test_help_is_told_once(mpirun: Mpirun, command: str) -> None:
    run = mpirun(3, ["-m", "nettorrent_mpi", *command.split(), "--help"])
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("usage: nettorrent") == 1


def test_dry_runs_use_all_ranks(tmp_path: Path, mpirun: Mpirun) -> None:
    counts = [1, 2, 3, 7, 64, 1000]
    arguments: list[str | Path] = ["train", "--dry-run", DIGITS, "--output", tmp_path / "run", "--ranks"]
    told = commands(mpirun, tmp_path, *([*arguments, str(count)] for count in counts))
    for count, (code, text) in zip(counts, told, strict=True):
        assert code == 0, text
        check_dry_run(text, count)
    run = mpirun(2, ["-m", "nettorrent_mpi.train", *arguments[1:], "7"])
    assert run.returncode == 0, run.stderr
    check_dry_run(run.stdout, 7)
    assert run.stdout.count("SCHEDULE") == 1  # told once
    assert not (tmp_path / "run").exists()


def check_dry_run(text: str, ranks: int) -> None:
    """All ranks have a place in the layout, and all stages' ranks together are all ranks."""
    assert re.search(rf"^layout .* = {ranks} ranks", text, re.MULTILINE), text
    assert f"played for all {ranks} ranks: no deadlock" in text
    table = text.split("\nLAYOUT\n")[1].partition("\n\n")[0].splitlines()[1:]
    seen: list[int] = []
    for line in table:
        if found := re.match(r" *(\d+)(?:-(\d+))?  ", line):
            seen += range(int(found[1]), int(found[2] or found[1]) + 1)
    assert sorted(seen) == list(range(ranks)), text
    stages = text.split("\nSTAGES\n")[1].partition("\n\n")[0].splitlines()
    assert stages[0].split()[:3] == ["stage", "layers", "ranks"]
    assert sum(int(line.split()[2]) for line in stages[1:] if re.match(r" *\d+  ", line)) == ranks, text


SHARES = """
import sys
import nettorrent_mpi as nt
from nettorrent_mpi.cli.ranks import Ranks
import numpy as np
from mpi4py import MPI
x, y = np.random.default_rng(0).normal(size=(40, 5)), np.arange(40) % 3
with Ranks() as ranks:
    # Trainers in several groups, of which each rank is in others; nobody closes all but one of them.
    pair, odd = (MPI.COMM_WORLD.Split(color) for color in (ranks.world.rank // 2, ranks.world.rank % 2))
    trainers = []
    for comm in (pair, odd, MPI.COMM_WORLD, pair):
        layout = {'swarms': [{'rows': comm.size}]}
        trainers.append(nt.Trainer([nt.Linear(3)], (x, y), comm=comm, layout=layout, batch_size=8))
    list(trainers[1].train(steps=2))
    if ranks.world.rank < 2:
        trainers[0].close()
    raise nt.AgreedError('told to all', 2)
sys.exit(ranks.code)
"""


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_shared_memory_does_not_keep_mpi_from_ending(mpirun: Mpirun, mpi: str) -> None:
    for _ in range(5):
        done = mpirun(4, ["-c", SHARES], mpi=mpi, timeout=30)
        assert (done.returncode, done.stderr.count("told to all")) == (2, 1), done.stderr
