"""What a run leaves behind, and what the other commands make of it."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest

from nettorrent_mpi.cli.run_folder import RunFolder
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config import writing
from nettorrent_mpi.engine.rank_seconds import PARTS
from nettorrent_mpi.plan.actions import step_end
from nettorrent_mpi.plan.errors import NetTorrentWarning, OutputError
from nettorrent_mpi.plan.schedule import build

HERE = Path(__file__).resolve().parent
DIGITS = HERE.parent / "configs" / "digits.yaml"
Mpirun = Callable[..., subprocess.CompletedProcess[str]]
Series = Callable[..., Any]

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


Told = tuple[int, str, str]  # exit code, what rank 0 wrote, what the others wrote
HELPS = ["train", "export", "data fetch"]


class OnThree(NamedTuple):
    """What three ranks did: a run of 3 epochs, an evaluation of it, the same from the run's own configuration; help."""

    run: Done
    evaluation: Told
    again: Path
    helps: dict[str, Told]


@pytest.fixture(scope="module")
def on_three(tmp_path_factory: pytest.TempPathFactory, series: Series) -> OnThree:
    root = tmp_path_factory.mktemp("run_folder")
    config = root / "small.yaml"
    config.write_text(CONFIG)
    changes = [word for change in CHANGES for word in ("--set", change)]
    told, evaluation, _, *helps = series(
        3,
        root / "series",
        [
            ["train", config, *changes, "--output", root / "run"],
            ["evaluate", root / "run"],
            ["train", root / "run" / "config.yaml", "--output", root / "again"],
            *([*command.split(), "--help"] for command in HELPS),
        ],
    )
    assert told[2] == ""
    run = Done(root / "run", config, told[1])
    return OnThree(run, evaluation, root / "again", dict(zip(HELPS, helps, strict=True)))


@pytest.fixture(scope="module")
def done(on_three: OnThree) -> Done:
    """A run of 3 epochs on 3 ranks."""
    return on_three.run


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory, series: Series, done: Done) -> dict[str, list[Told]]:
    """What one rank did, by the name of the test that looks at it; the folders are below "root"."""
    root = tmp_path_factory.mktemp("on_one")
    random = np.random.default_rng(0)
    with h5py.File(root / "data.h5", "w") as file:
        file["x"], file["y"] = random.normal(size=(40, 3)), random.integers(0, 2, 40)
    data, model = f"{{name: hdf5, root: {root}/data.h5}}", "{layers: [{linear: 2}]}"
    (root / "config.yaml").write_text(f"data: {data}\nmodel: {model}\ntrain: {{steps: 2, batch_size: 8}}\n")
    (root / "export").mkdir()
    export = ["export", done.folder, "--output"]
    target, other = root / "export" / "model.npz", root / "export" / "model.txt"
    lists: dict[str, list[list[str | Path]]] = {
        "export": [
            [*export, target],
            [*export, target],
            [*export, other],
            ["export", root / "export", "--output", root / "a.npz"],
        ],
        "evaluate": [["evaluate", done.folder]],
        "nothing": [["train", root / "config.yaml", "--output", root / "run"], ["evaluate", root / "run"]],
        "help": [[*command.split(), "--help"] for command in HELP],
        "dry": [[*DRY_RUN, "--output", root / "dry", "--ranks", str(count)] for count in COUNTS],
        "initial": [["train", done.config, *NO_STEPS, "--output", root / "initial"]],
    }
    told = iter(series(1, root / "series", [command for group in lists.values() for command in group], on=True))
    return {"root": [(0, str(root), "")], **{name: [next(told) for _ in group] for name, group in lists.items()}}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory, series: Series) -> tuple[Path, list[Told]]:
    """What two ranks did: a dry run, and runs until an accuracy is reached, of the rows held back or the test's."""
    root = tmp_path_factory.mktemp("on_two")
    lists: list[list[str | Path]] = [[*DRY_RUN, "--output", root / "dry", "--ranks", "7"]]
    for held_back in HELD_BACK:
        changes = ["train.stop_at={accuracy: 0.9}", "train.batch_size=64", f"data.validation={held_back}"]
        words = [word for change in changes for word in ("--set", change)]
        lists.append(["train", DIGITS, *words, "--output", root / f"run{held_back}"])
    return root, series(2, root / "series", lists)


