"""No rank outlives its launcher, however that ends, and nothing stays in shared memory."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nettorrent_mpi.comm.launcher import belonging
from nettorrent_mpi.comm.processes import GONE, Process, ancestors, process
from tests.conftest import kill_session

HERE = Path(__file__).resolve().parent
PATIENT = 60  # seconds: the machine may be busy
SOON = 20  # seconds in which ranks notice and end; idle cores need 3
slow, long = pytest.mark.slow, pytest.mark.long
Installed = Callable[[str], tuple[list[str], dict[str, str]]]


def line(*names: str) -> list[Process]:
    return [Process(100 - i, "1", name) for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["prterun", "bash", "sshd"], 1),
        (["bash", "mpirun", "bash"], 2),
        (["hydra_pmi_proxy", "mpiexec.hydra", "bash"], 2),
        (["prted", "sshd", "sshd"], 2),
        (["hydra_pmi_proxy", "bash", "ssh"], 2),
        (["slurmstepd", "slurmd"], 1),
        (["prted", "slurmstepd"], 2),
        (["something", "bash"], 1),
        ([], 0),
    ],
)
def test_who_belongs_to_a_launcher(names: list[str], count: int) -> None:
    assert belonging(line(*names)) == line(*names)[:count]


def test_processes_are_known() -> None:
    sleeper = subprocess.Popen(["sleep", "100"])
    found = process(sleeper.pid)
    assert found is not None
    sleeper.send_signal(signal.SIGSTOP)
    until = time.monotonic() + PATIENT
    while found.state != "T":
        assert time.monotonic() < until
        time.sleep(0.01)
    assert Process(sleeper.pid, "0").state == GONE
    found.end(signal.SIGKILL)
    sleeper.wait()
    assert found.state == GONE
    assert process(sleeper.pid) is None
    assert ancestors()[0].pid == os.getppid()


@contextmanager
def launched(
    command: list[str], environment: dict[str, str], folder: Path, ranks: int, terminal: int | None = None
) -> Iterator[list[Process]]:
    """Ranks of orphaned.py, once all of them are there; with `terminal`, in a session that this one controls. They and
    their launcher end soon after the context, and are killed if they do not."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), **environment}
    log = folder / "log"
    with log.open("w") as out:
        if terminal is not None:
            command = ["setsid", "--ctty", *command]  # stays the same process
        started = subprocess.Popen(
            command, env=environment, stdin=terminal, stdout=out if terminal is None else terminal, stderr=out,
            start_new_session=terminal is None,
        )  # fmt: skip
    found: list[Process] = []
    try:
        until = time.monotonic() + PATIENT
        while not all((folder / f"pid.{rank}").exists() for rank in range(ranks)):
            assert time.monotonic() < until, log.read_text()
            assert started.poll() is None, log.read_text()
            time.sleep(0.05)
        pids = [int((folder / f"pid.{rank}").read_text()) for rank in range(ranks)]
        found = [each for pid in pids if (each := process(pid)) is not None]
        assert len(found) == ranks
        time.sleep(1.5)  # a tick
        yield found
        ended(found, log)
        started.wait(SOON)
    finally:
        for each in found:
            each.end(signal.SIGKILL)
        kill_session(started.pid)
        started.wait()


def ended(ranks: list[Process], log: Path) -> None:
    until = time.monotonic() + SOON
    while any(each.state != GONE for each in ranks):
        assert time.monotonic() < until, f"{[each.state for each in ranks]}\n{log.read_text()}"
        time.sleep(0.05)


