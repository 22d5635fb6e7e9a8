"""`nettorrent tune`: trials on groups of ranks are those of single runs, whatever becomes of some of them."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest

from nettorrent_mpi.config.reading import load
from nettorrent_mpi.config.search_file import read_search
from nettorrent_mpi.tune import parzen

Run = subprocess.CompletedProcess[str]
Mpirun = Callable[..., Run]
Series = Callable[..., Any]

GRID = """\
base:
  dtype: float64
  data: {name: digits, validation: 0.2}
  model:
    layers:
      - flatten
      - linear: {units: 8, activation: relu}
      - dropout: 0.1
      - linear: {units: 10}
  train: {epochs: 1, batch_size: 48, optimizer: {adam: {lr: 0.01}}}
  checkpoint: {every_epochs: null}
parameters:
  train.optimizer.adam.lr: [0.003, 0.01, 0.03]
  model.layers.1.linear.units: [6, 16]
  order:
    one: {seed: 1}
    two: {seed: 2, train.schedule: cosine}
sampler: grid
"""
# Of seven ranks in three groups one has three: there five replicas are impossible, and a layout by itself is possible.
MIXED = """\
base:
  data: {name: digits, validation: 0.2}
  model: {layers: [flatten, {linear: {units: 8, activation: relu}}, {linear: 10}]}
  train: {epochs: 2, batch_size: 48}
  checkpoint: {every_epochs: null}
parameters:
  kind:
    fine: {train.optimizer: {sgd: {lr: 0.1}}}
    infinite: {train.optimizer: {sgd: {lr: 1.0e+30}}}
    growing: {train.optimizer: {sgd: {lr: 1.0e+4}}, model.loss: mean_squared_error}
    impossible: {layout: {replicas: 5}}
    mistaken: {train.batch_size: -3}
  seed: [1, 2]
