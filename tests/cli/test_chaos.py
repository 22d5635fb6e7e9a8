"""`nettorrent chaos`: what is drawn, which processes die, what is reported, and that nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nettorrent_mpi.cli import chaos, launching
from nettorrent_mpi.cli.arguments import parse
from nettorrent_mpi.comm.processes import process
from nettorrent_mpi.plan.errors import LaunchError, UserError

ROOT = Path(__file__).resolve().parents[2]
# A launcher of three ranks, each with a child that has its environment; the first rank tells of steps. Those that are
# left after the run's end write the summary. A rank that gets the word `stays` ends never.
RUN = """
    import json, os, pathlib, subprocess, sys, time
    output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
    output.mkdir(exist_ok=True)
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
        child = subprocess.Popen(["sleep", "60"])
        for step in range(1, 31):
            time.sleep(0.02)
            if rank == 0:
                with open(output / "metrics.jsonl", "a") as file:
                    print(json.dumps({"step": step, "time": step * 0.02}), file=file)
        child.kill()
        print("rank", rank, "is done", flush=True)
        time.sleep(60 if "stays" in sys.argv else 0)
        sys.exit(0)
    words = [sys.executable, *sys.argv]
    ranks = [subprocess.Popen(words, env=os.environ | {"OMPI_COMM_WORLD_RANK": str(rank)}) for rank in range(3)]
    left = sum(rank.wait() == 0 for rank in ranks)
    if "silent" not in sys.argv:
        names = ("layout", "train_seconds", "final_loss", "test_accuracy")
        told = dict.fromkeys(names, 0.5) | {"steps": 30, "world_size": left}
        (output / "summary.json").write_text(json.dumps(told))
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "run.py").write_text(textwrap.dedent(RUN))
    return [sys.executable, str(tmp_path / "run.py")]


@given(st.data())
def test_what_is_drawn(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(2, 9))
    kills = data.draw(st.integers(1, ranks - 1))
    who = data.draw(st.lists(st.integers(0, ranks - 1), unique=True, max_size=kills))
    at_once, seed = data.draw(st.booleans()), data.draw(st.integers(0, 99))
    drawn = chaos.draw(ranks, kills, seed, who, at_once=at_once)
    assert drawn == chaos.draw(ranks, kills, seed, who, at_once=at_once)
    victims = [rank for kill in drawn for rank in kill.ranks]
    assert len(victims) == len(set(victims)) == kills
    assert set(who) <= set(victims) <= set(range(ranks))
    assert len(drawn) == (1 if at_once else kills)
    moments = [kill.progress for kill in drawn]
    assert moments == sorted(moments)
    assert chaos.EARLIEST <= moments[0] <= moments[-1] <= chaos.LATEST


def test_ranks_die_when_it_is_planned(command: list[str], tmp_path: Path) -> None:
    kills = [chaos.Kill((2,), 0.3, 0.5), chaos.Kill((7,), 0.5, 0.0), chaos.Kill((1,), 0.6, 0.0)]  # one is not there
    found = chaos.disturb(command, tmp_path / "run", kills, 60, 30, 0.02)
    assert found["complete"]
    assert found["code"] == 0
    assert [each["rank"] for each in found["killed"]] == [2, 1]
    assert found["killed"][0]["step"] >= 9
    assert found["killed"][1]["step"] >= 18
    assert found["world_size"] == 1
    assert found["processes_left"] == 2  # the children of those that were killed
    assert 0.015 < found["report_interval"] < 0.025


def test_a_run_that_ends_too_early(command: list[str], tmp_path: Path) -> None:
    found = chaos.disturb(command, tmp_path / "run", [chaos.Kill((0,), 2.0, 0.0)], 60, 30, 0.02)
    assert found["complete"]
    assert found["killed"] == []


def test_a_run_that_does_not_end(command: list[str], tmp_path: Path) -> None:
    found = chaos.train([*command, "stays"], tmp_path / "run", 2.0)
    assert not found["complete"]
    assert found["why"] == "not done after 2 s"
    assert sorted(found["lines"]) == ["rank 0 is done", "rank 1 is done", "rank 2 is done"]
    assert found["processes_left"] == 4


STARTS = """
import sys
from pathlib import Path
from nettorrent_mpi.cli.launching import StartedRun
from nettorrent_mpi.speedup.runs import run
words = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
if sys.argv[1] == "chaos":
    started = StartedRun(words, Path(sys.argv[2]))
    input()
else:
    run([*words[:2], f"import sys; sys.stdout = open({sys.argv[2]!r}, 'w'); {words[2]}"])
"""