def mapped(each: Process) -> set[str]:
    """Files in /dev/shm that a process has mapped and that still have a name."""
    lines = Path(f"/proc/{each.pid}/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if " /dev/shm/" in line and not line.endswith("(deleted)")}


def parent_of(pid: int) -> int:
    found = re.search(r"PPid:\t(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1])


CASES = [("mpich", "parent", "wait"), ("openmpi", "head", "spin"), ("mpich", "head", "stop")]


@pytest.mark.parametrize(
    ("mpi", "killed", "how"),
    [
        pytest.param(mpi, killed, how, marks=() if (mpi, killed, how) in CASES[:1] else slow
                     if (mpi, killed, how) in CASES else long)
        for mpi in ("openmpi", "mpich")
        for killed in (("head",) if mpi == "openmpi" else ("head", "parent"))
        for how in ("wait", "spin", "stop")
    ],
)  # fmt: skip
def test_ranks_end_with_their_launcher(
    installed_mpi: Installed, tmp_path: Path, mpi: str, killed: str, how: str
) -> None:
    launcher, environment = installed_mpi(mpi)
    command = [*launcher, "-n", "2", sys.executable, str(HERE / "programs" / "orphaned.py"), str(tmp_path), how]
    with launched(command, environment, tmp_path, 2) as ranks:
        assert [mapped(each) for each in ranks] == [set(), set()], "whatever happens, nothing stays"
        parent = parent_of(ranks[0].pid)
        victim = parent_of(parent) if mpi == "mpich" and killed == "head" else parent
        environ = Path(f"/proc/{ranks[0].pid}/environ").read_text().split("\0")
        session = [Path(each.partition("=")[2]) for each in environ if each.startswith("PMIX_SERVER_TMPDIR=")]
        os.kill(victim, signal.SIGKILL)
    assert not any(folder.exists() for folder in session), list(session[0].rglob("*"))


@pytest.mark.parametrize(
    ("mpi", "closed", "how"),
    [
        pytest.param(mpi, closed, how, marks=slow if (closed, how) == ("terminal", "wait") else long)
        for mpi in ("openmpi", "mpich")
        for closed in ("terminal", "shell")
        for how in ("wait", "spin", "stop")
    ],
)
def test_ranks_end_with_their_terminal(
    installed_mpi: Installed, tmp_path: Path, mpi: str, closed: str, how: str
) -> None:
    """The terminal in which the launcher runs is closed, or the shell that started it is killed."""
    launcher, environment = installed_mpi(mpi)
    ranks = [*launcher, "-n", "2", sys.executable, str(HERE / "programs" / "orphaned.py"), str(tmp_path), how]
    shell = ["bash", "-c", 'echo $$ > "$0"; "$@"; true', str(tmp_path / "shell"), *ranks]
    keyboard, terminal = pty.openpty()
    try:
        with launched(shell, environment, tmp_path, 2, terminal) as found:
            assert [mapped(each) for each in found] == [set(), set()]
            os.close(terminal)
            if closed == "shell":
                os.kill(int((tmp_path / "shell").read_text()), signal.SIGKILL)
            else:
                os.close(keyboard)
    finally:
        for file in (keyboard, terminal):
            with suppress(OSError):
                os.close(file)


@long
@pytest.mark.parametrize("how", ["wait", "spin", "stop"])
@pytest.mark.parametrize("killed", ["head", "proxy", "proxy, unnoticed"])
def test_ranks_of_several_proxies_end_with_their_launcher(
    installed_mpi: Installed, tmp_path: Path, killed: str, how: str
) -> None:
    """MPICH's launcher, or the proxy of one of two hosts, which a launcher that is stopped does not notice."""
    launcher, environment = installed_mpi("mpich")
    program = [sys.executable, str(HERE / "programs" / "orphaned.py"), str(tmp_path), how]
    hosts = ["-launcher", "fork", "-hosts", "one,two"]  # both are this one, and have a proxy each
    with launched([*launcher, *hosts, "-n", "2", *program], environment, tmp_path, 2) as ranks:
        first, second = (parent_of(each.pid) for each in ranks)
        assert first != second
        head = parent_of(first)
        if killed == "proxy, unnoticed":
            os.kill(head, signal.SIGSTOP)
        os.kill(head if killed == "head" else second, signal.SIGKILL)
        if killed == "proxy, unnoticed":
            ended(ranks[1:], tmp_path / "log")
            ranks[0].end(signal.SIGCONT)  # a rank that is stopped hears of it when it goes on
            ended(ranks, tmp_path / "log")
            os.kill(head, signal.SIGCONT)


@long
@pytest.mark.parametrize("killed", ["head", "daemon", "agent"])
def test_ranks_of_several_hosts_end_with_their_launcher(tmp_path: Path, killed: str) -> None:
    """The launcher's head, the second host's daemon, or what has started that daemon."""
    if shutil.which("ip") is None or os.geteuid() or subprocess.run(["unshare", "-mn", "true"]).returncode:
        pytest.skip("network namespaces need root and iproute2")
    if not Path(sys.executable).with_name("mpirun").exists():
        pytest.skip("there is no Open MPI beside this Python")
    programs = HERE / "programs"
    command = [str(programs / "hosts.sh"), "1,2", sys.executable, str(programs / "orphaned.py"), str(tmp_path), "wait"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    with launched(command, {"PATH": path}, tmp_path, 3) as ranks:
        assert [mapped(each) for each in ranks] == [set()] * 3
        daemon = parent_of(ranks[1].pid)
        victims = {"head": parent_of(ranks[0].pid), "daemon": daemon, "agent": parent_of(daemon)}
        os.kill(victims[killed], signal.SIGKILL)
