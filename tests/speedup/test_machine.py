"""How ranks are started with either MPI, and what the figures are said to belong to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nettorrent_mpi.plan.errors import ChildError, ConfigError, LaunchError
from nettorrent_mpi.speedup import machine, runs
from nettorrent_mpi.speedup.machine import Launcher

VERSIONS = {"openmpi": "mpirun (Open MPI) 5.0.11", "mpich": "HYDRA build details:"}


def fake(folder: Path, mpi: str) -> str:
    """An mpirun that only tells its version."""
    path = folder / mpi / "mpirun"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\necho '{VERSIONS[mpi]}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("mpi", "more"), [("openmpi", ["--oversubscribe"]), ("mpich", [])])
def test_more_ranks_than_cores(tmp_path: Path, mpi: str, more: list[str]) -> None:
    mpirun = fake(tmp_path, mpi)
    launcher = Launcher(f"{mpirun} -n {{ranks}}", cores=2)
    assert launcher.command(2, ["python", "x"]) == [mpirun, "-n", "2", "python", "x"]
    assert launcher.command(3, ["python", "x"]) == [mpirun, *more, "-n", "3", "python", "x"]


def test_other_launchers(tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    launcher = Launcher(f"{srun} --mpi=pmix --ntasks={{ranks}}", cores=1)
    assert launcher.command(4, ["x"]) == [str(srun), "--mpi=pmix", "--ntasks=4", "x"]
    for words, error in (
        ("mpirun -n 4", ConfigError),
        ("mpirun '{ranks}", ConfigError),
        ("/nowhere/mpirun {ranks}", LaunchError),
    ):
        with pytest.raises(error, match="--launcher"):
            Launcher(words)


def test_cores_and_nodes_of_a_slurm_job() -> None:
    assert machine.cores_of_job({"SLURM_JOB_CPUS_PER_NODE": "400(x2),3"}) == 803
    assert machine.cores_of_job({}) == machine.cores_of_node({})
    assert machine.nodes_of_job({"SLURM_JOB_NUM_NODES": "3"}) == 3
    assert machine.nodes_of_job({}) == 1


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    env = machine.environment(3)
    assert "OPENBLAS_CORETYPE" not in env
    assert {env[name] for name in machine.THREADS} == {"3"}
    assert os.environ["OMP_NUM_THREADS"] == "8"


def test_the_host_is_told() -> None:
    host = machine.describe_host()
    assert host["cores"] >= 1
    assert host["packages"]["numpy"]
    assert host["blas"]
    text = machine.in_words(host)
    assert host["cpu"] in text
    assert "BLAS " in text


def test_a_program_that_fails() -> None:
    lines = "; ".join(f"echo line {n}" for n in range(20))
    with pytest.raises(ChildError) as caught:
        runs.run(["sh", "-c", f"{lines}; echo 'the reason' >&2; exit 3"])
    assert caught.value.code == 3
    assert caught.value.exit_code == 1
    assert len(caught.value.lines) == runs.LAST_LINES
    assert caught.value.lines[-1] == "the reason"
    assert "failed with exit code 3" in str(caught.value)
    with pytest.raises(ChildError, match="was ended by signal 9"):
        runs.run(["sh", "-c", "kill -9 $$"])


def test_accuracies_are_those_that_end_a_training() -> None:
    metrics = [
        {"time": 1.0, "epoch": 1.0, "test_accuracy": 0.5, "validation_accuracy": 0.6},
        {"time": 2.0, "epoch": 2.0, "test_accuracy": 0.7, "validation_accuracy": None},
        {"time": 2.5, "epoch": 2.5},
    ]
    assert runs.curve_of(metrics) == [(1.0, 1.0, 0.6), (2.0, 2.0, 0.7)]
