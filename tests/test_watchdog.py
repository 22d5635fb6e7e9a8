"""A rank that is stopped is named at once, one that does not advance is found, and no run hangs for ever."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nettorrent_mpi.comm.activity import Activity
from nettorrent_mpi.comm.spying import LEAST, Spy, moved_bytes
from tests.conftest import kill_session

HERE = Path(__file__).resolve().parent
FAILING = HERE / "programs" / "failing.py"
PATIENT = 90.0  # seconds: the machine may be busy
SECOND = 0.5  # that the watchdog's take
slow, long = pytest.mark.slow, pytest.mark.long
Installed = Callable[[str], tuple[list[str], dict[str, str]]]
CONFIG = """\
data: {name: digits}
model:
  layers: [flatten, {linear: 8}, relu, {linear: 6}, relu, {linear: 10}]
train: {steps: 12, batch_size: 16, micro_batches: 2, report_every: 2, optimizer: {sgd: {lr: 0.1}}}
checkpoint: {every_steps: 2}
"""


class Started:
    """A training of failing.py that runs."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path):
        self.process, self.log = process, log

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def told(self, pattern: str) -> re.Match[str]:
        """Wait until its output has this."""
        until = time.monotonic() + PATIENT
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < until, self.text
            assert self.process.poll() is None or re.search(pattern, self.text), self.text
            time.sleep(0.05)
        return found

    def ended(self) -> int:
        """Wait for its end; return the exit code."""
        try:
            return self.process.wait(PATIENT)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end\n{self.text}")


@pytest.fixture
def start(installed_mpi: Installed, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """start(n, words, report, end, mpi): failing.py on n ranks."""
    started: list[Started] = []

    def begin(
        n: int, words: list[str], report: int, end: int, mpi: str = "openmpi", changes: tuple[str, ...] = ()
    ) -> Started:
        launcher, settings = installed_mpi(mpi)
        config, log = tmp_path / "config.yaml", tmp_path / "log"
        config.write_text(CONFIG)
        command = [*launcher, "-n", str(n), sys.executable, str(FAILING), *words, str(config)]
        command += ["--output", str(tmp_path / "run"), "--set", f"watchdog={{report: {report}, end: {end}}}"]
        command += [word for change in changes for word in ("--set", change)]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "SECOND": str(SECOND)} | settings
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=HERE.parent, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        started.append(Started(process, log))
        return started[-1]

    yield begin
    for each in started:
        kill_session(each.process.pid)
        each.process.wait()


@contextmanager
def listening() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        with other:
            yield one, other


def test_bytes_that_move_are_an_advance() -> None:
    with listening() as (one, other):
        before, spy = moved_bytes(), Spy()
        assert not spy.moves()
        assert not spy.moves()
        left = 4 * LEAST
        while left:
            one.sendall(bytes(LEAST))
            taken = 0
            while taken < LEAST:
                taken += len(other.recv(LEAST))
            left -= LEAST
        assert spy.moves()
        assert moved_bytes() - before >= 4 * LEAST


def test_activity() -> None:
    now = Activity()
    counts = [now.count]
    with now.during("evaluation"):
        counts.append(now.count)
        assert now.phase == "evaluation"
    assert now.phase == "start-up"
    assert [*counts, now.count] == sorted({*counts, now.count})


CASES = [("openmpi", "forward:sleep"), ("mpich", "step:stop")]


@pytest.mark.parametrize(
    ("mpi", "how"),
    [
        pytest.param(mpi, how, marks=() if (mpi, how) == CASES[0] else slow if (mpi, how) in CASES else long)
        for mpi in ("openmpi", "mpich")
        for how in ("forward:sleep", "backward:spin", "update:spin", "step:stop", "reduce:sleep")
    ],
)
def test_a_rank_that_hangs_is_found_and_ends_the_run(start: Callable[..., Started], mpi: str, how: str) -> None:
    phase, _, way = how.partition(":")
    run = start(3, [how, "1"], report=6, end=10, mpi=mpi)
    assert run.ended() == 1, run.text
    text = run.text
    words = text[text.rindex("has not advanced for 6 s. All ranks:") :] if "for 6 s" in text else text
    assert len(re.findall(r"^\d  .*(?<!\S)likely culprit$", words, re.M)) == 1, text
    (line,) = re.findall(r"^(\d)  .*<- likely culprit$", words, re.M)
    assert line == "1", text
    assert re.search(r"^0  .* from rank 1|^0  .*waiting for rank", words, re.M), text
    told = re.findall(
        r"^nettorrent: error: the run ends, because a rank has not advanced for \d+ s: rank (\d)", text, re.M
    )
    assert told == ["1"], text
    assert re.search(r"the latest checkpoint is .*step-0+\d+|there is no checkpoint", text), text
    if way == "stop":
        assert len(re.findall(r"rank 1 \(process \d+ on .*\) is stopped", text)) >= 1, text
    elif phase == "forward":
        assert re.search(r"^1  .*1F\d of step \d+, failing.py:\d+ fail", words, re.M), text


PHASES = ("setup", "wiring", "data", "evaluate", "save", "reports", "close")


@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
@pytest.mark.parametrize("phase", [pytest.param(phase, marks=long) for phase in PHASES])
def test_no_phase_hangs(start: Callable[..., Started], mpi: str, phase: str) -> None:
    run = start(3, [f"{phase}:sleep", "1"], report=8, end=14, mpi=mpi)
    assert run.ended() == 1, run.text
    assert re.search(r"^1  .*failing.py:\d+ fail .*<- likely culprit$", run.text, re.M), run.text
    assert run.text.count("error: the run ends") == 1, run.text


@slow
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=long)])
def test_a_rank_that_stops_for_a_while_is_named_at_once(start: Callable[..., Started], rank: int) -> None:
    """Also rank 0, of which the next one tells."""
    run = start(3, ["step:stop", str(rank)], report=60, end=600)
    found = run.told(rf"rank {rank} \(process (\d+) on \S+\) is stopped \(SIGSTOP\)")
    began = float(run.told(r"FAILED AT ([\d.]+)")[1])
    assert time.time() - began < 30 * SECOND, run.text
    os.kill(int(found[1]), signal.SIGCONT)
    assert run.ended() == 0, run.text
    assert "has not advanced" not in run.text
    assert len(re.findall(r"is stopped", run.text)) == 1, run.text


@long
@pytest.mark.parametrize("mpi", ["openmpi", "mpich"])
def test_time_in_which_all_are_suspended_does_not_count(start: Callable[..., Started], mpi: str) -> None:
    run = start(3, ["none", "0"], report=6, end=10, mpi=mpi, changes=("train.steps=150", "train.report_every=10"))
    run.told(r"step +10/")
    pids = [int(pid) for pid in re.findall(r"^PID (\d+)$", run.text, re.M)]
    assert len(pids) == 3, run.text
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(20 * SECOND)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)
    assert run.ended() == 0, run.text
    assert "has not advanced" not in run.text
    assert "is stopped" not in run.text


@long
def test_what_is_slow_but_advances_does_not_count(start: Callable[..., Started]) -> None:
    """Each action takes nearly as long as the report, so the others wait for several."""
    run = start(3, ["forward:slow", "1"], report=12, end=14, changes=("train.steps=3",))
    assert run.ended() == 0, run.text
    assert "error" not in run.text, run.text
