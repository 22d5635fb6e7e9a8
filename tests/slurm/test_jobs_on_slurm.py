"""The jobs themselves, on a real Slurm of four nodes: `make test-slurm`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    "NETTORRENT_TEST_SLURM" not in os.environ, reason="make test-slurm starts a Slurm of four nodes, and submits jobs"
)
SHAPES = {"cifar": "[32, 32, 3]", "gpu": "[32, 32, 3]", "mnist": "[28, 28, 1]", "speedup": "[32, 32, 3]"}
# A network so small that a step takes less than a millisecond, on data without files.
SMALL = ["model.layers=[flatten, {linear: 16}, {linear: 10}]", "kernels=numpy", "train.batch_size=16"]
SMALL += ["train.report_every=50", "train.schedule=constant", "train.evaluate_every=10000000"]
DONE = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
PATIENCE = 400  # seconds: all nodes share this machine's cores, and may share them with others


def data(script: str) -> str:
    shape = SHAPES[script.removesuffix(".sbatch")]
    return f"data={{name: synthetic, rows: 6400, test_rows: 32, shape: {shape}, classes: 10}}"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder that looks like the repository to the scripts; what they write stays in it."""
    for name in ("jobs", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def with_srun() -> dict[str, str]:
    library = ROOT / ".venv-mpich" / "lib" / "libmpi.so.12"
    if not library.exists():
        pytest.skip(f"{library} is missing: make test installs it")
    return {"LAUNCH": "srun", "SRUN_MPI": "pmi2", "MPI4PY_LIBMPI": str(library)}


def variables(launcher: str) -> dict[str, str]:
    return with_srun() if launcher == "srun" else {}


class Job:
    """A job of one of the scripts, submitted with these options of sbatch and arguments of the script."""

    def __init__(
        self, repository: Path, script: str | Path, options: Sequence[str], words: Sequence[str], **settings: str
    ):
        self.done = False
        name = Path(script).stem
        script = script if isinstance(script, Path) else f"jobs/{script}"
        done = subprocess.run(
            ["sbatch", "--parsable", "--time=20", *options, str(script), *words],
            cwd=repository, env=os.environ | settings, capture_output=True, text=True, check=True,
        )  # fmt: skip
        self.number = done.stdout.strip()
        self.run, self.out = repository / "runs" / f"{name}-{self.number}", repository / f"{name}-{self.number}.out"

    def state(self) -> dict[str, str]:
        """What Slurm tells of it: JobState, ExitCode, Restarts, NodeList, ..."""
        told = subprocess.run(["scontrol", "show", "job", self.number], capture_output=True, text=True).stdout
        return dict(re.findall(r"(\w+)=(\S*)", told))

    def do(self, *command: str) -> None:
        subprocess.run([*command, self.number], capture_output=True, check=False)

    def wait_for(self, what: Callable[[], Any], seconds: float = PATIENCE) -> None:
        until = time.monotonic() + seconds
        while not what():
            if time.monotonic() > until:
                told = self.out.read_text() if self.out.exists() else "the job has not begun"
                self.do("scancel")
                pytest.fail(f"{self.state()}\n{told}")
            time.sleep(0.2)

    def end(self, seconds: float = PATIENCE) -> str:
        """Wait for the job's end and return its exit code, a colon and the signal that ended it."""
        self.wait_for(lambda: self.state().get("JobState") in DONE, seconds)
        return self.state()["ExitCode"]

    def told(self) -> str:
        return self.out.read_text()

    def steps(self) -> int:
        """The last step of which its run tells."""
        metrics = self.run / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run / "summary.json").read_text())
        return found

    def starts_again(self) -> None:
        """Let it begin: Slurm lets a requeued job wait for two minutes, and refuses one that begins too soon after its
        end."""
        self.wait_for(lambda: self.state().get("JobState") in ("PENDING", "RUNNING"))
        time.sleep(5)
        while self.state().get("JobState") == "PENDING":
            subprocess.run(
                ["scontrol", "update", f"JobId={self.number}", "StartTime=now"], capture_output=True, check=False
            )
            time.sleep(2)

    def ranks(self) -> dict[int, str]:
        """Its ranks: process -> node."""
        return self.processes("nettorrent_mpi.train", ranks=True)

    def processes(self, word: str, *, ranks: bool = False) -> dict[int, str]:
        """The processes with this word in their command line: process -> node."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = process.joinpath("cmdline").read_text().split("\0")
                told = process.joinpath("environ").read_text().split("\0")
            except OSError:  # it has just ended
                continue
            environment = dict(word.partition("=")[::2] for word in told)
            is_rank = {"OMPI_COMM_WORLD_RANK", "PMI_RANK"} & environment.keys()
            there = any(each.endswith(word) for each in words) and bool(is_rank) == ranks
            if environment.get("SLURM_JOB_ID") == self.number and there and "SLURMD_NODENAME" in environment:
                found[int(process.name)] = environment["SLURMD_NODENAME"]
        return found


def start(repository: Path, script: str, launcher: str, *sets: str, options: Sequence[str] = ()) -> Job:
    """Submit a job of three ranks on two nodes that trains without end, and wait for its first record."""
    set_steps(repository, script, 10**8)
    changes = [data(script), *SMALL, *sets]
    words = [word for change in changes for word in ("--set", change)]
    job = Job(repository, script, ["--ntasks=3", "--nodes=2", *options], words, **variables(launcher))
    job.wait_for(lambda: job.steps() > 0 or job.state()["JobState"] in DONE)
    assert job.steps() > 0, job.told()
    return job


def set_steps(repository: Path, script: str, steps: int) -> None:
    """Set the length of the training from the job's next start on: how far it gets until then is not known before."""
    path = (repository / "configs" / script).with_suffix(".yaml")
    text, count = re.subn(r"\n  (epochs|steps): \d+", f"\n  steps: {steps}", path.read_text())
    assert count == 1
    path.write_text(text)


