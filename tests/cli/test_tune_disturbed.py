"""Studies that are killed, stopped, shared by jobs, pruned and long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.conftest import ROOT, installed, kill_session
from tests.growth import Usage, growth

Run = subprocess.CompletedProcess[str]
Mpirun = Callable[..., Run]
slow, long = pytest.mark.slow, pytest.mark.long

PATIENCE = 300  # seconds that a job may take on a busy machine; alone it takes a tenth

# Trials of about a second, with a checkpoint after every epoch.
SEARCH = """\
base:
  dtype: float64
  data: {name: digits, validation: 0.2}
  model: {layers: [flatten, {linear: {units: 32, activation: relu}}, {dropout: 0.1}, {linear: 10}]}
  train: {epochs: 12, batch_size: 16}
parameters:
  train.optimizer.adam.lr: {low: 0.001, high: 0.01, log: true}
  seed: [1, 2, 3]
trials: 10
"""


@pytest.fixture
def search(tmp_path: Path) -> Path:
    file = tmp_path / "search.yaml"
    file.write_text(SEARCH)
    return file


@contextmanager
def started(ranks: int, search: Path, study: Path, *words: str, mpi: str = "openmpi") -> Iterator[Any]:
    """A job that runs meanwhile; what is left of it is killed."""
    launcher, settings = installed(mpi)
    command = [*launcher, "-n", str(ranks), sys.executable, "-m", "nettorrent_mpi", "tune", str(search)]
    process = subprocess.Popen(
        [*command, "--output", str(study), *words],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **settings},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        kill_session(process.pid)
        process.communicate()


def trials(study: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(study.glob("trial-*/trial.json"))]


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.02)


def training(study: Path) -> bool:
    """Whether a trial that runs has evaluated its network a few times of twelve, and so will train on for a while."""
    running = [study / f"trial-{trial['number']:04}" for trial in trials(study) if trial["state"] == "running"]
    files = [folder / "metrics.jsonl" for folder in running if (folder / "metrics.jsonl").exists()]
    return any(1 <= file.read_bytes().count(b"validation_accuracy") <= 6 for file in files)


def ended(study: Path) -> list[dict[str, Any]]:
    return [trial for trial in trials(study) if trial["state"] != "running"]


def processes_of(session: int) -> list[int]:
    """The ranks of a job."""
    words = [(int(each.name), each) for each in Path("/proc").iterdir() if each.name.isdecimal()]
    found = []
    for pid, folder in words:
        try:
            own = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            if own == session and b"nettorrent_mpi\0tune" in (folder / "cmdline").read_bytes():
                found.append(pid)
        except (OSError, IndexError):
            continue
    ranks = [pid for pid in found if b"mpirun" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]]
    return sorted(ranks)


def weights(study: Path) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for path in sorted(study.glob("trial-*/model.h5")):
        with h5py.File(path) as file:
            for name in ("linear1/weight", "linear2/bias"):
                arrays[f"{path.parent.name}/{name}"] = file[f"parameters/{name}"][()]
    return arrays


def same_as_undisturbed(study: Path, mpirun: Mpirun, search: Path) -> None:
    whole = search.with_name("undisturbed")
    done = mpirun(1, ["-m", "nettorrent_mpi", "tune", search, "--output", whole], timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    ours, theirs = weights(study), weights(whole)
    assert len(ours) == 20
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-10, atol=1e-13, err_msg=name)
    for one, other in zip(trials(study), trials(whole), strict=True):
        assert (one["point"], one["accuracies"]) == (other["point"], other["accuracies"])


@slow
def test_a_study_that_is_killed_goes_on_and_repeats_nothing(mpirun: Mpirun, search: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    with started(2, search, study, "--groups", "2") as process:
        until(lambda: len(ended(study)) >= 3)
        until(lambda: any((study / f"trial-{t['number']:04}" / "checkpoints").glob("step-*[0-9]") for t in trials(study)
                          if t["state"] == "running"))  # fmt: skip
        kill_session(process.pid)
    before = {trial["number"]: trial for trial in ended(study)}
    left = [trial["number"] for trial in trials(study) if trial["state"] == "running"]
    assert left
    done = mpirun(2, ["-m", "nettorrent_mpi", "tune", search, "--output", study, "--groups", "2"], timeout=PATIENCE)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "waiting for a sign of life" not in done.stderr
    assert f"{len(before)} of 10 trials done" in done.stdout
    for trial in trials(study):
        assert trial["state"] == "complete"
        told = f"  trial {trial['number']}  " in done.stdout
        assert told is (trial["number"] not in before)
        if trial["number"] in before:
            assert trial == before[trial["number"]]
    same_as_undisturbed(study, mpirun, search)


@slow
def test_two_jobs_share_a_study(mpirun: Mpirun, search: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    with started(2, search, study, "--groups", "2") as one, started(2, search, study, "--groups", "1") as other:
        told = [process.communicate(timeout=PATIENCE) for process in (one, other)]
        assert [one.returncode, other.returncode] == [0, 0], told
    found = trials(study)
    assert [trial["number"] for trial in found] == list(range(10))
    assert {trial["state"] for trial in found} == {"complete"}
    assert {trial["groups"] for trial in found} == {1, 2}
    lines = Counter(line.split()[2] for out, _ in told for line in out.splitlines() if "  trial " in line)
    assert lines == {str(number): 1 for number in range(10)}, told
    assert not list(study.glob("**/lock.json*"))
    assert json.loads((study / "study.json").read_text())["complete"]
    assert (study / "speedup.svg").exists()  # of a job with one group and one with two
    same_as_undisturbed(study, mpirun, search)


@slow
@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_a_signal_stops_a_study_with_checkpoints(mpirun: Mpirun, search: Path, tmp_path: Path, mpi: str) -> None:
    study = tmp_path / "study"
    with started(2, search, study, "--groups", "2", mpi=mpi) as process:
        until(lambda: len(ended(study)) >= 1 and training(study))
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, f"{out}\n{err}"
    assert "stopped by a signal; the same command goes on" in out
    stopped = [trial for trial in trials(study) if trial["state"] == "running"]
    assert stopped
    assert not list(study.glob("**/lock.json*"))
    words = ["-m", "nettorrent_mpi", "tune", search, "--output", study, "--groups", "2"]
    done = mpirun(2, words, mpi=mpi, timeout=PATIENCE)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    same_as_undisturbed(study, mpirun, search)


@slow
def test_a_rank_that_dies_ends_the_job_and_the_next_one_goes_on(mpirun: Mpirun, search: Path, tmp_path: Path) -> None:
    study = tmp_path / "study"
    with started(3, search, study, "--groups", "2") as process:
        until(lambda: len(ended(study)) >= 1)
        os.kill(processes_of(process.pid)[-1], signal.SIGKILL)
        died = time.monotonic()
        process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert time.monotonic() - died < 60
    done = mpirun(2, ["-m", "nettorrent_mpi", "tune", search, "--output", study], timeout=PATIENCE)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    same_as_undisturbed(study, mpirun, search)


@slow
@pytest.mark.parametrize("groups", ["3", "2", "1"])
def test_the_others_finish_the_study_without_a_rank_that_dies(
    mpirun: Mpirun, search: Path, tmp_path: Path, groups: str
) -> None:
    """Under mpirun --with-ft ulfm: its trial goes on where its group has others, or is taken by another group."""
    study = tmp_path / "study"
    with started(3, search, study, "--groups", groups, mpi="ulfm") as process:
        until(lambda: len(ended(study)) >= 1 and training(study))
        os.kill(processes_of(process.pid)[-1], signal.SIGKILL)
        out, err = process.communicate(timeout=PATIENCE)
    assert {trial["state"] for trial in trials(study)} == {"complete"}, f"{out}\n{err}"
    assert json.loads((study / "study.json").read_text())["complete"]
    same_as_undisturbed(study, mpirun, search)


PRUNED = """\
base:
  data: {name: digits, validation: 0.2}
  model: {layers: [flatten, {linear: {units: 16, activation: relu}}, {linear: 10}]}
  train: {epochs: 4, batch_size: 32}
