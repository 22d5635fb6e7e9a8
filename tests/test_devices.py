"""Which GPUs a rank sees and takes, and what is said where it can have none: with a driver's library that is a fake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nettorrent_mpi import cores
from nettorrent_mpi.device.visible import choose, own_instance

ROOT = Path(__file__).resolve().parent.parent
GPU = "a0a0a0a0-a0a0-a0a0-a0a0-a0a0a0a0a00{}"
Environment = dict[str, str]

CONFIG = """\
data: {name: digits}
model: {layers: [flatten, {linear: 10}]}
device: gpu
train: {steps: 2, batch_size: 8}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The environment of a process that finds the fake driver, and what passes for CuPy, made for CUDA 13."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = ROOT / "tests" / "programs" / "fake_cuda.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    return {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{cupy(folder, 13)}:{ROOT}"}


def cupy(folder: Path, cuda: int) -> Path:
    """What passes for an installed CuPy."""
    site = folder / f"cuda{cuda}"
    about = site / f"cupy_cuda{cuda}x-14.0.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text(f"Metadata-Version: 2.1\nName: cupy-cuda{cuda}x\nVersion: 14.0.0\n")
    (site / "cupy").mkdir()
    (site / "cupy" / "__init__.py").touch()
    return site


def look(environment: Environment, rank: int | None = None) -> str:
    """What a new process sees, then what is left of CUDA_VISIBLE_DEVICES."""
    program = (
        "import os\nfrom nettorrent_mpi.device.visible import look\n"
        f"found = look(os.environ, {rank})\nprint(found.missing or found.gpus)\n"
        "print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "CUDA"))}
    environment = {**clean, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_gpus_are_seen(driver: Environment) -> None:
    told = look({**driver, "FAKE_GPUS": "2"})
    for number in range(2):
        assert f"VisibleGpu(uuid='{GPU.format(number)}', name='Fake {number}', memory={5 << 30})" in told


NEEDS = "and CuPy is made for CUDA 13; it needs driver 580 or newer"


@pytest.mark.parametrize(
    ("environment", "missing"),
    [
        ({"FAKE_GPUS": "0"}, "the NVIDIA driver finds no GPU on this node"),
        ({"FAKE_GPUS": "0", "CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES is empty, which hides all GPUs"),
        ({"FAKE_GPUS": "0", "CUDA_VISIBLE_DEVICES": "7"}, "CUDA_VISIBLE_DEVICES=7 names no GPU"),
        ({"FAKE_GPUS": "0", "SLURM_JOB_ID": "3"}, "Slurm has given this rank no GPU: ask for one, with --gpus-per-"),
        ({"FAKE_INIT": "802"}, "driver does not start (system not yet initialized, error 802)"),
        ({"FAKE_INIT": "999"}, "driver does not start (error 999)"),
        ({"FAKE_DRIVER": "12040"}, f"is too old: it runs CUDA 12.4, {NEEDS}; or pip install 'nettorrent_mpi[cuda12]'"),
        ({"FAKE_DRIVER": "11080"}, f"is too old: it runs CUDA 11.8, {NEEDS}\n"),
    ],
)
def test_what_is_missing_is_said(driver: Environment, environment: Environment, missing: str) -> None:
    assert missing in look({**driver, **environment})


def test_without_cupy_the_extra_is_named(driver: Environment) -> None:
    bare = {**driver, "PYTHONPATH": str(ROOT)}
    if subprocess.run([sys.executable, "-c", "import cupy"], capture_output=True, check=False).returncode == 0:
        pytest.skip("CuPy is installed here")
    assert look(bare) == "CuPy is not installed: pip install 'nettorrent_mpi[cuda13]'\nNone\n"
    assert "pip install 'nettorrent_mpi[cuda12]'\n" in look({**bare, "FAKE_DRIVER": "12080"})
    both = (
        "pip install 'nettorrent_mpi[cuda12]' or pip install 'nettorrent_mpi[cuda13]' (for drivers from 525 or 580 on)"
    )
    assert both in look({**bare, "FAKE_DRIVER": "11080"})


def test_without_a_driver(tmp_path: Path) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is an NVIDIA driver here")
    assert "this node has no NVIDIA driver (libcuda.so.1 is not found)" in look(
        {"PYTHONPATH": f"{cupy(tmp_path, 12)}:{ROOT}"}
    )


def test_a_rank_has_its_own_part_of_a_gpu(driver: Environment) -> None:
    """CUDA shows a process the first one only."""
    listed = {**driver, "CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b, MIG-c"}
    assert [look(listed, rank).splitlines()[-1] for rank in (0, 2, 4)] == ["MIG-a", "MIG-c", "MIG-b"]
    assert look(listed, None).splitlines()[-1] == "MIG-a,MIG-b, MIG-c"
    assert own_instance("0,1,2", 1) is None
    assert own_instance("MIG-a", 1) is None
    assert own_instance("GPU-a,MIG-b", 1) is None


A, B, C, D = "abcd"


@pytest.mark.parametrize(
    ("ranks", "gpus"),
    [
        ([("n", i, (A, B, C, D)) for i in range(4)], [0, 1, 2, 3]),
        ([("n", i, (A, B)) for i in range(5)], [0, 1, 0, 1, 0]),
        ([("n", None, (A, B)) for _ in range(3)], [0, 1, 0]),  # a launcher that says nothing
        ([("n", i, (uuid,)) for i, uuid in enumerate("abcd")], [0, 0, 0, 0]),  # --gpus-per-task
        ([("n", 0, (A, B)), ("n", 1, (A, B)), ("m", 0, (C, D)), ("m", 1, (C, D))], [0, 1, 0, 1]),
        ([("n", 2, (A, B, C, D)), ("n", 3, (A, B, C, D))], [2, 3]),  # half of the ranks, in a world of its own
        # --gpu-bind=closest, ranks dealt out to the sockets in turn: their numbers are even on one, odd on the other
        ([("n", 0, (A, B)), ("n", 1, (C, D)), ("n", 2, (A, B)), ("n", 3, (C, D))], [0, 1, 1, 0]),
    ],
)  # fmt: skip
def test_ranks_take_gpus(ranks: list[tuple[str, int | None, tuple[str, ...]]], gpus: list[int]) -> None:
    assert choose(ranks) == gpus


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3", "SLURM_LOCALID": "0"}, 3),  # mpirun in a job
        ({"MPI_LOCALRANKID": "1"}, 1),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4"}, 2),
        ({"SLURM_LOCALID": "0"}, None),  # the batch shell
        ({"PALS_LOCAL_RANKID": "5"}, 5),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "x"}, None),
    ],
)
def test_local_rank(environ: Environment, rank: int | None) -> None:
    assert cores.local_rank(environ) == rank


