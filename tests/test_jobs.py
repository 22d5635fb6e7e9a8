"""The job scripts: the commands that they give to a launcher. tests/slurm/ submits them."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "jobs").glob("*.sbatch"))
TRAIN = "python -m nettorrent_mpi.train"
SRUN = "srun --mpi={} --kill-on-bad-exit=1 --wait=60 --ntasks="


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
            '#!/bin/sh\nif [ "$1" = --version ]; then echo "$VERSION"; exit; fi\n'
            f'echo {name} "$@"\n'
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


@pytest.mark.parametrize(
    ("version", "flags", "words"),
    [
        ("mpirun (Open MPI) 5.0.11", None, " --with-ft ulfm"),
        ("mpirun (Open MPI) 5.0.11", "", ""),
        ("mpirun (Open MPI) 5.0.11", "--map-by node", " --map-by node"),
        ("mpirun (Open MPI) 4.1.6", None, ""),
        ("HYDRA build details:", None, ""),
    ],
)
def test_ranks_may_be_lost(repository: Path, version: str, flags: str | None, words: str) -> None:
    more = {} if flags is None else {"MPIRUN_FLAGS": flags}
    done = submit_to_fakes(repository, "mnist.sbatch", SLURM_JOB_NAME="mnist", VERSION=version, **more)
    assert done.stdout.splitlines()[0].startswith(f"mpirun{words} -n 8 {TRAIN} configs/mnist.yaml ")


def test_srun(repository: Path) -> None:
    variables = {"LAUNCH": "srun", "SRUN_MPI": "pmi2", "SLURM_CPUS_PER_TASK": "4"}
    done = submit_to_fakes(repository, "mnist.sbatch", SLURM_JOB_NAME="mnist", **variables)
    assert done.stdout.splitlines() == [
        f"{SRUN.format('pmi2')}8 {TRAIN} configs/mnist.yaml --output runs/mnist-17 --resume auto",
        "cpus=4 binding=none",
    ]


TRAIN_GPU = f"{TRAIN} configs/cifar_resnet.yaml --output runs/gpu-17 --resume auto --set device=gpu"


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
    assert (
        command
        == f"srun --mpi=pmix --kill-on-bad-exit=1 --wait=60 --gpu-bind=closest --ntasks=8 {TRAIN_GPU} --set seed=2"
    )
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


def start(repository: Path, mpirun: str, *args: str, **variables: str) -> subprocess.Popen[str]:
    """Start a script by bash, with an mpirun and a scontrol that are these lines of a shell."""
    (repository / ".venv" / "bin").mkdir(parents=True)
    (repository / ".venv" / "bin" / "activate").write_text('PATH="$PWD:$PATH"\n')
    for name, lines in (("mpirun", mpirun), ("scontrol", 'echo scontrol "$@"; exit 1\n')):
        (repository / name).write_text(f"#!/bin/sh\n{lines}")
        (repository / name).chmod(0o755)
    settings = {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "mnist", "MPIRUN_FLAGS": ""}
    return subprocess.Popen(
        ["bash", "jobs/mnist.sbatch", *args], cwd=repository, env={"PATH": "/usr/bin:/bin"} | settings | variables,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


STOPPED = "stopped with a checkpoint; to continue: scontrol requeue 17"


def requeues(why: str) -> list[str]:
    """What is told where Slurm refuses it."""
    return [f"{why}; the job requeues itself", "scontrol requeue 17", f"{why}; to continue: scontrol requeue 17"]


OVER = "stopped with a checkpoint because the time is nearly over"
LOST = requeues("the run ended without results, as when a node is lost")


@pytest.mark.parametrize(
    ("number", "restarts", "told"),
    [
        (signal.SIGUSR1, "0", [STOPPED]),
        (signal.SIGTERM, "0", [STOPPED]),
        (signal.SIGUSR2, "0", requeues(OVER)),
        (signal.SIGUSR2, "2", requeues(OVER)[2:]),
    ],
)
def test_a_signal_is_passed_on_as_usr1(
    repository: Path, number: signal.Signals, restarts: str, told: list[str]
) -> None:
    """And the script ends as the command does, with its code; where Slurm sent its warning the job requeues itself."""
    fake = "trap 'echo got USR1; exit 75' USR1\necho ready\nwhile :; do sleep 0.05; done\n"
    job = start(repository, fake, SLURM_RESTART_COUNT=restarts, REQUEUES="2")
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(number)
    lines = job.communicate(timeout=20)[0].splitlines()
    assert job.returncode == 75
    assert lines == ["got USR1", *told]


@pytest.mark.parametrize(
    ("mpirun", "args", "code", "told"),
    [
        ("mkdir -p runs/mnist-17; touch runs/mnist-17/summary.json", [], 0, []),
        ("mkdir -p runs/mnist-17", [], 1, LOST),
        ("mkdir -p runs/mnist-17 a; touch a/summary.json", ["--output", "a"], 0, []),
        ("mkdir -p a", ["--output=a"], 1, LOST),
        ("true", ["--dry-run"], 0, []),
        ("exit 2", [], 2, []),
        ("exit 137", [], 137, ["ranks were killed; to continue: scontrol requeue 17"]),
    ],
)
def test_a_run_is_complete_if_its_summary_is_there(
    repository: Path, mpirun: str, args: list[str], code: int, told: list[str]
) -> None:
    job = start(repository, mpirun, *args)
    assert job.communicate(timeout=20)[0].splitlines() == told
    assert job.returncode == code
