"""The job scripts: the commands that they give to a launcher, and, where there is a Slurm, the jobs themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "jobs").glob("*.sbatch"))
# A few steps without any file of data.
SMALL = [
    "--set",
    "data={name: synthetic, rows: 96, test_rows: 32, shape: SHAPE, classes: 10}",
    "--set",
    "train.steps=3",
    "--set",
    "train.schedule=constant",
]
SHAPES = {"cifar": "[32, 32, 3]", "mnist": "[28, 28, 1]", "speedup": "[32, 32, 3]"}


def test_scripts_are_known() -> None:
    assert {name.removesuffix(".sbatch") for name in SCRIPTS} == set(SHAPES)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder that looks like the repository to the scripts; what they write stays in it."""
    for name in ("jobs", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def submit_to_fakes(repository: Path, script: str, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script by bash, with launchers that print their arguments and what they find in the environment."""
    activate = repository / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    fakes = repository / "fakes"
    fakes.mkdir()
    for name in ("mpirun", "srun", "python"):
        fake = fakes / name
        fake.write_text(
            f'#!/bin/sh\necho {name} "$@"\n'
            "echo cpus=$SRUN_CPUS_PER_TASK binding=$PRTE_MCA_hwloc_default_binding_policy\n"
        )
        fake.chmod(0o755)
    return subprocess.run(
        ["bash", f"jobs/{script}", *args],
        cwd=repository,
        env={"PATH": f"{fakes}:/usr/bin:/bin", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "17", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_mpirun(repository: Path) -> None:
    done = submit_to_fakes(repository, "cifar.sbatch", "--set", "seed=2", SLURM_JOB_NAME="mine")
    assert done.stdout.splitlines() == [
        "mpirun -n 8 python -m nettorrent_mpi.train configs/cifar.yaml --output runs/mine-17 --set seed=2",
        "cpus= binding=core:overload-allowed",
    ]


def test_srun(repository: Path) -> None:
    variables = {"LAUNCH": "srun", "SRUN_MPI": "pmi2", "SLURM_CPUS_PER_TASK": "4"}
    done = submit_to_fakes(repository, "mnist.sbatch", SLURM_JOB_NAME="mnist", **variables)
    assert done.stdout.splitlines() == [
        "srun --mpi=pmi2 --ntasks=8 python -m nettorrent_mpi.train configs/mnist.yaml --output runs/mnist-17",
        "cpus=4 binding=none",
    ]


SPEEDUP = (
    "python -m nettorrent_mpi speedup configs/cifar.yaml --ranks {ranks} --launcher {launcher} "
    "--output runs/speedup-17 --steps 5"
)


@pytest.mark.parametrize(
    ("variables", "ranks", "launcher"),
    [
        ({}, "1,2,4,8", "mpirun -n {ranks}"),
        ({"SLURM_NTASKS": "6"}, "1,2,4,6", "mpirun -n {ranks}"),
        ({"SLURM_NTASKS": "1"}, "1", "mpirun -n {ranks}"),
        ({"RANKS": "1,3", "LAUNCH": "srun"}, "1,3", "srun --mpi=pmix --ntasks={ranks}"),
    ],
)
def test_speedup(repository: Path, variables: dict[str, str], ranks: str, launcher: str) -> None:
    done = submit_to_fakes(repository, "speedup.sbatch", "--steps", "5", SLURM_JOB_NAME="speedup", **variables)
    assert done.stdout.splitlines()[0] == SPEEDUP.format(ranks=ranks, launcher=launcher)


def test_speedup_beyond_the_job(repository: Path) -> None:
    done = submit_to_fakes(repository, "speedup.sbatch", SLURM_JOB_NAME="speedup", RANKS="1,9")
    assert done.returncode == 2
    assert done.stderr == "9 ranks do not fit into --ntasks=8: raise it, or shorten RANKS\n"


def test_unknown_launcher(repository: Path) -> None:
    done = submit_to_fakes(repository, "cifar.sbatch", SLURM_JOB_NAME="cifar", LAUNCH="mpiexec")
    assert done.returncode == 2
    assert done.stderr == "LAUNCH=mpiexec is neither mpirun nor srun (jobs/site.sh)\n"


def slurm_is_missing() -> str:
    """Why jobs cannot be submitted here; empty where they can."""
    if shutil.which("sbatch") is None:
        return "there is no sbatch"
    ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False)
    return "" if " is UP" in ping.stdout else "no Slurm controller answers"


def submit(repository: Path, script: str, *options: str, words: Sequence[str] = (), **variables: str) -> None:
    """sbatch, wait for the job's end (Slurm ends it after two minutes), and show its output if it failed."""
    if reason := slurm_is_missing():
        pytest.skip(reason)
    (repository / ".venv").symlink_to(ROOT / ".venv")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    name = script.removesuffix(".sbatch")
    small = [part.replace("SHAPE", SHAPES[name]) for part in SMALL]
    done = subprocess.run(
        ["sbatch", "--wait", "--time=2", *options, f"jobs/{script}", *small, *words],
        cwd=repository,
        env={**os.environ, **root, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    logs = "\n".join(path.read_text() for path in repository.glob("*.out"))
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{logs}"


def world_sizes(repository: Path) -> list[int]:
    return sorted(json.loads(path.read_text())["world_size"] for path in repository.glob("runs/**/summary.json"))


@pytest.mark.parametrize("script", ["cifar.sbatch", "mnist.sbatch"])
def test_job_with_mpirun(repository: Path, script: str) -> None:
    submit(repository, script, "--ntasks=4")
    assert world_sizes(repository) == [4]


def test_job_with_srun(repository: Path) -> None:
    library = ROOT / ".venv-mpich" / "lib" / "libmpi.so.12"
    if not library.exists():
        pytest.skip(f"{library} is missing: make test installs it")
    variables = {"LAUNCH": "srun", "SRUN_MPI": "pmi2", "MPI4PY_LIBMPI": str(library)}
    submit(repository, "cifar.sbatch", "--ntasks=5", **variables)
    assert world_sizes(repository) == [5]


def test_job_speedup(repository: Path) -> None:
    few = ["--modes", "rows", "--peers", "none", "--steps", "3", "--repeats", "1"]
    submit(repository, "speedup.sbatch", "--ntasks=4", words=few, RANKS="1,3")
    (path,) = repository.glob("runs/*/results.json")
    results = json.loads(path.read_text())
    assert results["complete"]
    assert [side["name"] for side in results["sides"]] == ["serial-1", "rows-3"]
