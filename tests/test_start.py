"""What a run loads before its first step. Loading takes most of the time until then, on every rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nettorrent_mpi.comm.library import LATE

CHECKS = {"pydantic", "yaml", "importlib.metadata"}  # what rank 0 reads a configuration with
NEVER = {"rich", "h5py", "matplotlib", "subprocess", "multiprocessing", "asyncio"}  # before there is a use for it

# The training, with each rank telling at the end of its first step which of these it has loaded.
PROGRAM = f"""
import sys
from nettorrent_mpi import env
chosen = env.prepare()
from nettorrent_mpi.cli.commands import find
from nettorrent_mpi.engine.engine import Engine
prepare = Engine.prepare
def told(self, n, *others):
    if n == 1:
        print(f"rank {{self.world.rank}}:", *sorted({CHECKS | NEVER!r} & set(sys.modules)), flush=True)
    return prepare(self, n, *others)
Engine.prepare = told
arguments = ["train", "--output", sys.argv[1], "--set", "train.steps=2"]
sys.exit(find(arguments)(arguments, chosen))
"""


def test_ranks_load_what_they_need(mpirun: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = mpirun(4, ["-c", PROGRAM, str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    told = sorted(line.strip() for line in done.stdout.splitlines() if line.startswith("rank "))
    assert [set(line.partition(":")[2].split()) for line in told] == [CHECKS, set(), set(), set()]


def test_a_command_loads_nothing_before_it_is_known() -> None:
    assert not loaded("import nettorrent_mpi.train, nettorrent_mpi.cli.commands") & (
        CHECKS | NEVER | {"numpy", "mpi4py"}
    )


@pytest.mark.parametrize("module", ["config.sections", "engine.setup", "cli.run", "engine.checkpoint", "data.dataset"])
def test_what_a_training_is_made_of_loads_no_checker(module: str) -> None:
    assert not loaded(f"import nettorrent_mpi.{module}") & (CHECKS | NEVER)


@pytest.mark.parametrize(
    "module", ["planning", "cli.dry_run", "engine.memory_estimate", "speedup.command", "cli.run", "cli.evaluate", "api"]
)
def test_mpi_loads_when_there_are_ranks(module: str) -> None:
    assert not loaded(f"import nettorrent_mpi.{module}") & {"mpi4py.MPI"}


def loaded(code: str) -> set[str]:
    """The modules that are there after `code`."""
    command = [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


SLACK = Path("/proc/self/timerslack_ns")
STARTS_MPI = """
import sys
from pathlib import Path
class Spy:
    def find_spec(self, name, *others):
        if name == "mpi4py.MPI":
            print(Path("/proc/self/timerslack_ns").read_text())
sys.meta_path.insert(0, Spy())
from nettorrent_mpi.comm.library import MPI
MPI.COMM_WORLD
print(Path("/proc/self/timerslack_ns").read_text())
"""


@pytest.mark.skipif(not SLACK.exists(), reason="Linux tells of it")
@pytest.mark.parametrize(("yields", "late"), [("1", True), ("0", False)])
def test_ranks_that_outnumber_cores_sleep_while_mpi_starts(yields: str, late: bool) -> None:
    usual = int(SLACK.read_text())
    environment = {**os.environ, "OMPI_MCA_mpi_yield_when_idle": yields, "OMPI_MCA_btl": "^ofi"}
    command = [sys.executable, "-c", STARTS_MPI]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [int(word) for word in done.stdout.split()] == [int(LATE * 1e9) if late else usual, usual]
