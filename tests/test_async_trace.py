"""What ranks did when, as their traces tell: without flush there is always work to do; with it, only for one at a time.

Two stages of equal layers on a rank each, mini-batches of one micro-batch. With flush, then, the stages take turns: in
half of ranks x time or more no F or B runs, whatever the machine does. Traces are compared with the schedule and with
each other, never with a clock.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import pytest

from nettorrent_mpi.plan.actions import Action, Actions, parse
from nettorrent_mpi.plan.schedule import build
from nettorrent_mpi.plan.stream import stream_step

STEPS, SKIPPED = 40, 6  # in the first steps buffers are touched for the first time
UNITS, ROWS = 256, 256  # F and B take some milliseconds
TRIES = 3  # somebody else may have had the machine
HIDDEN, LAST = f"{{linear: {{units: {UNITS}, activation: relu}}}}", f"{{linear: {UNITS}}}"
STAGE = "{layers: 4, rows: 1, cols: 1}"
SETTINGS = {
    "data": f"{{name: synthetic, rows: {ROWS * (STEPS + 1)}, test_rows: 0, shape: [{UNITS}], classes: {UNITS}}}",
    "model": f"{{layers: [{', '.join([HIDDEN] * 7 + [LAST])}], loss: cross_entropy}}",
    "train.steps": str(STEPS),
    "train.batch_size": str(ROWS),
    "train.micro_batches": "1",
    "train.optimizer": "{sgd: {lr: 0.01}}",
    "layout": f"{{replicas: 1, swarms: [{STAGE}, {STAGE}]}}",
    "trace": "true",
}
Mpirun = Callable[..., CompletedProcess[str]]


class Span(NamedTuple):
    """What a rank did, from begin to end in microseconds."""

    step: int
    action: Action
    begin: float
    end: float


Trace = list[list[Span]]  # of each rank, in the order in which it was done


def traced(mpirun: Mpirun, folder: Path, pipeline: str) -> Trace:
    changes = {**SETTINGS, "pipeline": pipeline}
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    done = mpirun(2, ["-m", "nettorrent_mpi.train", "--output", folder, "--overwrite", *words], timeout=100)
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
    trace: Trace = [[], []]
    for event in json.loads((folder / "trace.json").read_text())["traceEvents"]:
        if event["ph"] == "X":
            begin, action = event["ts"], parse(event["name"])
            trace[event["pid"]].append(Span(event["args"]["step"], action, begin, begin + event["dur"]))
    return [sorted(spans, key=lambda span: span.begin) for spans in trace]


def order(spans: list[Span], step: int) -> Actions:
    return [span.action for span in spans if span.step == step]


def of(trace: Trace, stage: int, kind: str, mini_batch: int) -> Span:
    """Forward, backward or update of a mini-batch, whichever step it was done in."""
    return next(
        span
        for span in trace[stage]
        if span.action.kind == kind and span.step + (span.action.micro_batch or 0) == mini_batch
    )


def idle(trace: Trace) -> float:
    """The part of ranks x time in which no F or B runs, between the first update that counts and the last but one of
    the first stage (the last step has nothing left to do ahead)."""
    begin, end = (of(trace, 0, "U", n).end for n in (SKIPPED, STEPS - 2))
    compute = [span for spans in trace for span in spans if span.action.kind in ("F", "B")]
    busy = sum(max(0.0, min(span.end, end) - max(span.begin, begin)) for span in compute)
    return 1 - busy / ((end - begin) * len(trace))


def before_the_update(trace: Trace) -> int:
    """In how many steps the second stage begins a mini-batch before the first has updated with the one before it."""
    return sum(of(trace, 1, "F", n + 1).begin < of(trace, 0, "U", n).begin for n in range(SKIPPED, STEPS - 1))


@pytest.mark.slow
def test_no_flush_in_the_trace(mpirun: Mpirun, tmp_path: Path) -> None:
    figures = []
    for _ in range(TRIES):
        flushed, stream = (traced(mpirun, tmp_path / pipeline, pipeline) for pipeline in ("1f1b", "async"))
        for n in range(STEPS):
            for stage in range(2):
                step = stream_step(2, 1, stage, first=n == 0, left=STEPS - n)
                assert order(flushed[stage], n) == build("1f1b", 2, 1)[stage]
                assert order(stream[stage], n) == step
            if n + 1 < STEPS:
                assert of(flushed, 0, "F", n + 1).begin >= of(flushed, 0, "U", n).end
                assert of(stream, 0, "F", n + 1).end <= of(stream, 0, "U", n).begin
        assert idle(flushed) >= 0.4999
        assert before_the_update(flushed) == 0
        figures.append((idle(flushed), idle(stream), before_the_update(stream)))
        if idle(stream) < 0.8 * idle(flushed) and before_the_update(stream) > (STEPS - SKIPPED) / 2:
            return
    pytest.fail(f"(idle with flush, without; next forward before the update): {figures}")
