"""Runs on three hosts of which one is cut off for a while, is slow, or vanishes with all that runs there.

The hosts are network namespaces of this machine, which need root: see programs/hosts.sh.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
CONFIG = """\
kernels: numpy
data: {name: digits, validation: 0.1}
model:
  layers: [flatten, {linear: {units: 32, activation: relu}}, {linear: {units: 32, activation: relu}}, linear: 10]
train: {steps: 400, batch_size: 60, optimizer: {sgd: {lr: 0.05}}, report_every: 10, evaluate_every: 1000}
checkpoint: {every_epochs: null, every_seconds: 1}
"""
PATIENCE = 120  # seconds: the machine may be busy
pytestmark = pytest.mark.long


class Hosts:
    """A training on three hosts of one rank each, in the folder `output`; `words` are options of mpirun, `sets` changes
    of the configuration."""

    def __init__(self, folder: Path, output: str, words: Sequence[str] = (), sets: Sequence[str] = ()):
        config = folder / "config.yaml"
        config.write_text(CONFIG)
        self.run, self.log = folder / output, folder / f"{output}.log"
        changes = [word for change in sets for word in ("--set", change)]
        program = [
            sys.executable,
            "-m",
            "nettorrent_mpi.train",
            config,
            "--output",
            self.run,
            "--resume",
            "auto",
            *changes,
        ]
        command = [HERE / "programs" / "hosts.sh", "1,1,1", *words, *program, *changes]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PATH": path},
                stdout=log, stderr=log,
            )  # fmt: skip
        self.id = self.process.pid % 100_000
        self.wait_for(lambda: self.step() > 0)

    def step(self) -> int:
        metrics = self.run / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def wait_for(self, what: Callable[[], Any]) -> None:
        until = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < until, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def end(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(self.log.read_text())

    def link(self, host: int, state: str) -> None:
        subprocess.run(["ip", "link", "set", f"nv{self.id}-{host}", state], check=True)

    def processes(self, host: int) -> list[int]:
        told = subprocess.run(["ip", "netns", "pids", f"nt{self.id}-{host}"], capture_output=True, text=True).stdout
        return [int(word) for word in told.split()]

    def signal(self, host: int, number: signal.Signals) -> None:
        for process in self.processes(host):
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        """Kill what is left. The script then removes the hosts."""
        for host in range(3):
            self.signal(host, signal.SIGCONT)
            self.signal(host, signal.SIGKILL)
        self.process.wait(30)

    def summary(self) -> dict[str, Any]:
        assert (self.run / "summary.json").exists(), self.log.read_text()
        found: dict[str, Any] = json.loads((self.run / "summary.json").read_text())
        return found

    def weights(self) -> list[Any]:
        with h5py.File(self.run / "model.h5") as file:
            return [file[f"parameters/{layer}/weight"][...] for layer in sorted(file["parameters"])]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Hosts]]:
    if shutil.which("ip") is None or os.geteuid() or subprocess.run(["unshare", "-mn", "true"]).returncode:
        pytest.skip("network namespaces need root and iproute2")
    if not Path(sys.executable).with_name("mpirun").exists():
        pytest.skip("there is no Open MPI beside this Python")
    started: list[Hosts] = []

    def begin(*args: Any) -> Hosts:
        started.append(Hosts(tmp_path, *args))
        return started[-1]

    yield begin
    for hosts in started:
        hosts.close()


@pytest.mark.parametrize("words", [[], ["--with-ft", "ulfm"]])
def test_a_link_is_cut_for_ten_seconds(start: Callable[..., Hosts], words: list[str]) -> None:
    """TCP sends again what was lost: the training waits, and goes on to the same weights."""
    calm = start("calm")
    assert calm.end() == 0
    cut = start("cut", words)
    cut.link(2, "down")
    time.sleep(1)
    there = cut.step()
    time.sleep(9)
    assert cut.step() == there
    cut.link(2, "up")
    assert cut.end() == 0
    assert cut.summary()["steps"] == calm.summary()["steps"] == 400
    assert "failures" not in cut.summary() or not cut.summary()["failures"]
    assert all(np.array_equal(*pair) for pair in zip(cut.weights(), calm.weights(), strict=True))


@pytest.mark.parametrize("exchange", ["allreduce", "gossip"])
def test_a_host_is_ten_times_slower(start: Callable[..., Hosts], exchange: str) -> None:
    """The training becomes slow, and ends."""
    sets = ["layout.replicas=3", f"exchange={exchange}", "train.steps=200"]
    hosts = start("slow", [], sets)
    done = threading.Event()

    def slow() -> None:
        while not done.is_set():
            hosts.signal(2, signal.SIGSTOP)
            time.sleep(0.18)
            hosts.signal(2, signal.SIGCONT)
            time.sleep(0.02)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        assert hosts.end() == 0
    finally:
        done.set()
        thread.join()
    assert hosts.summary()["steps"] == 200
    assert hosts.summary()["world_size"] == 3


def vanish(hosts: Hosts, host: int) -> None:
    """No word comes from the host any more: the others are not told that its connections have ended."""
    hosts.wait_for(lambda: list(hosts.run.glob("checkpoints/step-??????????")))
    hosts.link(host, "down")
    hosts.signal(host, signal.SIGKILL)


@pytest.mark.parametrize("words", [[], ["--with-ft", "ulfm"]])
def test_a_host_vanishes(start: Callable[..., Hosts], words: list[str]) -> None:
    """Open MPI's launcher notices, by TCP's signs of life, and ends the run without an error; no rank is left. What the
    run has saved is continued."""
    signs = [f"oob_tcp_keepalive_{name} {number}" for name, number in (("time", 3), ("intvl", 1), ("probes", 3))]
    keepalive = [word for sign in signs for word in ("--prtemca", *sign.split())]
    hosts = start("gone", [*words, *keepalive], ["train.steps=100000"])
    vanish(hosts, 2)
    code = hosts.end()
    assert not (hosts.run / "summary.json").exists(), code
    assert "PRTE has lost communication with a remote daemon" in hosts.log.read_text()
    again = start("gone", [], [f"train.steps={hosts.step() + 100}"])
    assert again.end() == 0
    assert re.search(r"resumes after step [1-9]", again.log.read_text())


def test_the_others_go_on_without_a_host_that_vanishes(start: Callable[..., Hosts]) -> None:
    """Where MPI's own signs of life find the loss before the launcher does, which then waits for the lost rank."""
    signs = "detector true, detector_thread true, detector_period 1, detector_timeout 5, propagator_with_rbcast true"
    words = [word for sign in signs.split(", ") for word in ("--mca", *f"mpi_ft_{sign}".split())]
    hosts = start("left", ["--with-ft", "ulfm", *words])
    vanish(hosts, 2)
    hosts.wait_for((hosts.run / "summary.json").exists)
    assert hosts.summary()["world_size"] == 2
    assert hosts.summary()["steps"] == 400
