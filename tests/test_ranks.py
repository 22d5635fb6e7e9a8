"""Starts the tests of tests/ranks under both MPIs and several rank counts, and checks the machinery from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# A rank that is still in the same test after this many seconds prints where it stands and ends the run.
TEST_LIMIT = 120
RUN_LIMIT = 600

Run = subprocess.CompletedProcess[str]


# How the tests of tests/ranks are started. Each is marked slow or long, or not at all; CI runs those that
# are not on 1, 3 and 4 ranks, `make test-all` all on every number of ranks under both MPIs.
QUICKLY, REST = "not slow and not long", "slow or long"
QUICK, SLOW = [("openmpi", 1), ("openmpi", 3), ("mpich", 4)], [("mpich", 2)]
OTHERS = [("openmpi", 2), ("openmpi", 4), ("openmpi", 5), ("openmpi", 8)]
OTHERS += [("mpich", 1), ("mpich", 3), ("mpich", 5), ("mpich", 8)]
slow, long = pytest.mark.slow, pytest.mark.long
CASES = [
    *(pytest.param(*case, QUICKLY) for case in QUICK),
    *(pytest.param(*case, QUICKLY, marks=slow) for case in SLOW),
    *(pytest.param(*case, REST, marks=long) for case in [*QUICK, *SLOW]),
    *(pytest.param(*case, "", marks=long) for case in OTHERS),
]


def run_tests(
    mpirun: Callable[..., Run],
    n: int,
    mpi: str,
    folder: Path,
    temporary: Path,
    limit: int = TEST_LIMIT,
    marked: str = "",
) -> Run:
    # cores are scarce while tests run: waiting ranks always yield
    environment = {
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",
        "RANK_TESTS_PATIENCE": "3" if folder != HERE / "ranks" else "10",
    }
    options = ["--color=no", "-p", "no:cacheprovider", f"--basetemp={temporary}", f"--rootdir={HERE.parent}"]
    options += ["-o", f"faulthandler_timeout={limit}", "-o", "faulthandler_exit_on_timeout=true"]
    if marked:
        options += ["-m", marked]
    return mpirun(n, ["-m", "pytest", *options, folder], mpi=mpi, env=environment, timeout=RUN_LIMIT)


@pytest.mark.parametrize(("mpi", "n", "marked"), CASES)
def test_ranks(mpirun: Callable[..., Run], tmp_path: Path, n: int, mpi: str, marked: str) -> None:
    done = run_tests(mpirun, n, mpi, HERE / "ranks", tmp_path / "ranks", marked=marked)
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
    assert re.search(rf"^{n} ranks, {'Open MPI' if mpi == 'openmpi' else 'MPICH'}", done.stdout, re.MULTILINE)
    assert re.search(r"\b\d+ passed", done.stdout)


FAILING = {
    "one rank's assert, all ranks come back": (
        """
def test_it(world):
    assert world.rank != 1, 'told by rank 1'
def test_next(world):
    world.Barrier()
""",
        r"(?s)--- rank 1 ---.*told by rank 1.*1 failed, 1 passed",
    ),
    "one rank's assert, the others wait for it": (
        """
def test_it(world):
    assert world.rank != 1, 'told by rank 1'
    world.Barrier()
""",
        r"(?s)test_it failed on rank 1.*told by rank 1",
    ),
    "a fixture fails on one rank": (
        """
import pytest
@pytest.fixture
def broken(world):
    assert world.rank != 1, 'told by rank 1'
def test_it(broken, world):
    world.Barrier()
""",
        r"(?s)--- rank 1 ---.*told by rank 1.*1 error",
    ),
    "the ranks collect different tests": (
        """
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1:
    def test_it(): pass
""",
        r"the ranks collected different tests",
    ),
    "all ranks wait for ever": (
        """
def test_it(world):
    if world.rank != 1:
        world.Barrier()
    else:
        world.recv()
""",
        r"(?s)Timeout.*in test_it",
    ),
}


QUICKLY_TOLD = [
    ("one rank's assert, all ranks come back", "mpich"),
    ("one rank's assert, the others wait for it", "openmpi"),
]


@pytest.mark.parametrize(
    ("case", "mpi"),
    [
        pytest.param(case, mpi, marks=() if (case, mpi) in QUICKLY_TOLD else slow)
        for case in FAILING
        for mpi in ("openmpi", "mpich")
    ],
)
def test_failure_is_told_quickly(mpirun: Callable[..., Run], tmp_path: Path, mpi: str, case: str) -> None:
    source, expected = FAILING[case]
    folder = tmp_path / "ranks"
    folder.mkdir()
    shutil.copy(HERE / "ranks" / "conftest.py", folder)
    Path(folder, "test_case.py").write_text(source)
    started = time.monotonic()
    done = run_tests(mpirun, 3, mpi, folder, tmp_path / "temporary", limit=8)
    assert done.returncode != 0
    assert re.search(expected, done.stdout + done.stderr), f"\n{done.stdout}\n{done.stderr}"
    assert time.monotonic() - started < 40


@slow
def test_skip_on_one_rank_skips_on_all(mpirun: Callable[..., Run], tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    shutil.copy(HERE / "ranks" / "conftest.py", folder)
    body = "import pytest\n@pytest.fixture\ndef some(world):\n    if world.rank == 1: pytest.skip('not here')\n"
    Path(folder, "test_case.py").write_text(body + "def test_it(some, world):\n    world.Barrier()\n")
    done = run_tests(mpirun, 2, "openmpi", folder, tmp_path / "temporary")
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
    assert "1 skipped" in done.stdout


def test_a_run_that_hangs_is_killed_with_all_its_ranks(mpirun: Callable[..., Run], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = (
        f"import os, time; open({str(marker)!r} + str(os.getpid()), 'w'); print('began', flush=True); time.sleep(300)"
    )
    with pytest.raises(pytest.fail.Exception, match=r"(?s)not done after 4 s.*began"):
        mpirun(2, ["-c", code], timeout=4)
    pids = [int(path.name.removeprefix("marker")) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