sampler: grid
"""


def weights(run: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(run / "model.h5") as file:
        file["parameters"].visititems(
            lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
        )
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = ("train_loss", "test_loss", "test_accuracy", "validation_loss", "validation_accuracy", "learning_rate")
    return [{key: line.get(key) for key in ("step", "epoch", "samples", *figures)} for line in lines]


def told(study: Path) -> dict[str, Any]:
    return dict(json.loads((study / "study.json").read_text()))


def alike(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-10, atol=1e-12, err_msg=name)
    for line, expected in zip(metrics(one), metrics(other), strict=True):
        assert line == pytest.approx(expected, rel=1e-10)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tune") / "grid.yaml"
    file.write_text(GRID)
    return file


@pytest.fixture(scope="module")
def on_one(grid: Path, series: Series) -> tuple[Path, list[Any]]:
    """A study on one rank, the trainings of the configurations of its trials, and the study once more."""
    study, search = grid.with_name("one"), read_search(str(grid))
    commands: list[list[str | Path]] = [["tune", grid, "--output", study]]
    for number in range(search.trials):
        config = grid.with_name(f"single-{number}.yaml")
        text = json.dumps({**search.base.value, "output": str(grid.with_name(f"single-{number}"))})
        config.write_text(text)  # JSON is YAML
        point = search.grid_point(number)
        label = point.pop("order")
        changes = {**point, **search.parameters["order"].value(label)}
        commands.append(["train", config, *(f"--set={key}={value}" for key, value in changes.items())])
    commands.append(["tune", grid, "--output", study])
    return study, series(1, grid.with_name("series"), commands)


def test_trials_on_four_groups_are_those_on_one_and_single_runs(
    grid: Path, mpirun: Mpirun, on_one: tuple[Path, list[Any]]
) -> None:
    one, _ = on_one
    four = grid.with_name("four")
    done = mpirun(4, ["-m", "nettorrent_mpi", "tune", grid, "--output", four], timeout=100)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stderr == ""
    both = [told(study)["trials"] for study in (one, four)]
    assert [len(trials) for trials in both] == [12, 12]
    assert {trial["groups"] for trial in both[1]} == {4}
    for ours, theirs in zip(*both, strict=True):
        for name in ("number", "point", "state", "accuracy", "test_accuracy", "accuracies"):
            assert ours[name] == theirs[name], name
    for number in range(12):
        name = f"trial-{number:04}"
        alike(four / name, one / name)
        alike(one / name, grid.with_name(f"single-{number}"))
        lines = metrics(one / name)
        assert both[0][number]["accuracy"] == lines[-1]["validation_accuracy"]
    lines = done.stdout.splitlines()
    assert lines[0] == f"study: {four}, grid, 0 of 12 trials done; 4 groups of 1 rank"
    assert len([line for line in lines if line.startswith(tuple(f"{n}/12  trial" for n in range(1, 13)))]) == 12


def test_the_results_of_a_study(grid: Path, on_one: tuple[Path, list[Any]]) -> None:
    study, results = on_one
    found = told(study)
    accuracies = [trial["accuracy"] for trial in found["trials"]]
    assert found["complete"]
    assert found["best"]["number"] == accuracies.index(max(accuracies))
    assert {each["parameter"] for each in found["importances"]} == set(read_search(str(grid)).parameters)
    shares = [each["share"] for each in found["importances"]]
    if parzen.tells_importances():
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
        assert f"{100 * shares[0]:.0f} %" in results[-1][1]
    else:
        assert set(shares) == {None}
        assert "importances are those of Optuna 5: pip install 'nettorrent_mpi[tune]'" in results[-1][1]
    with (study / "trials.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in table] == accuracies
    assert [row["model.layers.1.linear.units"] for row in table[:4]] == ["6", "6", "16", "16"]
    best = load(str(study / "best.yaml"))
    assert best.output == str(study / "best")
    assert best.train.optimizer.options()["lr"] == found["best"]["point"]["train.optimizer.adam.lr"]
    assert ElementTree.parse(study / "parallel.svg").getroot().tag.endswith("svg")
    assert not (study / "speedup.svg").exists()  # all of it was on one group
    first, again = results[0][1], results[-1][1]
    best_line = f"best: trial {found['best']['number']}, {100 * max(accuracies):.2f} % on the validation rows"
    assert best_line in first
    assert best_line in again
    assert "12 of 12 trials done" in again
    assert "what matters for being among the better half of 12 complete trials:" in again


def test_a_study_of_seven_ranks_in_three_groups_survives_bad_trials(tmp_path: Path, mpirun: Mpirun) -> None:
    (tmp_path / "mixed.yaml").write_text(MIXED)
    study = tmp_path / "study"
    words = ["-m", "nettorrent_mpi", "tune", tmp_path / "mixed.yaml", "--groups", "3", "--output", study]
    done = mpirun(7, words, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "3 groups of 2 or 3 ranks" in done.stdout
    trials = told(study)["trials"]
    assert {trial["ranks"] for trial in trials} == {2, 3}
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        by_kind.setdefault(trial["point"]["kind"], []).append(trial)
    states = {kind: {trial["state"] for trial in found} for kind, found in by_kind.items()}
    assert states == {
        "fine": {"complete"},
        "infinite": {"diverged"},
        "growing": {"diverged"},
        "impossible": {"failed"},
        "mistaken": {"failed"},
    }
    assert "is not finite (seen on rank" in by_kind["infinite"][0]["reason"]
    assert by_kind["impossible"][0]["reason"].startswith("layout")
    assert "mixed.yaml:12: train.batch_size: must be at least 1, not -3" in by_kind["mistaken"][0]["reason"]
    assert all("\n" not in trial["reason"] for trial in trials if trial["reason"])
    assert told(study)["best"]["point"]["kind"] == "fine"
    assert "2 complete, 4 diverged, 4 failed" in done.stdout
    assert not list(study.glob("trial-*/lock.json"))


WRONG = [
    (["tune", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
    (["tune", "GRID", "--groups", "3"], "--groups 3: there are 2 ranks, and each group has at least one"),
    (["tune", "GRID", "--group", "3"], "did you mean --groups?"),
    (["tune", "GRID", "--set", "train.epoch=3"], "train.epoch: unknown key; did you mean epochs?"),
    (["tune", "BAD"], "bad.yaml:13: train.optimizer.adam.lrr: unknown key; did you mean lr?"),
    (["tune", "DATA"], "data.root"),
    (["tune", "VALUES"], "has no classes, so there is no accuracy to compare trials by"),
    (["tune", "GRID", "--output", "GRID"], "is a file, not a folder; choose another place with --output DIR"),
]


def test_mistakes_are_told_before_any_trial(grid: Path, series: Series, tmp_path: Path) -> None:
    files = {
        "GRID": grid,
        "BAD": tmp_path / "bad.yaml",
        "DATA": tmp_path / "data.yaml",
        "VALUES": tmp_path / "values.yaml",
    }
    files["BAD"].write_text(GRID.replace("adam.lr:", "adam.lrr:"))
    files["DATA"].write_text(GRID.replace("name: digits", f"name: mnist, root: {tmp_path}"))
    with h5py.File(tmp_path / "values.h5", "w") as file:
        file["x"], file["y"] = np.zeros((60, 4), np.float32), np.zeros((60, 10), np.float32)
        file["x_test"], file["y_test"] = file["x"][:9], file["y"][:9]
    root = f"name: hdf5, root: {tmp_path / 'values.h5'}"
    files["VALUES"].write_text(
        GRID.replace("name: digits", root).replace("  model:\n", "  model:\n    loss: mean_squared_error\n")
    )
    commands = [[files.get(word, word) for word in words] for words, _ in WRONG]
    results = series(2, tmp_path / "series", commands, on=True)
    for (code, first, others), (words, expected) in zip(results, WRONG, strict=True):
        assert code == 2, (words, first)
        assert expected in first, words
        assert first.count("\n") == 1, first
        assert others == ""
    assert not Path("runs/tune-grid").exists()


def test_a_study_goes_on_in_a_folder_that_was_moved(grid: Path, on_one: tuple[Path, list[Any]], series: Series) -> None:
    """Its search.yaml is a search itself: more is tried by it in another folder, too."""
    study, _ = on_one
    moved = grid.with_name("moved")
    shutil.copytree(study, moved)
    shutil.rmtree(moved / "trial-0005")
    ((_, first, _),) = series(1, grid.with_name("again"), [["tune", moved / "search.yaml", "--output", moved]])
    assert "11 of 12 trials done" in first
    alike(moved / "trial-0005", study / "trial-0005")
