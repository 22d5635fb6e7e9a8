"""The bubble of the pipelines: the part of the time in which a rank computes nothing, as measured and as simulated.

A step of a pipeline begins with the first forward or backward pass that the first stage runs in it. The bubble is the
part of ranks x time, between the beginnings of two steps, in which no F or B runs; other work of a rank in it (waiting
for a message, updating) is reported beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from benchmarks.exchange_runs import Here, train
from benchmarks.exchange_text import paragraph, percent, table
from nettorrent_mpi.plan.actions import Action, Actions, parse, step_end
from nettorrent_mpi.plan.schedule import one_f_one_b
from nettorrent_mpi.plan.stream import counted_on, stream
from nettorrent_mpi.plan.timeline import simulate

PIPELINES = ("1f1b", "async")
MICRO_BATCHES = 4
# Of a layer; of a mini-batch; of a stage. The more layers a stage has, the less it matters that the first stage needs
# no gradients of its inputs and the last one has the classes.
UNITS, ROWS, LAYERS = 512, 512, 8
CLASSES = 10
STEPS, SKIPPED = 60, 10  # in the first ones buffers are touched for the first time
DRAWN = 3  # steps in the picture
GROUPS = {
    "compute": ("F", "B"),
    "update": ("R", "M", "N", "X", "U", "Y", "G"),
    "transfers": ("PA", "RA", "WA", "SA", "PG", "RG", "WG", "SG"),
}


class Span(NamedTuple):
    """An action of a rank, from begin to end in milliseconds, within a step."""

    rank: int
    action: Action
    step: int
    begin: float
    end: float


def read_trace(text: str) -> list[Span]:
    """Return the spans of a Chrome trace written by a run with `trace: true`, in the order of their beginnings."""
    spans = [
        Span(e["pid"], parse(e["name"]), e["args"]["step"], e["ts"] / 1000, (e["ts"] + e["dur"]) / 1000)
        for e in json.loads(text)["traceEvents"]
        if e["ph"] == "X"
    ]
    return sorted(spans, key=lambda span: (span.begin, span.rank))


def simulated(
    pipeline: str, stages: int, micro_batches: int, steps: int, costs: Sequence[tuple[float, float, float]]
) -> list[Span]:
    """The same of a simulated run on one rank a stage; `costs` are the milliseconds of a stage's F, B and (once a step)
    of what comes after its last B. Messages take no time. Names are those of a trace, within their step."""
    lists = stream(stages, micro_batches, steps, transfers=False) if pipeline == "async" else _flushed(
        stages, micro_batches, steps
    )  # fmt: skip
    forward, backward, finish = ([cost[i] for cost in costs] for i in range(3))
    spans: list[Span] = []
    for s, events in enumerate(simulate(lists, forward, backward, 0.0, finish).stages):
        step = 0
        for action, begin, end in events:
            counted = action.micro_batch if action.kind in GROUPS["compute"] else None
            named = Action(s, action.kind, None if counted is None else counted - step * micro_batches)
            spans.append(Span(s, named, step, begin, end))
            step += action.kind == "G"
    return spans


def _flushed(stages: int, micro_batches: int, steps: int) -> list[Actions]:
    """Return 1F1B for several steps, one after the other."""
    once = [
        [*compute, *(Action(s, kind) for kind in step_end())]
        for s, compute in enumerate(one_f_one_b(stages, micro_batches))
    ]
    return [[action for n in range(steps) for action in counted_on(actions, micro_batches, n)] for actions in once]


def beginning(spans: Iterable[Span], step: int) -> float:
    """Return when a step begins on the first stage."""
    return min(s.begin for s in spans if s.step == step and s.action.stage == 0 and s.action.kind in GROUPS["compute"])


def shares(spans: Sequence[Span], first: int, stop: int) -> dict[str, float]:
    """Return the part of ranks x time that each of GROUPS takes from the beginning of step `first` to that of step
    `stop`, and `bubble`, the part without compute."""
    begin, end = beginning(spans, first), beginning(spans, stop)
    whole = (end - begin) * len({span.rank for span in spans})
    parts = {
        name: sum(
            max(0.0, min(span.end, end) - max(span.begin, begin)) for span in spans if span.action.kind in kinds
        ) / whole
        for name, kinds in GROUPS.items()
    }  # fmt: skip
    return {**parts, "bubble": 1 - parts["compute"]}


def costs_of(spans: Sequence[Span], first: int, stop: int) -> list[tuple[float, float, float]]:
    """Each stage's median milliseconds of F, of B and of what comes once a step, in the steps from first to stop."""
    chosen = [span for span in spans if first <= span.step < stop]
    costs = []
    for stage in range(1 + max(span.action.stage for span in chosen)):
        here = [span for span in chosen if span.action.stage == stage]
        forward, backward = (
            median(span.end - span.begin for span in here if span.action.kind == kind) for kind in ("F", "B")
        )
        once: dict[tuple[int, int], float] = {}
        for span in here:
            if span.action.kind in GROUPS["update"]:
                key = span.rank, span.step
                once[key] = once.get(key, 0.0) + span.end - span.begin
        costs.append((forward, backward, median(once.values())))
    return costs


