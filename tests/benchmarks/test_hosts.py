"""benchmarks/hosts: names, links and bytes of its hosts, and that nothing is left of them; who is who under mpirun."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # benchmarks/ is no part of the package
    sys.path.append(str(ROOT))

read_sent = importlib.import_module("benchmarks.exchange_runs").read_sent


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-r", "200", "--", "true"], "-r 200: wants a rate like 200mbit"),
        (["-n", "0", "--", "true"], "-n 0: wants a whole number"),
        ([], "benchmarks/hosts [-n HOSTS]"),
    ],
)
def test_mistakes_of_hosts(arguments: list[str], told: str) -> None:
    done = subprocess.run(["benchmarks/hosts", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert told in done.stderr


@pytest.fixture
def hosts() -> list[str]:
    """Two hosts and this environment's Open MPI, where they can be had."""
    mpirun = Path(sys.prefix, "bin", "mpirun")
    probe = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "type", "veth"]
    try:
        able = subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        able = False
    if not able or not mpirun.exists():
        pytest.skip("network namespaces cannot be made here, or there is no Open MPI")
    return ["benchmarks/hosts", "-n", "2", "-r", "100mbit", "-m", str(mpirun)]


@pytest.mark.parametrize("status", [0, 3])
def test_hosts_have_names_and_links(hosts: list[str], tmp_path: Path, status: int) -> None:
    program = f"hostname; ls /sys/class/net; exit {status}"
    command = [*hosts, "-b", str(tmp_path / "sent"), "--", "sh", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status
    if status == 0:
        assert sorted(done.stdout.split()) == ["eth0", "eth0", "h1", "h2", "lo", "lo"]
    sent = read_sent(tmp_path / "sent")
    assert len(sent) == 2
    assert all(count > 1000 for count in sent)  # mpirun's own words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_hosts(hosts: list[str], number: signal.Signals) -> None:
    nap = f"60.{os.getpid()}{number:d}"  # names the processes of this test

    def napping() -> int:
        count = 0
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                count += process.read_bytes() == f"sleep\0{nap}\0".encode()
            except OSError:  # it has just ended
                continue
        return count

    def wait_for(count: int) -> None:
        until = time.monotonic() + 20
        while napping() != count:
            assert time.monotonic() < until, f"{napping()} processes, not {count}"
            time.sleep(0.05)

    running = subprocess.Popen(
        [*hosts, "--", "sleep", nap], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(2)
        running.send_signal(number)
        assert running.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
        wait_for(0)
    finally:
        running.kill()
        running.wait()


def test_without_hosts_no_bytes_are_counted(tmp_path: Path) -> None:
    assert read_sent(tmp_path / "sent") == []


def test_ranks_are_those_of_the_launcher() -> None:
    placed = importlib.import_module("benchmarks.ddp_slow").placed
    assert placed({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}) == (2, 4)
    assert placed({"PMI_RANK": "1", "PMI_SIZE": "3"}) == (1, 3)
    assert placed({}) == (0, 1)