@pytest.mark.parametrize("who", ["chaos", "speedup"])
def test_a_run_ends_with_who_has_started_it(who: str, tmp_path: Path) -> None:
    """Also by kill -9."""
    log, until = tmp_path / "log", time.monotonic() + 30
    with subprocess.Popen([sys.executable, "-c", STARTS, who, str(log)], stdin=subprocess.PIPE) as starter:
        while not (log.exists() and log.read_text().strip()):
            assert time.monotonic() < until
            time.sleep(0.01)
        starter.kill()
    while process(int(log.read_text())) is not None:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_run_without_results(command: list[str], tmp_path: Path) -> None:
    found = chaos.train([*command, "silent"], tmp_path / "run", 60)
    assert found["why"] == "ended with exit code 0 and no results"
    assert found["processes_left"] == 0


def test_what_is_told(tmp_path: Path) -> None:
    summary = {"seconds": 9.5, "steps": 300, "final_loss": 0.25, "test_accuracy": 0.9125, "world_size": 4}
    failures = [
        {"step": 40, "lost": [2], "left": 3, "resumed_from": 38, "seconds": 0.25},
        {"step": 90, "lost": [0, 3], "left": 1, "resumed_from": 90, "seconds": 1.5},
    ]
    calm = summary | {"failures": []}
    killed = [{"rank": rank, "step": step, "seconds": 1.0} for rank, step in ((2, 30), (0, 80), (3, 80))]
    stormy = summary | {"world_size": 1, "test_accuracy": 0.91, "failures": failures, "killed": killed}
    kills = [{"ranks": [2]}, {"ranks": [0, 3]}, {"ranks": [1]}]
    results = {"ranks": 5, "seed": 7, "kills": kills, "undisturbed": calm, "disturbed": stormy}
    results |= chaos.compared(calm, stormy)
    assert results["recovery_seconds"] == [0.25, 1.5]
    assert results["steps_lost"] == [2, 0]
    assert results["accuracy_difference"] == -0.0025
    assert chaos.describe(results, tmp_path).splitlines() == [
        "3 of 5 ranks were killed (seed 7): rank 2 at step 30, rank 0 at step 80, rank 3 at step 80",
        "1 more would have been killed, but the run had ended before",
        "",
        "lost ranks  at step  went on from  steps lost  recovered in  ranks left",
        "2                40            38           2        0.25 s           3",
        "0, 3             90            90           0        1.50 s           1",
        "",
        "run          ranks at the end  steps  seconds  training loss  test accuracy",
        "undisturbed                 4    300      9.5         0.2500        91.25 %",
        "disturbed                   1    300      9.5         0.2500        91.00 %",
        "",
        f"all figures: {tmp_path / 'chaos.json'}",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--ranks 1", "--ranks 1: at least 2"),
        ("--ranks 3 --kills 3", "--kills 3: at least 1, and fewer than the 3 ranks"),
        ("--kills 0", "--kills 0: at least 1"),
        ("--kills 1 --who 0,1", "--kills 1: at least the 2 of --who"),
        ("--who 0,0 --kills 2", "--who 0,0: different ranks from 0 to 3"),
        ("--who 4", "--who 4: different ranks from 0 to 3"),
        ("--set train.epoch=3", "train.epoch"),
    ],
)
def test_wrong_options(words: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        chaos.chaos(parse(["chaos", "--output", str(tmp_path / "x"), *words.split()]))
    assert told in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_inside_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(LaunchError, match="chaos starts the ranks itself"):
        chaos.chaos(parse(["chaos"]))


@pytest.mark.parametrize(
    ("version", "first"),
    [("mpirun (Open MPI) 4.1.6", "mpirun (Open MPI) 4.1.6"), ("HYDRA build details:\\n    Version: 5", "HYDRA")],
)
def test_other_launchers(version: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mpirun").write_text(f"#!/bin/sh\nprintf '{version}\\n'\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setattr(launching, "find_mpirun", lambda: str(tmp_path / "mpirun"))
    with pytest.raises(LaunchError) as caught:
        launching.tolerant_mpirun()
    (line,) = str(caught.value).splitlines()
    assert f"mpirun is {first}" in line
    assert "only Open MPI 5 and newer let ranks die" in line


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """One of three ranks is lost; the others end the training."""
    sets = ["model.layers=[flatten, linear: 32, linear: 10]", "train.epochs=2", "train.report_every=5", "kernels=numpy"]
    changes = [word for change in sets for word in ("--set", change)]
    words = ["chaos", "--ranks", "3", "--kills", "1", "--seed", "1", "--json", "--limit", "150", *changes]
    done = subprocess.run(
        [sys.executable, "-m", "nettorrent_mpi", *words, "--output", tmp_path / "out"],
        cwd=ROOT, capture_output=True, text=True, timeout=320,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == json.loads((tmp_path / "out" / "chaos.json").read_text())
    assert told["undisturbed"]["world_size"] == 3
    assert told["disturbed"]["world_size"] == 2
    assert told["disturbed"]["steps"] == told["undisturbed"]["steps"]
    assert told["disturbed"]["processes_left"] == 0
    assert len(told["recovery_seconds"]) == len(told["steps_lost"]) == 1
    assert abs(told["accuracy_difference"]) < 0.05