def settings_of(pipeline: str, ranks: int, steps: int) -> dict[str, str]:
    """Return an even network: every stage has equally many equal layers, and the last one a small one more."""
    layers = [f"{{linear: {{units: {UNITS}, activation: relu}}}}"] * (LAYERS * ranks) + [f"{{linear: {CLASSES}}}"]
    counts = [LAYERS] * (ranks - 1) + [LAYERS + 1]
    swarms = ", ".join(f"{{layers: {count}, rows: 1, cols: 1}}" for count in counts)
    return {
        # One epoch: where an epoch ends, the pipeline is drained and a checkpoint written.
        "data": f"{{name: synthetic, rows: {steps * ROWS}, test_rows: 0, shape: [{UNITS}], classes: {CLASSES}}}",
        "model": f"{{layers: [{', '.join(layers)}], loss: cross_entropy}}",
        "train.steps": str(steps),
        "train.batch_size": str(ROWS),
        "train.micro_batches": str(MICRO_BATCHES),
        "train.optimizer": "{sgd: {lr: 0.01}}",
        "train.schedule": "constant",
        "train.report_every": "1000",
        "layout": f"{{replicas: 1, swarms: [{swarms}]}}",
        "pipeline": pipeline,
        "trace": "true",
    }


def measure(ranks: int, repeats: int, factor: float, mpirun: str) -> dict[str, Any]:
    """Measure every pipeline in turns. The turn with the median bubble is reported and drawn."""
    steps = max(SKIPPED + DRAWN + 2, round(STEPS * factor))
    stop = steps - 2  # the last ones of a stream only drain it
    turns: dict[str, list[tuple[float, float, list[Span]]]] = {pipeline: [] for pipeline in PIPELINES}
    for turn in range(repeats):
        for pipeline in PIPELINES:
            done = train("configs/mnist_wide.yaml", settings_of(pipeline, ranks, steps), ranks, Here(mpirun))
            assert done.trace is not None
            spans = read_trace(done.trace)
            bubble = shares(spans, SKIPPED, stop)["bubble"]
            turns[pipeline].append((bubble, done.summary["samples_per_second"] / ROWS, spans))
            print(f"turn {turn + 1}  {pipeline}: bubble {percent(bubble)}", flush=True)
    return {
        "ranks": ranks,
        "micro_batches": MICRO_BATCHES,
        "repeats": repeats,
        "steps": steps,
        "pipelines": {pipeline: _tell(pipeline, ranks, stop, seen) for pipeline, seen in turns.items()},
    }


def _tell(pipeline: str, ranks: int, stop: int, turns: list[tuple[float, float, list[Span]]]) -> dict[str, Any]:
    ordered = sorted(turns, key=lambda turn: turn[0])
    _, _, spans = ordered[(len(ordered) - 1) // 2]
    costs = costs_of(spans, SKIPPED, stop)
    many = 4 * ranks + DRAWN
    like = simulated(pipeline, ranks, MICRO_BATCHES, 2 * many, costs)
    even = simulated(pipeline, ranks, MICRO_BATCHES, 2 * many, [(1.0, 2.0, 0.0)] * ranks)
    middle = (SKIPPED + stop) // 2
    return {
        "bubbles": [bubble for bubble, _, _ in turns],
        "steps_per_second": median(rate for _, rate, _ in turns),
        "shares": shares(spans, SKIPPED, stop),
        "costs_ms": costs,
        "simulated_bubble": shares(like, ranks, many)["bubble"],
        "even_bubble": shares(even, ranks, many)["bubble"],
        "measured_spans": drawn(spans, middle),
        "simulated_spans": drawn(like, many // 2),
    }


def drawn(spans: Sequence[Span], first: int) -> list[tuple[int, str, int, float, float]]:
    """(rank, action, step, begin, end) of the F, B and updates within DRAWN steps, in milliseconds from the first of
    these on."""
    begin, end = beginning(spans, first), beginning(spans, first + DRAWN)
    return [
        (s.rank, str(s.action), s.step, round(max(s.begin, begin) - begin, 3), round(min(s.end, end) - begin, 3))
        for s in spans
        if s.action.kind not in GROUPS["transfers"] and s.begin < end and s.end > begin
    ]


def to_markdown(section: dict[str, Any]) -> list[str]:
    text = (
        f"{section['ranks']} stages of {LAYERS} equal layers ({UNITS} units) on a rank each, {ROWS} rows in "
        f"{section['micro_batches']} micro-batches, {section['steps']} steps; the median of {section['repeats']} "
        "alternating runs, without the first and last steps. The bubble is the part of ranks x time in which no "
        "forward or backward runs. It is the sum of the next three columns: updates, transfers (waiting for messages "
        "included), and the rest between the actions. Simulated: `plan/timeline.py` with the measured times of F, B "
        "and update, and messages that take no time. Ideal: equal stages, a backward twice as long as a forward, no "
        "updates."
    )
    head = ["pipeline", "steps/s", "bubble", "updates", "transfers", "rest", "simulated", "ideal"]
    cells = []
    for name, told in section["pipelines"].items():
        part = told["shares"]
        rest = part["bubble"] - part["update"] - part["transfers"]
        figures = [
            part["bubble"],
            part["update"],
            part["transfers"],
            rest,
            told["simulated_bubble"],
            told["even_bubble"],
        ]
        cells.append([name, f"{told['steps_per_second']:,.1f}", *map(percent, figures)])
    return [*paragraph(text), "", *table(head, cells), "", "![Measured and simulated pipelines](exchange-trace.svg)"]
