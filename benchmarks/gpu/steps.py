"""The time of a step against PyTorch on the same GPU, eager and compiled (max-autotune, with CUDA graphs).

All sides of all cases start at once, because compiling takes most of the time; nothing is measured before they are
ready. Then they take turns, one at a time, while the others wait for their next line of input; medians are compared. A
side that is not ready when half of the time is over is ended and told of.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import IO, Any

from benchmarks.gpu.collectives import environment
from benchmarks.gpu.record import Record, Skipped
from benchmarks.gpu.step_cases import CASES, COMPILED, EAGER, OURS, ROOT, SIDES, SMALL, StepCase

TURNS, SECONDS = 3, 0.5  # of each side
READY = 0.6  # the part of the time in which sides have to be ready
AIMS = {EAGER: 1.0, COMPILED: 0.95}
LAST_LINES = 15
COMPILERS = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}  # of each side that compiles: all do at the same time


class Process:
    """A side in a process of its own."""

    def __init__(self, case: StepCase, side: str, host: bool, folder: Path):
        self.case, self.side = case, side
        self._errors = (folder / f"{case.name} {side}".replace(" ", "_")).open("w+", encoding="utf-8", errors="replace")
        words = [sys.executable, "-m", "benchmarks.gpu.step_side", case.name, side, *(["--host"] if host else [])]
        self._process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment() | COMPILERS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )
        self.ready: float | None = None

    @property
    def output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def ask(self, line: str, seconds: float) -> dict[str, Any]:
        """Send a line, and return the answer. Raises RuntimeError where none comes in so many seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        return self.answer(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        """Return the next line that it prints; other programs' words are passed over."""
        until = time.monotonic() + seconds
        with selectors.DefaultSelector() as waiting:
            waiting.register(self.output, selectors.EVENT_READ)
            while waiting.select(max(until - time.monotonic(), 0.0)):
                line = self.output.readline()
                if not line:
                    raise RuntimeError(f"{self.side} has ended:\n{self.last_lines()}")
                with suppress(ValueError):
                    told = json.loads(line)
                    if isinstance(told, dict):
                        return told
        raise TimeoutError(f"{self.side} has not answered in {seconds:.0f} s")

    def last_lines(self) -> str:
        """Return the end of its error messages."""
        self._errors.seek(0)
        return "".join(self._errors.readlines()[-LAST_LINES:])

    def end(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        self._errors.close()


def run(record: Record) -> None:
    cases = [case for case in CASES if not record.host or case.name in SMALL]
    sides = [OURS, *((EAGER, COMPILED) if find_spec("torch") else ())]
    if record.host:
        sides = sides[:2]
    total = record.left
    with tempfile.TemporaryDirectory(prefix="nettorrent-") as folder:
        started = [Process(case, side, record.host, Path(folder)) for case in cases for side in sides]
        try:
            missing = await_all(started, READY * total)
            for number, case in enumerate(cases):
                share = record.left / (len(cases) - number)
                own = [process for process in started if process.case is case]
                with record.case(case.name) as figures:
                    compared(figures, case, 16 if record.host else case.batch, own, missing, share)
            with record.case("the GPU is busy (mnist_wide, 1024)") as figures:
                figures["busy"] = busy(started[0], record)
        finally:
            for process in started:
                process.end()


def await_all(started: Sequence[Process], seconds: float) -> dict[Process, str]:
    """Wait until all sides are ready, or so long; return why some are not."""
    until, missing = time.monotonic() + seconds, dict[Process, str]()
    for process in started:
        try:
            process.ready = process.answer(max(until - time.monotonic(), 0.1))["ready"]
        except (RuntimeError, TimeoutError) as error:
            missing[process] = str(error)
            process.end()
    return missing


def compared(
    figures: dict[str, Any],
    case: StepCase,
    batch: int,
    own: Sequence[Process],
    missing: dict[Process, str],
    share: float,
) -> None:
    """Add the seconds of a step of all sides, and the ratios. Raises RuntimeError if our side is not ready."""
    figures |= {"batch": batch, "dtype": case.dtype}
    figures["not_ready"] = {process.side: missing[process] for process in own if process in missing}
    if not figures["not_ready"]:
        del figures["not_ready"]
    ready = [process for process in own if process not in missing]
    times: dict[str, list[float]] = {process.side: [] for process in ready}
    for _ in range(TURNS):
        for process in ready:
            seconds = min(SECONDS, share / (TURNS * len(ready)) / 2)
            times[process.side].append(process.ask(f"go {seconds}", max(10 * seconds, share))["seconds"])
    middle = {side: median(found) for side, found in times.items()}
    figures["seconds_of_a_step"] = middle
    figures["spread"] = {side: (max(found) - min(found)) / middle[side] for side, found in times.items()}
    figures["ready_after"] = {process.side: process.ready for process in ready}
    if OURS not in middle:
        raise RuntimeError(figures["not_ready"][OURS])
    figures["samples_per_second"] = {side: batch / seconds for side, seconds in middle.items()}
    figures["times_as_fast_as"] = {side: middle[side] / middle[OURS] for side in SIDES[1:] if side in middle}
    figures["aims"] = {side: AIMS[side] for side in figures["times_as_fast_as"]}
    if case.work:
        figures["teraflops"] = {side: case.work / seconds / 1e12 for side, seconds in middle.items()}


def busy(process: Process, record: Record) -> float:
    """Return the part of the time in which the GPU works for our side."""
    if record.host or not find_spec("torch"):
        raise Skipped("PyTorch's profiler and a GPU are needed")
    if process.ready is None:
        raise Skipped("this side is not ready")
    return float(process.ask("busy", max(record.left - 2, 1))["busy"])
