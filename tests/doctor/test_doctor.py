"""`nettorrent doctor` on faults that are made here: it names each, with a remedy, never hangs, and goes on after it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import site
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from nettorrent_mpi import env

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = ROOT / "tests" / "programs"
slow = pytest.mark.slow
Findings = dict[str, list[dict[str, Any]]]


def doctor(
    *options: str | Path,
    before: Sequence[str] = (),
    python: str | Path = sys.executable,
    code: int = 0,
    files: int | None = None,
    **variables: Any,
) -> Findings:  # fmt: skip
    """What it finds in a process without a launcher, by check; it has to end with `code`."""
    bare = {k: v for k, v in os.environ.items() if not env.launched({k: v}) and "NUM_THREADS" not in k}
    bare.pop("OPENBLAS_CORETYPE", None)
    command = [*before, str(python), "-m", "nettorrent_mpi", "doctor", "--json", *map(str, options)]
    done = subprocess.run(
        command, env={**bare, "PYTHONPATH": str(ROOT), **variables}, capture_output=True, text=True, timeout=90,
        preexec_fn=None if files is None else lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, ""), f"{done.stdout}\n{done.stderr}"
    return by_check(done.stdout)


def by_check(text: str) -> Findings:
    report, _ = json.JSONDecoder().raw_decode(text[text.index("{") :])  # MPICH's mpirun writes after it
    found: Findings = {}
    for each in report["findings"]:
        found.setdefault(each["check"], []).append(each)
        assert bool(each["remedy"]) == (each["state"] != "ok"), each
    assert report["faults"] == sum(each["state"] == "fault" for each in report["findings"])
    return found


def only(found: Findings, check: str, state: str) -> str:
    """The text of a check's only finding, which has this state."""
    (each,) = found[check]
    assert each["state"] == state, each
    return f"{each['text']} -> {each['remedy']}"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """broken(how): the environment of a process whose files cannot be locked."""
    library = compiled("broken_files.c", tmp_path_factory.mktemp("broken") / "broken.so")
    return lambda how: {"LD_PRELOAD": str(library), "BROKEN": how}


def compiled(source: str, library: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, PROGRAMS / source], check=True)
    return library