# -- runs --------------------------------------------------------------------------------------------------------------

Mpirun = Callable[..., "subprocess.CompletedProcess[str]"]


def train(mpirun: Mpirun, ranks: int, folder: Path, environment: Environment, *words: str, mpi: str = "openmpi") -> str:
    (folder / "c.yaml").write_text(CONFIG)
    command = ["-m", "nettorrent_mpi", "train", folder / "c.yaml", "--output", folder / "run", *words]
    done = mpirun(ranks, command, env=environment, mpi=mpi)
    assert done.returncode == 2, f"{done.stdout}\n{done.stderr}"
    told = [line for line in done.stderr.splitlines() if line.startswith("nettorrent: ")]
    assert len(told) == 1, done.stderr
    assert not (folder / "run").exists()
    return told[0].replace(f"{folder}/", "")


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_no_rank_has_a_gpu(mpirun: Mpirun, tmp_path: Path, driver: Environment, mpi: str) -> None:
    started = time.monotonic()
    told = train(mpirun, 4, tmp_path, {**driver, "FAKE_GPUS": "0", "CUDA_VISIBLE_DEVICES": ""}, mpi=mpi)
    assert time.monotonic() - started < 20  # two seconds, on a machine that does nothing else
    wanted = (
        "nettorrent: error: c.yaml:3: device: a GPU is asked for, but CUDA_VISIBLE_DEVICES is empty, which hides all"
    )
    assert told.startswith(wanted)
    assert "(rank" not in told


def test_some_ranks_have_none(mpirun: Mpirun, tmp_path: Path, driver: Environment) -> None:
    """The launcher gives each rank an environment of its own."""
    shell = tmp_path / "python"
    shell.write_text(
        f'#!/bin/sh\n[ "$OMPI_COMM_WORLD_RANK" = 2 ] && FAKE_GPUS=0\nexport FAKE_GPUS\nexec {sys.executable} "$@"\n'
    )
    shell.chmod(0o755)
    program = ["-c", "import os, sys; os.execv(sys.argv[1], sys.argv[1:])", shell]
    (tmp_path / "c.yaml").write_text(CONFIG)
    environment = {**driver, "FAKE_GPUS": "1"}
    missing = "the NVIDIA driver finds no GPU on this node: nvidia-smi -L lists them (rank 2, on "
    for change, wanted in (
        ("device=gpu", f"a GPU is asked for, but {missing}"),
        ("device=auto", f"auto finds a GPU on 3 of 4 ranks, and all or none have to compute on one: {missing}"),
    ):
        train_it = ["-m", "nettorrent_mpi", "train", tmp_path / "c.yaml", "--set", change]
        done = mpirun(4, [*program, *train_it], env=environment, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        (told,) = [line for line in done.stderr.splitlines() if line.startswith("nettorrent: ")]
        assert wanted in told


def test_auto_takes_cpu_cores_and_says_why(mpirun: Mpirun, tmp_path: Path, driver: Environment) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG.replace("device: gpu\n", ""))
    command = ["-m", "nettorrent_mpi", "train", tmp_path / "c.yaml", "--output", tmp_path / "run"]
    done = mpirun(1, command, env={**driver, "FAKE_GPUS": "0", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert (
        "device: cpu (CUDA_VISIBLE_DEVICES is empty, which hides all GPUs: unset it, or name one in it)" in done.stdout
    )


def test_a_plan_for_gpus_needs_none(tmp_path: Path, mpirun: Mpirun) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    done = mpirun(1, ["-m", "nettorrent_mpi", "train", tmp_path / "c.yaml", "--dry-run", "--set", "dtype=tf32"])
    assert done.returncode == 0, done.stderr


def test_a_type_that_needs_a_gpu(tmp_path: Path, mpirun: Mpirun) -> None:
    told = train(mpirun, 1, tmp_path, {"CUDA_VISIBLE_DEVICES": ""}, "--set", "device=auto", "--set", "dtype=tf32")
    assert "--set dtype=tf32" in told
    assert "tf32 needs a GPU, and there is none here" in told
