"""One process without a launcher needs no MPI and uses none; ranks that cannot load it say so in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from nettorrent_mpi import env

Run = subprocess.CompletedProcess[str]

COMMANDS = """
import sys
from nettorrent_mpi.__main__ import main
commands = (
    ["train", "--dry-run", "--ranks", "64"],
    ["train", "--output", "run", "--set", "train.steps=4", "--set", "checkpoint.every_epochs=1", "--set", "trace=true"],
    ["train", "--output", "run", "--set", "train.steps=6", "--resume"],
    ["evaluate", "run"],
    ["export", "run", "--output", "run.npz"],
)
print("CODES", *[main(command) for command in commands])
import numpy as np, nettorrent_mpi as nt
x, y = np.random.default_rng(0).normal(size=(40, 5)), np.arange(40) % 3
with nt.Trainer([nt.Linear(4), nt.BatchNorm(), nt.Linear(3)], (x, y), batch_size=8) as trainer:
    list(trainer.train(epochs=1))
    print(trainer.evaluate().test, trainer.predict(x).shape)
print("MPI", "mpi4py.MPI" in sys.modules, "/dev/shm" in open("/proc/self/maps").read())
"""


def python(folder: Path, *args: str, library: str | None = None, **variables: str) -> Run:
    """`python *args` as no launcher's child, with this MPI library (None: the environment's own)."""
    bare = {name: value for name, value in os.environ.items() if not env.launched({name: value})}
    more = {"PYTHONPATH": str(Path(__file__).parent.parent)} | ({"MPI4PY_LIBMPI": library} if library else {})
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=folder, env=bare | more | variables, capture_output=True, text=True)


def test_everything_that_one_process_does_works_without_mpi(tmp_path: Path) -> None:
    done = python(tmp_path, "-c", COMMANDS, library="/missing/libmpi.so")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "CODES 0 0 0 0 0" in lines
    assert lines[-1] == "MPI False False"  # nothing is left in /dev/shm, because nothing is put there
    assert "none" in (tmp_path / "run" / "summary.json").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_without_an_mpi_library_are_told_once(tmp_path: Path, rank: int) -> None:
    variables = {"PMI_RANK": str(rank), "PMI_SIZE": "2"}
    done = python(tmp_path, "-m", "nettorrent_mpi.train", library="/missing/libmpi.so", **variables)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == (1 if rank == 0 else 0)
    if lines:
        assert lines[0].startswith("nettorrent: error: MPI cannot be loaded (cannot load MPI library: /missing/libmpi")
        assert "module" in lines[0]
        assert lines[0].endswith("pip install '.[mpi]'")


def test_silent_copies_of_a_script_are_refused(tmp_path: Path) -> None:
    """srun --mpi=none starts as many programs of one rank: also where a script is run and not the command."""
    code = "import nettorrent_mpi as nt; nt.Trainer([nt.Linear(2)], ([[1.0], [2.0]], [0, 1]))"
    done = python(tmp_path, "-c", code, SLURM_STEP_ID="0", SLURM_NTASKS="2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("nettorrent: error: <string>:1: srun started 2 tasks")


@pytest.mark.parametrize(
    ("environ", "launched"),
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_RANK": "0"}, True),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, True),
        ({"PMIX_RANK": "3"}, True),
        ({"PALS_RANKID": "3"}, True),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),  # srun --pty bash
        ({"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_MCA_btl": "self", "MPICH_RANK_REORDER_METHOD": "1"}, False),
    ],
)
def test_a_launcher_is_known_by_its_rank(environ: Mapping[str, str], launched: bool) -> None:
    assert env.launched(environ) == launched


@pytest.mark.parametrize("mpi", ["openmpi", pytest.param("mpich", marks=pytest.mark.slow)])
def test_one_rank_of_a_launcher_uses_mpi(mpirun: Callable[..., Run], mpi: str) -> None:
    code = "from nettorrent_mpi.comm.world import World; world = World(); print(world.size, world.library)"
    done = mpirun(1, ["-c", code], mpi=mpi)
    assert done.stdout.split()[:2] == ["1", {"openmpi": "Open", "mpich": "MPICH"}[mpi]], done.stderr