def test_files(done: Done) -> None:
    there = {path.name for path in done.folder.iterdir()} - {"checkpoints"}
    assert there == {"config.yaml", "run.json", "metrics.jsonl", "summary.json", "model.h5", "trace.json"}


def test_configuration_is_complete(done: Done, on_three: OnThree) -> None:
    path = done.folder / "config.yaml"
    asked = configuration.load(str(done.config), [*CHANGES, f"output={done.folder}"])
    assert configuration.load(str(path)) == asked
    for key in ("eps: 1.0e-05", "betas:", "weight_decay:", "  allreduce: {}", "  1f1b: {}", "clip_norm: 2.5"):
        assert key in path.read_text()  # what was left out has its default written down
    again = read(on_three.again / "model.h5")
    for key, array in done.arrays().items():
        np.testing.assert_allclose(again[key], array, rtol=1e-9, atol=1e-12)


def test_metrics(done: Done) -> None:
    always = {"step": int, "epoch": float, "samples": int, "time": float, "train_loss": float}
    always |= {"learning_rate": float, "samples_per_second": float, "ranks": dict}
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
        parts = line.pop("ranks")
        assert {name: len(parts[name]) for name in PARTS} == dict.fromkeys(PARTS, 3)
        assert parts["slowest"] in range(3)
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
    started = summary["start_seconds"]
    assert list(started) == ["imports", "MPI", "plan", "run folder", "engine", "data", "first step"]
    assert all(seconds >= 0 for seconds in started.values())
    assert 0.02 < started["imports"] < 60
    assert summary["samples_per_second"] > 0


def test_what_run_json_says_of_a_run(done: Done) -> None:
    about = json.loads((done.folder / "run.json").read_text())
    assert about["arguments"][:2] == ["train", str(done.config)]
    assert about["ended"] == "done"
    assert len(about["hosts"]) == about["ranks"] == 3
    assert [(stage["layers"], stage["rows"], stage["cols"]) for stage in about["stages"]] == [
        (["first"], 1, 1), (["linear1"], 1, 1), (["linear2"], 1, 1)
    ]  # fmt: skip
    assert (about["steps"], about["steps_per_epoch"], about["replicas"]) == (3 * EPOCH, EPOCH, 1)


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
def test_evaluate(done: Done, on_one: dict[str, list[Told]], on_three: OnThree, ranks: int) -> None:
    code, told, others = on_three.evaluation if ranks == 3 else on_one["evaluate"][0]
    assert (code, others) == (0, "")
    last = done.metrics()[-1]
    for name in ("validation", "test"):
        wanted = f"{name}: loss {last[f'{name}_loss']:.4f}, accuracy {100 * last[f'{name}_accuracy']:.2f} %\n"
        assert told.count(wanted) == 1, told
    assert len(told.splitlines()) == 2


def test_export(done: Done, on_one: dict[str, list[Told]]) -> None:
    folder = Path(on_one["root"][0][1], "export")
    target = folder / "model.npz"
    first, second, third, fourth = on_one["export"]
    assert first == (0, f"{target} is written\n", "")
    with np.load(target, allow_pickle=False) as exported:
        arrays = done.arrays()
        assert set(exported.files) == {*arrays, "model", "data", "conventions"}
        for key, array in arrays.items():
            assert exported[key].dtype == array.dtype
            np.testing.assert_array_equal(exported[key], array)
    assert second[0] == third[0] == fourth[0] == 2
    assert re.search(r"model\.npz exists: choose another name", second[1])
    assert re.search(r"model\.txt: .* \.h5, \.npz, \.pt, \.onnx", third[1])
    assert re.search(r"export has none of a run's files: name the folder of a run", fourth[1])
    assert {path.name for path in folder.iterdir()} == {"model.npz"}


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
    assert sum(line.startswith("learning rate: ") for line in lines) == 1
    assert lines[-2] == f"model: {done.folder / 'model.h5'}"
    assert len(lines) == 17


HELD_BACK = [0.0, 0.1]