def has_resumed(job: Job) -> bool:
    return re.search(r"resumes after step [1-9]\d* of ", job.told()) is not None


OFTEN = "checkpoint={every_epochs: null, every_seconds: 2}"
NEVER = "checkpoint={every_epochs: null, every_seconds: null}"
launchers = pytest.mark.parametrize("launcher", ["mpirun", "srun"])


@pytest.mark.parametrize(
    ("script", "ranks", "launcher"),
    [("cifar.sbatch", 4, "mpirun"), ("mnist.sbatch", 4, "mpirun"), ("cifar.sbatch", 5, "srun")],
)
def test_a_job_trains(repository: Path, script: str, ranks: int, launcher: str) -> None:
    words = ["--set", data(script), "--set", "train.steps=3", "--set", "train.schedule=constant"]
    job = Job(repository, script, [f"--ntasks={ranks}"], words, **variables(launcher))
    assert job.end() == "0:0", job.told()
    assert job.summary()["world_size"] == ranks


@launchers
def test_a_job_on_a_node_without_a_gpu(repository: Path, launcher: str) -> None:
    """Where Slurm has no GPUs to give, without asking for them."""
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is an NVIDIA driver here")
    script = repository / "gpu.sbatch"
    lines = (ROOT / "jobs" / "gpu.sbatch").read_text().splitlines(keepends=True)
    script.write_text("".join(line for line in lines if not line.startswith("#SBATCH --gpus-per-task")))
    words = ["--set", data("gpu.sbatch")]
    job = Job(repository, script, ["--ntasks=3", "--cpus-per-task=1"], words, **variables(launcher))
    assert job.end() == "2:0", job.told()
    (told,) = [line for line in job.told().splitlines() if line.startswith("nettorrent: ")]
    assert "error: --set device=gpu: device: a GPU is asked for, but " in told
    assert "no NVIDIA driver on this node" in told or "this node has no NVIDIA driver" in told
    assert not (repository / "runs").exists()


def test_a_comparison(repository: Path) -> None:
    words = ["--modes", "rows", "--peers", "none", "--steps", "3", "--repeats", "1"]
    words += [word for change in (data("speedup.sbatch"), *SMALL[:2]) for word in ("--set", change)]
    job = Job(repository, "speedup.sbatch", ["--ntasks=4"], words, RANKS="1,3")
    assert job.end() == "0:0", job.told()
    results = json.loads((job.run / "results.json").read_text())
    assert results["complete"]
    assert [side["name"] for side in results["sides"]] == ["serial-1", "rows-3"]


@launchers
def test_a_job_is_stopped_and_requeued(repository: Path, launcher: str) -> None:
    job = start(repository, "cifar.sbatch", launcher, NEVER)
    job.do("scancel", "--batch", "--signal=USR1")
    assert job.end() == "75:0", job.told()
    stopped = job.steps()
    job.do("scontrol", "requeue")
    job.starts_again()
    job.wait_for(lambda: job.steps() > stopped)
    job.do("scancel", "--batch", "--signal=USR1")
    assert job.end() == "75:0", job.told()
    assert has_resumed(job)
    assert job.told().count("stopped with a checkpoint; to continue: scontrol requeue") == 2


@launchers
def test_a_job_that_is_longer_than_its_time(repository: Path, launcher: str) -> None:
    """Slurm's warning stops it with a checkpoint, it requeues itself, continues and comes to its end."""
    job = start(repository, "mnist.sbatch", launcher, NEVER, options=["--nodes=1", "--time=2", "--signal=B:USR2@60"])
    job.wait_for(lambda: job.state()["JobState"] in (*DONE, "PENDING"))
    assert job.state()["JobState"] == "PENDING", job.told()
    steps = job.steps() + 500
    set_steps(repository, "mnist.sbatch", steps)
    job.starts_again()
    assert job.end() == "0:0", job.told()
    assert job.summary()["steps"] == steps
    turns = int(job.state()["Restarts"])
    assert job.told().count("the job requeues itself") == turns >= 1
    assert len(re.findall(r"resumes after step \d+ of ", job.told())) == turns


