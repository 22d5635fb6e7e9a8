"""Ranks that die before MPI has started or while it ends, and ranks that fail: the others end, too, or go on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

EARLY = Path(__file__).resolve().parent / "programs" / "early.py"
SETS = ["--set", "data={name: digits}", "--set", "train.steps=20", "--set", "layout=layers"]
SETS += ["--set", "model.layers=[flatten, linear: {units: 16, activation: relu}, linear: 10]"]
Mpirun = Callable[..., subprocess.CompletedProcess[str]]
slow, long = pytest.mark.slow, pytest.mark.long


@pytest.mark.parametrize(
    ("mpi", "moment", "told"),
    [
        pytest.param("ulfm", "first", "MPI does not start: a rank of this machine has ended", id="before MPI"),
        pytest.param("ulfm", "late", "it has taken 3 s (NETTORRENT_START_SECONDS)", id="does not come", marks=slow),
        pytest.param("ulfm", "init", "a rank has died before all had met", id="after MPI's start", marks=slow),
        pytest.param("ulfm", "meet", "a rank has died before all had met", id="when the ranks meet", marks=slow),
        pytest.param("openmpi", "first", "", id="before Open MPI", marks=long),
        pytest.param("openmpi", "init", "", id="after Open MPI's start", marks=long),
        pytest.param("mpich", "first", "", id="before MPICH", marks=long),
        pytest.param("mpich", "init", "", id="after MPICH's start", marks=long),
    ],
)
def test_a_rank_that_dies_at_the_start_ends_the_run(
    mpirun: Mpirun, tmp_path: Path, mpi: str, moment: str, told: str
) -> None:
    env = {"NETTORRENT_START_SECONDS": "3" if moment == "late" else None}
    done = mpirun(3, [EARLY, "1", moment, *SETS, "--output", tmp_path / "run"], mpi=mpi, env=env, timeout=60)
    assert done.returncode != 0
    assert told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("nettorrent: error") == (mpi == "ulfm"), done.stderr


@slow
@pytest.mark.parametrize("rank", [0, 2])
def test_once_all_have_met_the_others_go_on(mpirun: Mpirun, tmp_path: Path, rank: int) -> None:
    done = mpirun(3, [EARLY, str(rank), "watch", *SETS, "--output", tmp_path / "run"], mpi="ulfm")
    assert done.returncode == 0, done.stderr
    assert f"without rank {rank}, lost at the start" in done.stderr, done.stderr
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("moment", "code", "told"),
    [
        pytest.param("mistake", 2, "nettorrent: error: a file is torn", id="a mistake"),
        pytest.param("fail", 1, "RuntimeError: a bug", id="a bug", marks=slow),
    ],
)
def test_a_rank_that_fails_ends_all_where_lost_ranks_are_survived(
    mpirun: Mpirun, tmp_path: Path, moment: str, code: int, told: str
) -> None:
    """MPI_Abort would end this rank alone, and the others would wait for it for ever."""
    done = mpirun(4, [EARLY, "1", moment, *SETS, "--output", tmp_path / "run"], mpi="ulfm")
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    assert done.stderr.count(told) == 1, done.stderr


ENDING = """
import os, signal, sys, time
from nettorrent_mpi.comm.library import MPI
from nettorrent_mpi.comm.world import World
world = World()
rank = world.rank
world.free()
if rank == 1:
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "before":
        die()
    elif sys.argv[1] == "inside":
        MPI.__dict__["Finalize"] = die
    else:
        time.sleep(8)
print("done")
"""


@slow
@pytest.mark.parametrize(("moment", "lines"), [("before", 2), ("inside", 3), ("late", 3)])
def test_no_rank_waits_in_its_end_for_one_that_has_died(mpirun: Mpirun, moment: str, lines: int) -> None:
    """The late one is waited for: a script may work on after its training."""
    done = mpirun(3, ["-c", ENDING, moment], mpi="ulfm", timeout=40)
    assert done.stdout.split() == ["done"] * lines, done.stderr
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