@pytest.mark.parametrize("held_back", HELD_BACK)
def test_stop_at(on_two: tuple[Path, list[Told]], held_back: float) -> None:
    """Training ends after the epoch in which the accuracy, of the validation rows where there are any, is reached."""
    root, told = on_two
    done = Done(root / f"run{held_back}", DIGITS, told[1 + HELD_BACK.index(held_back)][1])
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


NO_STEPS = ["--set", "train.steps=0", "--set", "train.epochs=null", "--set", "layout=layers"]


def test_no_steps_gives_the_initial_weights(
    tmp_path: Path, mpirun: Mpirun, done: Done, on_one: dict[str, list[Told]]
) -> None:
    run = mpirun(4, ["-m", "nettorrent_mpi.train", done.config, *NO_STEPS, "--output", tmp_path / "initial"])
    assert run.returncode == 0, run.stderr
    assert on_one["initial"][0][0] == 0, on_one["initial"]
    arrays = []
    for ranks, output in ((1, Path(on_one["root"][0][1], "initial")), (4, tmp_path / "initial")):
        done = Done(output, done.config, "")
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


def test_nothing_to_evaluate_on(on_one: dict[str, list[Told]]) -> None:
    root = Path(on_one["root"][0][1])
    run, evaluation = on_one["nothing"]
    assert run[0] == 0, run[1]
    done = Done(root / "run", root / "config.yaml", run[1])
    assert done.metrics()[-1]["test_accuracy"] is None
    assert done.summary()["test_accuracy"] is None
    assert evaluation[0] == 2
    assert re.search(r"error: .*data\.h5: has no test set", evaluation[1])


HELP = {
    "": "COMMAND",
    "train": "CONFIG",
    "evaluate": "RUN",
    "predict": "FILE",
    "export": "--output FILE",
    "speedup": "CONFIG",
    "data": "ACTION",
    "data fetch": "NAME",
    "data import": "--output FILE",
}


def test_help(on_one: dict[str, list[Told]]) -> None:
    for (command, word), (code, text, _) in zip(HELP.items(), on_one["help"], strict=True):
        assert code == 0
        assert text.startswith(f"usage: nettorrent {command}".rstrip())
        assert word in text


@pytest.mark.parametrize("command", HELPS)
def test_help_is_told_once(on_three: OnThree, command: str) -> None:
    code, *texts = on_three.helps[command]
    assert code == 0, texts
    assert "".join(texts).count("usage: nettorrent") == 1


COUNTS = [1, 2, 3, 7, 64, 1000]
DRY_RUN: list[str | Path] = ["train", "--dry-run", DIGITS]


def test_dry_runs_use_all_ranks(on_one: dict[str, list[Told]], on_two: tuple[Path, list[Told]]) -> None:
    for count, (code, text, _) in zip(COUNTS, on_one["dry"], strict=True):
        assert code == 0, text
        check_dry_run(text, count)
    root, told = on_two
    code, *texts = told[0]
    assert code == 0, texts
    check_dry_run("".join(texts), 7)
    assert "".join(texts).count("SCHEDULE") == 1  # told once
    assert not (root / "dry").exists()
    assert not Path(on_one["root"][0][1], "dry").exists()


def check_dry_run(text: str, ranks: int) -> None:
    """All ranks have a place in the layout, and all stages' ranks together are all ranks."""
    assert re.search(rf"^layout .* = {ranks} ranks", text, re.MULTILINE), text
    assert f"checked for all {ranks} ranks: no deadlock" in text
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
    with ranks.world.agreement():
        raise nt.UserError('told to all')