def mounted(where: Path | str, options: str) -> list[str]:
    """The words before a command by which it finds a small file system in memory there."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a mount of one's own needs root")
    return ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {options} tmpfs "{where}" && exec "$@"', "sh"]


# -- a process without a launcher --------------------------------------------------------------------------------------


def test_a_sound_machine_trains_the_digits(tmp_path: Path) -> None:
    found = doctor("--output", tmp_path / "runs", "--checks", "libraries,launcher,output,HDF5,training")
    assert all(each["state"] == "ok" for group in found.values() for each in group), found
    assert "2 ranks, threads: multiple" in only(found, "launcher", "ok")
    assert "the digits' loss went from" in only(found, "training", "ok")
    assert "to be made in" in only(found, "output", "ok")
    assert list(tmp_path.iterdir()) == []  # nothing is left


def test_a_variable_that_names_a_missing_library_is_told() -> None:
    found = doctor("--checks", "libraries,launcher", code=2, MPI4PY_LIBMPI="/missing/libmpi.so")
    assert "MPI4PY_LIBMPI names /missing/libmpi.so, which is not there" in only(found, "libraries", "fault")
    assert "MPI cannot be loaded" in only(found, "launcher", "fault")


def test_without_any_mpi_a_training_has_one_rank(tmp_path: Path) -> None:
    """In an environment of its own, that has no mpirun."""
    if shutil.which("mpirun", path="/usr/bin:/bin"):
        pytest.skip("the system has an mpirun")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    shutil.copy(Path(sys.prefix, "pyvenv.cfg"), tmp_path / "pyvenv.cfg")
    path = os.pathsep.join([str(ROOT), *site.getsitepackages()])
    found = doctor("--checks", "launcher", python=tmp_path / "bin" / "python", PATH="/usr/bin:/bin", PYTHONPATH=path)
    told = only(found, "launcher", "warning")
    assert "there is no mpirun" in told
    assert "pip install" in told


def test_too_many_threads_and_too_few_files_are_told() -> None:
    found = doctor("--checks", "cores,limits", files=32, code=2, OMP_NUM_THREADS="64")
    assert "OMP_NUM_THREADS=64: 64 threads of BLAS on" in only(found, "cores", "warning")
    told = only(found, "limits", "fault")
    assert "may open 32 files, and MPI needs" in told
    assert "ulimit -n 1024" in told


def test_an_output_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    before = mounted(tmp_path / "results", "ro,size=1m")
    found = doctor("--checks", "output,HDF5", "--output", tmp_path / "results", before=before, code=2)
    assert "cannot be written to (Read-only file system) -> choose another folder" in only(found, "output", "fault")
    assert "see `output`" in only(found, "HDF5", "fault")


def test_an_output_folder_that_is_full_is_told(tmp_path: Path) -> None:
    before = mounted(tmp_path, "size=8k")
    found = doctor("--checks", "output", "--output", tmp_path, before=before, code=2)
    assert "only 0.0 MB are free for results" in only(found, "output", "fault")
    (tmp_path / "file").touch()
    found = doctor("--checks", "output", "--output", tmp_path / "file", code=2)
    assert "is a file, not a folder" in only(found, "output", "fault")


def test_shared_memory_that_is_small_is_told() -> None:
    found = doctor("--checks", "/dev/shm", before=mounted("/dev/shm", "size=4m,noexec"))
    told = only(found, "/dev/shm", "warning")
    assert "4 of 4 MB are free, mounted noexec, which does no harm" in told
    assert "--shm-size" in told


def test_files_that_cannot_be_locked_are_told(broken: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    asked = doctor("--checks", "HDF5", "--output", tmp_path, code=2, HDF5_USE_FILE_LOCKING="TRUE", **broken("37"))
    assert "HDF5_USE_FILE_LOCKING=TRUE asks for locks" in only(asked, "HDF5", "fault")
    assert "export HDF5_USE_FILE_LOCKING=FALSE" in only(asked, "HDF5", "fault")
    found = doctor("--checks", "output,HDF5", "--output", tmp_path, **broken("37"))
    assert only(found, "HDF5", "ok").startswith("h5py")
    assert "cannot be locked (No locks available), and are read without" in found["output"][1]["text"]


def test_checks_go_on_after_one_that_hangs_or_crashes(broken: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    names = ("--checks", "output,limits,/tmp", "--output", tmp_path)
    found = doctor(*names, "--limit", "2", code=2, **broken("hangs"))
    assert "no answer within 2 s" in only(found, "output", "fault")
    assert only(found, "limits", "ok")
    found = doctor(*names, code=2, **broken("crashes"))
    assert "the process ended by SIGABRT" in only(found, "output", "fault")
    assert only(found, "/tmp", "ok")


def test_a_gpu_without_its_libraries_is_told(tmp_path: Path) -> None:
    compiled("fake_cuda.c", tmp_path / "libcuda.so.1")
    if find_spec("cupy"):
        pytest.skip("CuPy is installed")
    found = doctor("--checks", "GPU", LD_LIBRARY_PATH=str(tmp_path))
    told = only(found, "GPU", "warning")
    assert "CuPy is not installed; training runs on CPU cores" in told
    assert "pip install 'nettorrent_mpi[cuda1" in told


def test_a_check_that_is_not_there_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nettorrent_mpi", "doctor", "--checks", "gpu"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no check 'gpu'; there are libraries, launcher, MPI" in done.stderr


# -- ranks -------------------------------------------------------------------------------------------------------------

START = ["-m", "nettorrent_mpi", "doctor"]


@pytest.mark.parametrize("mpi", ["openmpi", pytest.param("mpich", marks=slow), pytest.param("ulfm", marks=slow)])
def test_ranks_check_together(mpirun: Any, mpi: str, tmp_path: Path) -> None:
    some = ["--checks", "cores,messages,pinning,training"] if mpi == "openmpi" else []
    done = mpirun(3, [*START, "--json", "--output", tmp_path, "--limit", "15", *some], mpi=mpi, timeout=100)
    assert done.returncode == 0, done.stderr
    found = by_check(done.stdout)
    assert "3 ranks, threads: multiple" in only(found, "MPI", "ok")
    assert "inside a node" in found["messages"][0]["text"]
    assert only(found, "training", "ok")
    assert "on all ranks" in only(found, "installation", "ok")
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_of_another_mpi_is_told_once(mpirun: Any, installed_mpi: Any) -> None:
    installed_mpi("openmpi")
    done = mpirun(2, [*START, "--checks", "MPI"], mpi="mpich", env={"MPI4PY_LIBMPI": None})
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("started 2 ranks (PMI_SIZE), but MPI sees 1") == 1, done.stdout
    assert "this mpirun belongs to another MPI" in done.stdout
    assert done.stdout.count("1 fault, no warnings") == 1


@slow
@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_does_not_answer_is_named(mpirun: Any, mpi: str, rank: int) -> None:
    program = (
        "import os, signal, sys\n"
        f"if {{os.environ.get('OMPI_COMM_WORLD_RANK'), os.environ.get('PMI_RANK')}} & {{'{rank}'}}:\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "from nettorrent_mpi.__main__ import main\n"
        "sys.exit(main(['doctor', '--json', '--checks', 'limits', '--limit', '3']))"
    )
    done = mpirun(3, ["-c", program], mpi=mpi, timeout=60)
    assert done.returncode != 0
    found = by_check(done.stdout)
    assert f"rank {rank} has not answered at all" in only(found, "ranks", "fault")
    assert any("no answer within 3 s" in each["text"] for each in found["MPI"])


@slow
def test_a_rank_that_finds_no_library_is_named(mpirun: Any) -> None:
    program = (
        "import os, sys\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    os.environ['MPI4PY_LIBMPI'] = '/missing/libmpi.so'\n"
        "from nettorrent_mpi.__main__ import main\n"
        "sys.exit(main(['doctor', '--json', '--checks', 'libraries', '--limit', '3']))"
    )
    done = mpirun(2, ["-c", program])
    assert done.returncode != 0
    found = by_check(done.stdout)
    assert ["MPI4PY_LIBMPI names" in each["text"] for each in found["libraries"] if each["ranks"] == [1]] == [True]
    assert any("MPI cannot be loaded" in each["text"] and each["ranks"] == [1] for each in found["MPI"])
    assert any("no answer within 3 s" in each["text"] and each["ranks"] == [0] for each in found["MPI"])


@slow
def test_ranks_that_share_a_core_are_told(mpirun: Any, installed_mpi: Any) -> None:
    launcher, settings = installed_mpi("openmpi")
    command = ["taskset", "-c", "0", *launcher, "-n", "3", sys.executable, *START, "--json", "--checks", "cores"]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    told = only(by_check(done.stdout), "cores", "warning")
    assert "3 ranks on 1 core of this node: they may not run on others" in told
    found = only(by_check(done.stdout), "pinning", "warning")
    assert "ranks 0, 1, 2 on" in found
    assert "are bound to 1 core" in found


@slow
def test_a_control_group_that_allows_less_than_the_ranks_need_is_told(mpirun: Any, installed_mpi: Any) -> None:
    group = Path("/sys/fs/cgroup/cpu/nettorrent-doctor-test")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no control group of version 1 can be made here")
    try:
        (group / "cpu.cfs_quota_us").write_text("100000")
        launcher, settings = installed_mpi("openmpi")
        shell = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh"]
        command = [*shell, *launcher, "-n", "2", sys.executable, *START, "--json", "--checks", "cores"]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        told = only(by_check(done.stdout), "cores", "warning")
        assert "2 ranks on 1 core of this node: a control group (of a container or a batch job) allows" in told
    finally:
        group.rmdir()


@slow
def test_nodes_are_compared(installed_mpi: Any, tmp_path: Path) -> None:
    """On two hosts that are namespaces of networks."""
    installed_mpi("openmpi")
    if os.geteuid() or shutil.which("ip") is None or subprocess.run(["unshare", "-mn", "true"]).returncode:
        pytest.skip("namespaces need root and iproute2")
    path = f"{Path(sys.prefix, 'bin')}:{os.environ['PATH']}"
    command: list[str | Path] = [PROGRAMS / "hosts.sh", "2,1", sys.executable, *START, "--json", "--output", tmp_path]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found = by_check(done.stdout)
    assert any(each["text"].startswith("host0 to host1 ") for each in found["messages"]), found["messages"]
    assert "host1 and host0 differ by 0.0" in only(found, "clocks", "ok")
    assert any("all 2 nodes share" in each["text"] for each in found["output"])
