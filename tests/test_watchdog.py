"""A rank that is stopped is named at once, one that does not advance is found, and no run hangs for ever."""

from __future__ import annotations

import json
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
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.comm.activity import Activity
from nettorrent_mpi.comm.spying import LEAST, Spy, moved_bytes
from nettorrent_mpi.engine.checkpoint import read_manifest, read_network
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

    def __init__(self, process: subprocess.Popen[bytes], log: Path, folder: Path):
        self.process, self.log, self.folder = process, log, folder

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

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
        n: int,
        words: list[str],
        report: int,
        end: int,
        mpi: str = "openmpi",
        changes: tuple[str, ...] = (),
        more: tuple[str, ...] = (),
        folder: str = "run",
    ) -> Started:
        launcher, settings = installed_mpi(mpi)
        config, log = tmp_path / "config.yaml", tmp_path / f"log{len(started)}"
        config.write_text(CONFIG)
        command = [*launcher, "-n", str(n), sys.executable, str(FAILING), *words, str(config)]
        command += ["--output", str(tmp_path / folder), "--set", f"watchdog={{report: {report}, end: {end}}}", *more]
        command += [word for change in changes for word in ("--set", change)]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "SECOND": str(SECOND)} | settings
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=HERE.parent, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        started.append(Started(process, log, tmp_path / folder))
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


ROWS, REPLICAS = "layout={swarms: [{layers: 3, rows: 3}]}", "layout={replicas: 2}"
ADAM, MOMENTUM = "train.optimizer=adam", "train.optimizer={sgd: {lr: 0.1, momentum: 0.9}}"
NORM = "model.layers=[flatten, {linear: 8}, batch_norm, relu, {linear: 6}, relu, {linear: 10}]"
MADE = r"; a checkpoint of step (\d+), the last whole one, is made; the latest checkpoint is (\S+): continue with --res"


@pytest.mark.parametrize(
    ("mpi", "n", "how", "changes"),
    [
        pytest.param("openmpi", 3, "rows:spin", (ROWS, ADAM, NORM), marks=slow, id="a data set that hangs"),
        pytest.param("mpich", 3, "rows:spin", (ROWS, ADAM, NORM), marks=long, id="a data set that hangs, MPICH"),
        pytest.param("openmpi", 2, "step:stop", (REPLICAS,), marks=long, id="a stopped replica"),
        pytest.param("mpich", 2, "step:stop", (REPLICAS,), marks=slow, id="a stopped replica, MPICH"),
        pytest.param("openmpi", 3, "forward:sleep", (), marks=long, id="a stage that hangs"),
    ],
)
def test_a_run_that_ends_leaves_a_checkpoint_of_the_last_step(
    start: Callable[..., Started], mpi: str, n: int, how: str, changes: tuple[str, ...]
) -> None:
    """The run that goes on from there has the weights, and the losses, of one that nothing happens to; but a line of
    metrics.jsonl may be missing, and without the silent rank's sums another one is the mean of fewer steps."""
    changes = (*changes, "checkpoint={every_steps: 5}")
    run = start(n, [how, "1"], report=6, end=10, mpi=mpi, changes=changes)
    assert run.ended() == 1, run.text
    made = re.search(MADE, run.text)
    assert made, run.text
    step, path = int(made[1]), Path(made[2])
    assert 0 < step < 5
    manifest = read_manifest(path)
    manifest.verify(path, list(manifest.files))
    assert manifest.attributes["step"] == step
    on = start(n, ["none", "1"], report=60, end=600, mpi=mpi, changes=changes, more=("--resume",))
    assert on.ended() == 0, on.text
    assert f"resumes after step {step} of 12" in on.text, on.text
    whole = start(n, ["none", "1"], report=60, end=600, mpi=mpi, changes=changes, folder="whole")
    assert whole.ended() == 0, whole.text
    found, wanted = (read_network(each.folder / "model.h5") for each in (on, whole))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.array_equal(found[name], array), name
    losses = [{line["step"]: line["train_loss"] for line in each.lines} for each in (on, whole)]
    differ = [at for at, loss in losses[0].items() if loss != losses[1][at]]
    assert losses[0][12] == losses[1][12]
    assert set(differ) <= ({step + 1, step + 2} if how.endswith("stop") else set())


ALONE = r"rank 1, which holds linear2/weight\[0:8, 0:6\], linear2/bias\[0:6\] alone, does not answer"
STATE = r"rank 1, which alone has its part of the optimizer's state \(\w+\) of linear1/weight.*, does not answer"
AHEAD = r"rank \d is after step \d+, and rank \d after step \d+ already"


@pytest.mark.parametrize(
    ("mpi", "how", "changes", "why"),
    [
        pytest.param("openmpi", "step:stop", (), ALONE, marks=slow, id="a stage"),
        pytest.param("mpich", "step:stop", (), ALONE, marks=long, id="a stage, MPICH"),
        pytest.param("openmpi", "step:stop", (ROWS, MOMENTUM), STATE, marks=long, id="an optimizer"),
        pytest.param("mpich", "rows:spin", (), AHEAD, marks=long, id="stages ahead"),
        pytest.param("openmpi", "update:spin", (), AHEAD, marks=long, id="update"),
    ],
)
def test_a_run_that_ends_says_why_there_is_no_checkpoint(
    start: Callable[..., Started], mpi: str, how: str, changes: tuple[str, ...], why: str
) -> None:
    changes = (*changes, "checkpoint={every_steps: 2}")
    run = start(3, [how, "0" if "rows" in how else "1"], report=6, end=10, mpi=mpi, changes=changes)
    assert run.ended() == 1, run.text
    last = "the latest checkpoint is .*step-0+2: continue|there is no checkpoint"
    assert re.search(rf"; no checkpoint can be made now: {why}; ({last})", run.text), run.text


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
