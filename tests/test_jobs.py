"""The job scripts: the commands that they give to a launcher, and, where there is a Slurm, the jobs themselves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
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
TRAIN = "python -m nettorrent_mpi.train"
SRUN = "srun --mpi={} --kill-on-bad-exit=1 --ntasks="
SHAPES = {"cifar": "[32, 32, 3]", "gpu": "[32, 32, 3]", "mnist": "[28, 28, 1]", "speedup": "[32, 32, 3]"}


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
            "[ -z $SLURM_GPUS$SLURM_GPUS_PER_TASK ] || echo gpus=$SLURM_GPUS, per task=$SLURM_GPUS_PER_TASK\n"
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
        f"mpirun -n 8 {TRAIN} configs/cifar.yaml --output runs/mine-17 --resume auto --set seed=2",
        "cpus= binding=core:overload-allowed",
    ]


def test_srun(repository: Path) -> None:
    variables = {"LAUNCH": "srun", "SRUN_MPI": "pmi2", "SLURM_CPUS_PER_TASK": "4"}
    done = submit_to_fakes(repository, "mnist.sbatch", SLURM_JOB_NAME="mnist", **variables)
    assert done.stdout.splitlines() == [
        f"{SRUN.format('pmi2')}8 {TRAIN} configs/mnist.yaml --output runs/mnist-17 --resume auto",
        "cpus=4 binding=none",
    ]


TRAIN_GPU = f"{TRAIN} configs/cifar_resnet.yaml --set device=gpu --output runs/gpu-17 --resume auto"


@pytest.mark.parametrize("asked", ["1", "a100:1"])
def test_gpus_with_mpirun(repository: Path, asked: str) -> None:
    """Its daemon gets all GPUs of the job on its node, which the ranks divide."""
    done = submit_to_fakes(repository, "gpu.sbatch", SLURM_JOB_NAME="gpu", SLURM_GPUS_PER_TASK=asked)
    command, _, gpus = done.stdout.splitlines()
    assert command == f"mpirun -n 8 {TRAIN_GPU}"
    assert gpus == "gpus=8, per task="


def test_gpus_with_srun(repository: Path) -> None:
    variables = {"LAUNCH": "srun", "SLURM_GPUS_PER_TASK": "1"}
    done = submit_to_fakes(repository, "gpu.sbatch", "--set", "seed=2", SLURM_JOB_NAME="gpu", **variables)
    command, _, gpus = done.stdout.splitlines()
    assert command == f"srun --mpi=pmix --kill-on-bad-exit=1 --gpu-bind=closest --ntasks=8 {TRAIN_GPU} --set seed=2"
    assert gpus == "gpus=, per task=1"


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
        ({"RANKS": "1,3", "LAUNCH": "srun"}, "1,3", SRUN.format("pmix") + "{ranks}"),
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


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_is_passed_on_as_usr1(repository: Path, number: signal.Signals) -> None:
    """And the script ends as the command does, with its code."""
    (repository / ".venv" / "bin").mkdir(parents=True)
    (repository / ".venv" / "bin" / "activate").write_text('PATH="$PWD:$PATH"\n')
    fake = repository / "mpirun"
    fake.write_text("#!/bin/sh\ntrap 'echo got USR1; exit 75' USR1\necho ready\nwhile :; do sleep 0.05; done\n")
    fake.chmod(0o755)
    job = subprocess.Popen(
        ["bash", "jobs/mnist.sbatch"],
        cwd=repository,
        env={"PATH": "/usr/bin:/bin", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "mnist"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(number)
    told = job.communicate(timeout=20)[0].splitlines()
    assert job.returncode == 75
    assert told == ["got USR1", "stopped with a checkpoint; to continue: scontrol requeue 17"]


def slurm_is_missing() -> str:
    """Why jobs cannot be submitted here; empty where they can."""
    if shutil.which("sbatch") is None:
        return "there is no sbatch"
    ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False)
    return "" if " is UP" in ping.stdout else "no Slurm controller answers"


def submit(repository: Path, script: str, *options: str, words: Sequence[str] = (), **variables: str) -> None:
    """sbatch, wait for the job's end (Slurm ends it after ten minutes), and show its output if it failed."""
    if reason := slurm_is_missing():
        pytest.skip(reason)
    (repository / ".venv").symlink_to(ROOT / ".venv")
    name = script.removesuffix(".sbatch")
    small = [part.replace("SHAPE", SHAPES[name]) for part in SMALL]
    done = subprocess.run(
        ["sbatch", "--wait", "--time=10", *options, f"jobs/{script}", *small, *words],
        cwd=repository,
        env={**os.environ, **variables},
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


def with_srun() -> dict[str, str]:
    library = ROOT / ".venv-mpich" / "lib" / "libmpi.so.12"
    if not library.exists():
        pytest.skip(f"{library} is missing: make test installs it")
    return {"LAUNCH": "srun", "SRUN_MPI": "pmi2", "MPI4PY_LIBMPI": str(library)}


def test_job_with_srun(repository: Path) -> None:
    submit(repository, "cifar.sbatch", "--ntasks=5", **with_srun())
    assert world_sizes(repository) == [5]


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_job_on_a_node_without_a_gpu(repository: Path, launcher: str) -> None:
    """Where Slurm has no GPUs to give, without asking for them."""
    if reason := slurm_is_missing():
        pytest.skip(reason)
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is an NVIDIA driver here")
    (repository / ".venv").symlink_to(ROOT / ".venv")
    script = repository / "gpu.sbatch"
    lines = (ROOT / "jobs" / "gpu.sbatch").read_text().splitlines(keepends=True)
    gpus = "Gres=gpu" in subprocess.run(["scontrol", "show", "node"], capture_output=True, text=True, check=True).stdout
    script.write_text("".join(line for line in lines if gpus or not line.startswith("#SBATCH --gpus-per-task")))
    small = [part.replace("SHAPE", SHAPES["gpu"]) for part in SMALL]
    done = subprocess.run(
        ["sbatch", "--wait", "--time=10", "--ntasks=3", "--cpus-per-task=1", script, *small],
        cwd=repository, env={**os.environ, **(with_srun() if launcher == "srun" else {})},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    log = "\n".join(path.read_text() for path in repository.glob("*.out"))
    assert done.returncode == 2, f"{done.stdout}{done.stderr}\n{log}"
    (told,) = [line for line in log.splitlines() if line.startswith("nettorrent: ")]
    assert "error: --set device=gpu: device: a GPU is asked for, but " in told
    assert "no NVIDIA driver on this node" in told or "this node has no NVIDIA driver" in told
    assert not (repository / "runs").exists()


# Minutes of small steps; the signals below end them.
LONG = ["train.steps=10000000", "train.batch_size=16", "train.report_every=50", "train.evaluate_every=10000000"]
LONG += ["checkpoint.every_epochs=null", "model.layers=[flatten, {linear: 16}, {linear: 10}]", "kernels=numpy"]


class Job:
    """A job that trains for long, from its first record on."""

    def __init__(self, repository: Path, script: str, *options: str, **variables: str):
        if reason := slurm_is_missing():
            pytest.skip(reason)
        (repository / ".venv").symlink_to(ROOT / ".venv")
        name = script.removesuffix(".sbatch")
        small = [part.replace("SHAPE", SHAPES[name]) for part in SMALL]
        sets = [word for change in LONG for word in ("--set", change)]
        done = subprocess.run(
            ["sbatch", "--parsable", "--time=10", *options, f"jobs/{script}", *small, *sets],
            cwd=repository, env={**os.environ, **variables}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        self.number = done.stdout.strip()
        self.run, self.out = repository / "runs" / f"{name}-{self.number}", repository / f"{name}-{self.number}.out"
        self.wait_for(lambda: self.records() > 0)

    def records(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def wait_for(self, what: Callable[[], bool], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not what():
            if time.monotonic() > until:
                self.do("scancel")
                pytest.fail(self.out.read_text() if self.out.exists() else "the job has not begun")
            time.sleep(0.2)

    def do(self, *command: str) -> str:
        return subprocess.run([*command, self.number], capture_output=True, text=True, check=False).stdout

    def end(self) -> str:
        """Wait for the job's end and return its exit code, a colon and the signal that ended it."""
        self.wait_for(lambda: " JobState=RUNNING " not in (told := self.do("scontrol", "show", "job")) and (
            " JobState=COMPLETING " not in told
        ))  # fmt: skip
        return next(word for word in self.do("scontrol", "show", "job").split() if word.startswith("ExitCode="))


@pytest.mark.parametrize("launcher", ["mpirun", "srun"])
def test_job_that_is_stopped_and_requeued(repository: Path, launcher: str) -> None:
    """As Slurm does it before the time is over, or with what it preempts."""
    job = Job(repository, "cifar.sbatch", "--ntasks=3", "--nodes=2", **(with_srun() if launcher == "srun" else {}))
    job.do("scancel", "--batch", "--signal=USR2")
    assert job.end() == "ExitCode=75:0", job.out.read_text()
    (first,) = (job.run / "checkpoints").iterdir()
    records = job.records()
    job.do("scontrol", "requeue")
    time.sleep(5)  # Slurm refuses a job that begins too soon after its end, and waits for two minutes
    subprocess.run(["scontrol", "update", f"JobId={job.number}", "StartTime=now"], check=True)
    job.wait_for(lambda: job.records() > records)
    job.do("scancel", "--batch", "--signal=USR2")
    assert job.end() == "ExitCode=75:0", job.out.read_text()
    told = job.out.read_text()
    assert f"resumes after step {int(first.stem.removeprefix('step-'))} of " in told
    assert told.count("stopped with a checkpoint; to continue: scontrol requeue") == 2


def test_job_of_which_a_rank_is_killed(repository: Path) -> None:
    """srun ends the others, which would wait for it."""
    job = Job(repository, "cifar.sbatch", "--ntasks=3", "--nodes=2", **with_srun())
    ranks = subprocess.run(
        ["pgrep", "-f", f"^[^ ]*python -m nettorrent_mpi.train.*runs/cifar-{job.number}"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert job.end() == "ExitCode=137:0", job.out.read_text()


def test_job_speedup(repository: Path) -> None:
    few = ["--modes", "rows", "--peers", "none", "--steps", "3", "--repeats", "1"]
    submit(repository, "speedup.sbatch", "--ntasks=4", words=few, RANKS="1,3")
    (path,) = repository.glob("runs/*/results.json")
    results = json.loads(path.read_text())
    assert results["complete"]
    assert [side["name"] for side in results["sides"]] == ["serial-1", "rows-3"]
