"""The folder of a study: which trial a group takes, also after jobs that have died, and beside others."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nettorrent_mpi.config.search_file import Search, read_search
from nettorrent_mpi.engine import run_lock
from nettorrent_mpi.engine.run_lock import LOCK, RunLock, in_use
from nettorrent_mpi.plan.errors import ConfigError, InUseError, OutputError
from nettorrent_mpi.tune.samplers import check
from nettorrent_mpi.tune.study import TRIAL, Claimant, Study
from nettorrent_mpi.tune.trials import COMPLETE, FAILED, RUNNING, Trial

ROOT = Path(__file__).resolve().parents[2]
TEXT = """\
base:
  data: {name: digits, validation: 0.2}
  model: {layers: [flatten, {linear: 10}]}
parameters:
  train.optimizer.adam.lr: {low: 1e-3, high: 0.1, log: true}
  train.epochs: [1, 2]
"""
ME = Claimant("one", 0, 1, 1)


def search(tmp_path: Path, more: str = "trials: 4\n") -> Search:
    (tmp_path / "search.yaml").write_text(TEXT + more)
    return read_search(str(tmp_path / "search.yaml"))


def study(tmp_path: Path, more: str = "trials: 4\n") -> Study:
    made = Study(tmp_path / "study", search(tmp_path, more))
    made.open()
    return made


def dead(made: Study, number: int) -> None:
    """Let a trial be one of a process that is gone."""
    folder = made.folder_of(number)
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(run_lock._this_process() | {"pid": 2**22, "started": "1"}))


def claimed(made: Study, group: Claimant = ME) -> Trial:
    trial = made.claim(group)
    assert trial is not None
    return trial


def test_each_number_is_taken_once_and_the_point_depends_on_it_alone(tmp_path: Path) -> None:
    one, other = study(tmp_path), study(tmp_path)
    taken = [claimed(each) for each in (one, other, one, other)]
    assert [trial.number for trial in taken] == [0, 1, 2, 3]
    assert one.claim(ME) is other.claim(ME) is None
    (tmp_path / "again").mkdir()
    again = study(tmp_path / "again")
    assert [claimed(again).point for _ in range(4)] == [trial.point for trial in taken]
    assert len({json.dumps(trial.point) for trial in taken}) == 4
    assert {trial.state for trial in one.trials()} == {RUNNING}


def test_a_trial_that_has_ended_is_not_taken_again_and_its_checkpoints_are_gone(tmp_path: Path) -> None:
    made = study(tmp_path)
    trial = claimed(made)
    (made.folder_of(0) / "checkpoints" / "step-1").mkdir(parents=True)
    made.end(replace(trial, state=COMPLETE, accuracy=0.5, accuracies=((1.0, 0.5),)))
    assert not (made.folder_of(0) / "checkpoints").exists()
    assert not (made.folder_of(0) / LOCK).exists()
    assert claimed(study(tmp_path)).number == 1
    (told,) = [each for each in study(tmp_path).trials() if each.done]
    assert (told.number, told.accuracy, told.accuracies) == (0, 0.5, [(1.0, 0.5)])


def test_a_trial_that_was_given_back_is_taken_again_with_its_point(tmp_path: Path) -> None:
    made = study(tmp_path)
    first = claimed(made)
    made.release()
    assert claimed(made).point == first.point
    assert in_use(made.folder_of(0)) is True


def test_trials_of_dead_jobs_are_taken_first_by_different_groups(tmp_path: Path) -> None:
    made = study(tmp_path)
    points = [claimed(made).point for _ in range(3)]
    for number in range(3):
        dead(made, number)
    groups = [Claimant("two", number, 3, 1) for number in range(3)]
    assert [next(study(tmp_path)._open_numbers(group)) for group in groups] == [0, 1, 2]
    taken = [claimed(study(tmp_path), group) for group in groups]
    assert [trial.point for trial in sorted(taken, key=lambda each: each.number)] == points
    assert claimed(made).number == 3


def test_a_folder_without_a_file_is_taken_last(tmp_path: Path) -> None:
    """Another group may have made it a moment ago."""
    made = study(tmp_path)
    made.folder_of(1).mkdir()
    assert [claimed(made).number for _ in range(4)] == [0, 2, 3, 1]


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    made = study(tmp_path)
    point = claimed(made).point
    made.release()
    (made.folder_of(0) / TRIAL).write_text('{"number": 0, "po')
    assert [claimed(made).number for _ in range(3)] == [1, 2, 3]
    assert claimed(made).point == point


def test_the_trial_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    made = study(tmp_path, "trials: 1\n")
    program = (
        "import sys, pathlib\n"
        "from nettorrent_mpi.engine.run_lock import RunLock\n"
        "lock = RunLock(pathlib.Path(sys.argv[1]))\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(made.folder_of(0))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert in_use(made.folder_of(0)) is True
        assert made.claim(ME) is None
        with pytest.raises(InUseError):
            RunLock(made.folder_of(0))
        process.kill()
        process.wait()
        assert in_use(made.folder_of(0)) is False
        assert claimed(made).number == 0


def test_a_trial_on_another_machine_is_waited_for_and_taken_where_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "STALE", 1.0)
    made = study(tmp_path, "trials: 2\n")
    claimed(made)
    made.release()
    elsewhere = run_lock._this_process() | {"host": "another", "boot": "another"}
    (made.folder_of(0) / LOCK).write_text(json.dumps(elsewhere))
    assert in_use(made.folder_of(0)) is True
    other = Claimant("two", 0, 1, 1)
    assert claimed(made, other).number == 1  # before it waits
    with pytest.warns(UserWarning, match="waiting for a sign of life of another run"):
        assert claimed(made, other).number == 0


def test_the_folder_of_another_search_is_refused(tmp_path: Path) -> None:
    study(tmp_path)
    study(tmp_path, "trials: 9\n")  # goes on
    with pytest.raises(OutputError, match=r"holds the study of another search \(seed differ\)"):
        study(tmp_path, "trials: 4\nseed: 2\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(OutputError, match="holds other files than a study's"):
        Study(tmp_path / "other", search(tmp_path)).open()
    with pytest.raises(OutputError, match="is a file, not a folder"):
        Study(tmp_path / "search.yaml", search(tmp_path)).open()


def test_tpe_learns_from_the_trials_so_far(tmp_path: Path) -> None:
    """With the same seed, studies begin alike; later each tries rates that were good in it."""
    pytest.importorskip("optuna")
    tried: dict[float, list[float]] = {}
    for good in (0.003, 0.05):
        folder = tmp_path / str(good)
        folder.mkdir()
        made = study(folder, "trials: 30\nsampler: tpe\n")
        rates = tried[good] = []
        for _ in range(30):
            trial = claimed(made)
            rates.append(float(trial.point["train.optimizer.adam.lr"] or 0))
            if trial.number == 3:
                made.end(replace(trial, state=FAILED, reason="not possible"))
            else:
                accuracy = math.exp(-abs(math.log(rates[-1] / good)))
                told = ((1.0, accuracy),)
                made.end(replace(trial, state=COMPLETE, accuracy=accuracy, accuracies=told, ended=trial.began + 1))
        assert {trial.point["train.epochs"] for trial in made.trials()} == {1, 2}
    low, high = tried.values()
    assert low[:10] == high[:10]
    assert sum(map(math.log, high[15:])) / 15 > sum(map(math.log, low[15:])) / 15 + 1


def test_tpe_without_optuna_is_told_before_any_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    check(search(tmp_path))
    with pytest.raises(ConfigError, match=r"sampler: tpe needs Optuna: pip install 'nettorrent_mpi\[tune\]'"):
        check(search(tmp_path, "trials: 4\nsampler: tpe\n"))