sys.exit(ranks.code)
"""


@pytest.mark.parametrize(
    "mpi", [pytest.param("openmpi", marks=pytest.mark.slow), pytest.param("mpich", marks=pytest.mark.long)]
)
def test_shared_memory_does_not_keep_mpi_from_ending(mpirun: Mpirun, mpi: str) -> None:
    for _ in range(5):
        done = mpirun(4, ["-c", SHARES], mpi=mpi, timeout=30)
        assert (done.returncode, done.stderr.count("told to all")) == (2, 1), done.stderr


def test_what_cannot_be_begun_takes_nothing_away(tmp_path: Path) -> None:
    for name in ("config.yaml", "model.h5", "checkpoints/step-0000000001/manifest.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    (tmp_path / "config.yaml.part").mkdir()  # so nothing can be written under this name
    with pytest.raises(OutputError, match=r"config\.yaml could not be written"):
        RunFolder(str(tmp_path)).create("new")
    (tmp_path / "config.yaml.part").rmdir()
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"old"}
    RunFolder(str(tmp_path)).create("new")
    left = {path.name: path.read_text() for path in tmp_path.rglob("*")}
    assert left == {"config.yaml": "new", "metrics.jsonl": ""}


def test_a_new_run_takes_away_only_an_earlier_runs_files(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for files, left in (
        ({"step-0000000003", "step-0000000004.tmp", "step-0000000002.old"}, None),
        ({"step-0000000003", "best"}, {"best"}),
    ):
        folder.mkdir()
        for name in files:
            (folder / name).mkdir()
            (folder / name / "shard-00000.h5").touch()
        RunFolder(str(tmp_path)).create("new")
        assert (({path.name for path in folder.iterdir()}) if folder.exists() else None) == left


@pytest.mark.parametrize("lost", [None, "summary.json", "model.h5"])
def test_results_are_summary_and_model(tmp_path: Path, lost: str | None) -> None:
    (tmp_path / "summary.json").write_text('{"steps": 5}')
    (tmp_path / "model.h5").touch()
    if lost:
        (tmp_path / lost).unlink()
    assert RunFolder(str(tmp_path)).has_results(5) == (lost is None)
    assert not RunFolder(str(tmp_path)).has_results(6)


def test_lines_wait_for_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    folder, limits = RunFolder(str(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    folder.create("config: 1")
    folder.metrics({"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (18, limits[1]))  # bytes: a line and a half
    try:
        with pytest.warns(NetTorrentWarning, match=r"metrics\.jsonl cannot be written .*training goes on"):
            folder.metrics({"step": 2})
        folder.metrics({"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step'
    folder.metrics({"step": 4})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_a_run_says_what_can_be_done_next_and_is_evaluated_from_any_folder(tmp_path: Path) -> None:
    """The data are named relative to the folder in which it was trained."""
    random = np.random.default_rng(0)
    with h5py.File(tmp_path / "data.h5", "w") as file:
        for part in ("", "_test"):
            file[f"x{part}"], file[f"y{part}"] = random.normal(size=(16, 3)), np.arange(16) % 2
    shutil.copy(tmp_path / "data.h5", tmp_path / "nan.h5")
    with h5py.File(tmp_path / "nan.h5", "r+") as file:
        file["x_test"][3, 1] = np.nan
    (tmp_path / "c.yaml").write_text(
        "data: {name: hdf5, root: data.h5}\nmodel: {layers: [{linear: 2}]}\ntrain: {steps: 2, batch_size: 8}\n"
    )
    code = (
        "import os, sys\nfrom nettorrent_mpi.__main__ import main\n"
        "main(['train', 'c.yaml', '--output', 'a run'])\n"
        "main(['train', 'c.yaml', '--output', 'b', '--set', 'data.root=nan.h5'])\nos.chdir('/')\n"
        "main(['evaluate', sys.argv[1]])\nos.remove(sys.argv[2])\nsys.exit(main(['evaluate', sys.argv[1]]))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "a run"), str(tmp_path / "data.h5")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert "\nmodel: a run/model.h5\nnext: nettorrent evaluate 'a run' scores it; nettorrent export" in done.stdout
    assert re.search(r"^test: loss [\d.]+, accuracy", done.stdout, re.MULTILINE), done.stderr
    assert done.returncode == 2
    assert "\nlatest checkpoint: b/checkpoints/step-0000000002; when the cause is mended, continue" in done.stdout
    assert re.fullmatch(
        r"nettorrent: error: nan\.h5: x_test: feature 1 of row 3 is nan, which the evaluation after step 2 needs.*\n"
        r"nettorrent: error: .*a run/config\.yaml:\d+: data\.root: .*/data\.h5: no such file.*\n",
        done.stderr,
    )