@launchers
def test_a_node_is_drained(repository: Path, launcher: str) -> None:
    """What runs there goes on; requeued, the job runs elsewhere."""
    job = start(repository, "cifar.sbatch", launcher, OFTEN)
    before = set(job.ranks().values())
    assert len(before) == 2
    node = max(before)
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test"], check=True)
    try:
        drained = job.steps()
        job.wait_for(lambda: job.steps() > drained and list(job.run.glob("checkpoints/step-??????????")))
        job.do("scontrol", "requeue")
        goes_on(job, repository, "cifar.sbatch", node)
    finally:
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False)


@launchers
def test_a_node_is_lost(repository: Path, launcher: str) -> None:
    """Slurm ends the job and requeues it by itself."""
    job = start(repository, "cifar.sbatch", launcher, OFTEN)
    job.wait_for(lambda: list(job.run.glob("checkpoints/step-??????????")))
    node = max(job.ranks().values())
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test"], check=True)
    try:
        goes_on(job, repository, "cifar.sbatch", node)
    finally:
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False)


def goes_on(job: Job, repository: Path, script: str, without: str = "") -> None:
    """Let a job that is requeued come to its end; it does not run on the node `without`."""
    job.wait_for(lambda: not job.ranks())
    steps = job.steps() + 500
    set_steps(repository, script, steps)
    job.starts_again()
    job.wait_for(job.ranks)
    assert without not in job.ranks().values()
    assert job.end() == "0:0", job.told()
    assert has_resumed(job)
    assert job.summary()["steps"] == steps
    assert job.summary()["world_size"] == 3


def kill_ranks_of_a_node(job: Job) -> int:
    """Kill the ranks of the node that does not have the first one; return their number."""
    node = max(job.ranks().values())
    ranks = [process for process, where in job.ranks().items() if where == node]
    for process in ranks:
        os.kill(process, signal.SIGKILL)
    return len(ranks)


def test_the_ranks_of_a_node_are_killed_under_srun(repository: Path) -> None:
    """srun ends the others, which would wait for them, and the requeued job continues."""
    job = start(repository, "cifar.sbatch", "srun", OFTEN)
    job.wait_for(lambda: list(job.run.glob("checkpoints/step-??????????")))
    kill_ranks_of_a_node(job)
    assert job.end() == "137:0", job.told()
    assert "ranks were killed; to continue: scontrol requeue" in job.told()
    job.do("scontrol", "requeue")
    goes_on(job, repository, "cifar.sbatch")


def above(process: int, name: str) -> int:
    """The nearest ancestor of a process that runs this program."""
    while process > 1:
        words = Path(f"/proc/{process}/stat").read_text()
        if words.partition("(")[2].rpartition(")")[0] == name:
            return process
        process = int(words.rpartition(")")[2].split()[1])
    pytest.fail(f"nothing above runs {name}")


@launchers
@pytest.mark.parametrize("node", [min, max])
def test_slurms_daemon_of_a_step_is_killed(
    repository: Path, launcher: str, node: Callable[[Iterable[str]], str]
) -> None:
    """No rank is left, neither on its node nor on the other one, and the requeued job continues."""
    job = start(repository, "cifar.sbatch", launcher, OFTEN)
    job.wait_for(lambda: list(job.run.glob("checkpoints/step-??????????")))
    ranks = job.ranks()
    rank = next(each for each, where in ranks.items() if where == node(ranks.values()))
    os.kill(above(rank, "slurmstepd"), signal.SIGKILL)
    job.wait_for(lambda: not job.ranks(), 40)
    assert "is gone" in job.told()
    job.wait_for(lambda: job.state()["JobState"] in DONE)
    job.do("scontrol", "requeue")
    goes_on(job, repository, "cifar.sbatch")


def test_the_daemon_of_a_node_is_killed(repository: Path) -> None:
    """mpirun ends all ranks, without an error; the job requeues itself and continues."""
    job = start(repository, "cifar.sbatch", "mpirun", OFTEN)
    job.wait_for(lambda: list(job.run.glob("checkpoints/step-??????????")))
    node = max(job.ranks().values())
    for process, where in job.processes("prted").items():
        if where == node:
            os.kill(process, signal.SIGKILL)
    job.wait_for(lambda: job.state()["JobState"] in (*DONE, "PENDING"))
    assert job.state()["JobState"] == "PENDING", job.told()
    assert "the run ended without results, as when a node is lost; the job requeues itself" in job.told()
    goes_on(job, repository, "cifar.sbatch")


def test_the_ranks_of_a_node_are_killed_under_mpirun(repository: Path) -> None:
    """The others go on."""
    job = start(repository, "cifar.sbatch", "mpirun", NEVER, "train.steps=3000")
    killed = kill_ranks_of_a_node(job)
    assert job.end() == "0:0", job.told()
    assert job.summary()["world_size"] == 3 - killed
    assert job.summary()["steps"] == 3000
