"""`nettorrent runs`: every run of a folder with its state and results, and several side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nettorrent_mpi.__main__ import main
from nettorrent_mpi.engine.run_lock import RunLock
from tests.cli.runs.made import TWO, make, records


def told(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main(["runs", *map(str, arguments)])
    return code, *capfd.readouterr()


def rows_of(text: str) -> dict[str, list[str]]:
    return {line.split()[0].rsplit("/", 1)[-1]: line.split() for line in text.splitlines()[1:]}


def test_the_states_of_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for state in ("done", "diverged", "stopped"):
        make(tmp_path / "deep" / state, ended=state)
    make(tmp_path / "lost", ended=None)
    (make(tmp_path / "killed", ended=None) / "lock.json").write_text('{"host": "elsewhere"}')
    os.utime(tmp_path / "killed" / "lock.json", (0, 0))
    with RunLock(make(tmp_path / "alive", ended=None)), RunLock(make(tmp_path / "resumed")):
        code, text, errors = told(capfd, tmp_path)
    assert (code, errors) == (0, "")
    states = {name: row[1] for name, row in rows_of(text).items()}
    assert states == {
        "done": "done", "diverged": "diverged", "stopped": "stopped", "lost": "failed", "killed": "failed",
        "alive": "running", "resumed": "running",
    }  # fmt: skip
    row = ["2x1", "1x1", "3", "allreduce", "2", "2", "95.00", "%", "0.2000", "0:10", "1,010"]
    assert rows_of(text)["done"][2:] == row


def test_accuracy_and_loss_are_of_the_same_epoch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The loss at the best accuracy, though it falls on; where there is no accuracy, the latest loss."""
    lines = records(TWO)
    for line in lines[6:]:
        line.pop("test_accuracy", None)
    make(tmp_path / "overfitted", metrics=[*lines[:6], *(line | {"test_accuracy": 0.5} for line in lines[6:])])
    make(tmp_path / "unjudged", metrics=[{k: v for k, v in line.items() if "test" not in k} for line in records(TWO)])
    table = rows_of(told(capfd, tmp_path)[1])
    assert table["overfitted"][6:11] == ["2", "1.2", "91.67", "%", "0.3333"]
    assert table["unjudged"][6:9] == ["2", "2", "0.2000"]
    assert json.loads(told(capfd, tmp_path / "overfitted", "--json")[1])[0]["at_epoch"] == 1.2


def test_sorted_by_a_column_the_unknown_last(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, count in (("worst", 2), ("best", 8), ("middle", 4)):
        make(tmp_path / name, metrics=records(TWO)[:count])
    make(tmp_path / "a_new_one", metrics=[])
    assert list(rows_of(told(capfd, tmp_path, "--sort", "accuracy")[1])) == ["best", "middle", "worst", "a_new_one"]
    assert list(rows_of(told(capfd, tmp_path, "--sort", "seconds")[1])) == ["worst", "middle", "best", "a_new_one"]
    found = json.loads(told(capfd, tmp_path, "--sort", "epochs", "--json")[1])
    assert [row["epochs"] for row in found] == [1.6, 0.8, 0.4, None]
    assert found[0]["accuracy"] == 1 - 0.5 / 8
    assert found[0]["settings"] == {"seed": "1", "train.batch_size": "32"}


def test_named_runs_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a = make(tmp_path / "a", settings={"seed": 1, "train": {"batch_size": 32}, "model": {"layers": [{"linear": 3}]}})
    b = make(tmp_path / "b", settings={"seed": 1, "train": {"batch_size": 64}, "model": {"layers": [{"linear": 4}]}})
    code, text, errors = told(capfd, a, b)
    assert (code, errors) == (0, "")
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}
    assert lines["train.batch_size"] == ["32", "64"]
    assert lines["model.layers[0].linear"] == ["3", "4"]
    assert "seed" not in lines
    assert text.endswith("1 other settings are the same\n")


def test_only_what_was_chosen_differs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Options that one run's optimizer has and the other's has not are shown where somebody has set them."""
    both = {"data": {"name": "digits"}, "model": {"layers": ["flatten", {"linear": 10}]}}
    sgd = both | {"train": {"epochs": 1, "optimizer": {"sgd": {"lr": 0.5, "momentum": 0.9}}}}
    a = make(tmp_path / "a", settings=sgd)
    b = make(tmp_path / "b", settings=both | {"train": {"steps": 5, "optimizer": "adam"}})
    lines = told(capfd, a, b)[1].splitlines()
    shown = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("train.")}
    assert shown == {
        "train.epochs": ["1", "none"], "train.steps": ["none", "5"], "train.optimizer": ["sgd", "adam"],
        "train.optimizer.sgd.lr": ["0.5", "-"], "train.optimizer.sgd.momentum": ["0.9", "-"],
    }  # fmt: skip
    assert len(lines) < 18


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", b"\0\0\0\0\n", "metrics.jsonl: 1 line could not be read, and is left out"),
        ("metrics.jsonl", b'{"step": true}\n[3]\n{"step": 1e400}\n\xff\n', "4 lines could not be read"),
        ("metrics.jsonl", b'{"step": 5, "train_loss": 0.', "1 line could not be read"),
        ("run.json", b"[1]", "run.json is damaged, and left out"),
        ("run.json", b"[" * 100_000, "run.json is damaged"),
        ("summary.json", b'{"world_size"', "summary.json is damaged"),
        ("config.yaml", b"a: [", "config.yaml:1: not valid YAML"),
    ],
)
def test_damage_is_one_line_and_the_rest_is_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes, words: str
) -> None:
    run = make(tmp_path / "run")
    with (run / name).open("ab" if name == "metrics.jsonl" else "wb") as file:
        file.write(content)
    code, text, errors = told(capfd, tmp_path)
    assert code == 0
    assert errors.startswith("nettorrent: warning: ")
    assert words in errors
    assert errors.count("\n") == 1
    assert "95.00 %" in text


def test_values_that_make_no_sense_are_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    strange = [
        {"step": 1, "train_loss": "low", "epoch": [1], "time": None, "ranks": {"slowest": 0, "compute": ["x"]}},
        {"step": 2, "train_loss": float("nan"), "time": 10**400, "samples_per_second": True, "ranks": 3},
        {"step": 3, "train_loss": 0.25, "ranks": {"slowest": -1}},
        {"step": 4, "ranks": {"slowest": 0, "swarms": [{"compute": [1, 2], "communication": 1, "waiting": []}]}},
    ]
    wrong = {"stages": [{"layers": 5, "rows": 10**30}, 7], "replicas": "2", "hosts": {"a": 1}, "steps": -1}
    make(tmp_path / "run\n\x1b[31m", metrics=strange, **wrong)
    code, text, errors = told(capfd, tmp_path)
    assert (code, errors) == (0, "")
    assert "\x1b" not in text
    assert len(text.splitlines()) == 2
    assert text.split()[-1] == "0.2500"


@pytest.mark.parametrize("place", ["", "nothing", "file"])
def test_no_run_here(tmp_path: Path, capfd: pytest.CaptureFixture[str], place: str) -> None:
    (tmp_path / "file").write_text("")
    code, _, errors = told(capfd, tmp_path / place)
    assert code == 2
    assert errors.startswith("nettorrent: error: ")
    assert errors.count("\n") == 1