parameters:
  train.optimizer.adam.lr: [0.01, 0.02, 0.0000001, 0.00000001]
sampler: grid
prune: {median: {startup_trials: 2, warmup_epochs: 1}}
"""


def test_trials_below_the_median_are_ended_early_on_all_ranks_of_their_group(mpirun: Mpirun, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(PRUNED)
    study = tmp_path / "study"
    words = ["-m", "nettorrent_mpi", "tune", tmp_path / "search.yaml", "--groups", "1", "--output", study]
    done = mpirun(2, words, timeout=60)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = trials(study)
    assert [trial["state"] for trial in found] == ["complete", "complete", "pruned", "pruned"]
    assert [trial["epochs"] for trial in found] == [4, 4, 2, 2]
    assert [len(trial["accuracies"]) for trial in found] == [4, 4, 2, 2]
    assert found[2]["accuracy"] is None
    assert "2 complete, 2 pruned" in done.stdout
    steps = [json.loads(line)["step"] for line in (study / "trial-0002" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2 * 36  # of 1150 rows in mini-batches of 32
    assert not (study / "trial-0002" / "checkpoints").exists()


PATIENT = """\
base:
  data: {name: digits, validation: 0.2}
  model: {layers: [flatten, {linear: {units: 16, activation: relu}}, {linear: 10}]}
  train: {epochs: 12, batch_size: 32, stop_at: {patience: 1}}
parameters:
  train.optimizer.adam.lr: [0.05, 0.1]
sampler: grid
"""


def test_a_trial_with_patience_counts_by_its_best_network(mpirun: Mpirun, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(PATIENT)
    study = tmp_path / "study"
    done = mpirun(2, ["-m", "nettorrent_mpi", "tune", tmp_path / "search.yaml", "--output", study], timeout=60)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for trial in trials(study):
        values = [accuracy for _, accuracy in trial["accuracies"]]
        assert trial["accuracy"] in values
        assert len(values) < 12
        assert values[-1] < trial["accuracy"]
        summary = json.loads((study / f"trial-{trial['number']:04}" / "summary.json").read_text())
        best = round(summary["best_step"] / 36) - 1
        assert trial["accuracy"] == values[best]


@long
@pytest.mark.parametrize(("mpi", "groups"), [("openmpi", "2"), ("openmpi", "1"), ("mpich", "2")])
def test_two_hundred_trials_do_not_grow(mpirun: Mpirun, tmp_path: Path, mpi: str, groups: str) -> None:
    words = ["-m", "tests.programs.growing_study", tmp_path, "200", groups]
    done = mpirun(2, words, mpi=mpi, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for rank, (seen, numbers) in enumerate(json.loads(done.stdout.splitlines()[-1])):
        windows = [Usage(*each) for each in seen]
        print(rank, numbers, *map(tuple, windows))  # for `pytest -s`
        grown = growth(windows)
        assert max(grown.private, grown.files) <= 256, (rank, windows)  # KiB in 50 trials
        assert max(grown[2:]) <= 0, (rank, windows)
        assert len(set(numbers[1:])) == 1, (rank, numbers)
