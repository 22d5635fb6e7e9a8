"""The time line of one traced step, a row for each rank."""

from __future__ import annotations

from collections import defaultdict

from nettorrent_mpi.cli.runs.charts import Bar, rows
from nettorrent_mpi.engine.traced_run import TracedRun, TracedSpan

MOST_ROWS = 32  # ranks that are drawn
COLOURS = {
    "L": "load", "F": "forward", "B": "backward", "I": "backward", "W": "weights", "M": "update", "U": "update",
    "RA": "waits", "RG": "waits", "R": "reduce", "N": "reduce", "G": "reduce", "X": "exchange", "Y": "exchange",
}  # fmt: skip
LEGEND = {
    "load": "load", "forward": "forward", "backward": "backward", "weights": "gradients of weights",
    "update": "update", "reduce": "reduce, gather",
    "exchange": "exchange", "waits": "receive", "sends": "send",
}  # fmt: skip
WORDS = {
    "L": "loads micro-batch", "F": "forward of micro-batch", "B": "backward of micro-batch",
    "I": "gradients of inputs, micro-batch", "W": "gradients of weights, micro-batch",
    "M": "multiplies gradients", "U": "updates",
    "PA": "posts the receive of activations", "PG": "posts the receive of gradients",
    "RA": "waits for activations", "RG": "waits for gradients",
    "WA": "waits for the buffer of activations", "WG": "waits for the buffer of gradients",
    "SA": "sends activations", "SG": "sends gradients",
    "R": "reduces gradients", "N": "norm of gradients", "G": "gathers parameters",
    "X": "exchanges with peers", "Y": "exchanges with peers",
}  # fmt: skip


def typical_step(trace: TracedRun) -> int | None:
    """Return the step whose length is the median of those that all ranks have as a whole; None if there is none."""
    ends: dict[int, dict[int, float]] = defaultdict(dict)
    begins: dict[int, float] = {}
    for span in trace.spans:
        begins[span.step] = min(begins.get(span.step, span.begin), span.begin)
        if span.action.kind == "G":
            ends[span.step][span.rank] = span.end
    whole = [step for step, of in ends.items() if len(of) == len(trace.places)]
    whole.sort(key=lambda step: max(ends[step].values()) - begins[step])
    return whole[len(whole) // 2] if whole else None


def time_line(trace: TracedRun, slowest: int | None) -> str:
    """Draw a typical step; empty if no step is there as a whole. The row of the slowest rank stands out."""
    step = typical_step(trace)
    if step is None:
        return ""
    chosen = _ranks(trace, slowest)
    own = [span for span in trace.spans if span.step == step]
    begin, end = min(span.begin for span in own), max(span.end for span in own if span.action.kind == "G")
    lanes: dict[int, list[Bar]] = {rank: [] for rank in chosen}
    for span in trace.spans:
        if span.rank in lanes and span.end > begin and span.begin < end:
            lanes[span.rank].append(_bar(span, begin, end, step))
    names = [f"rank {rank}, stage {trace.places[rank].stage}" for rank in chosen]
    marked = chosen.index(slowest) if slowest in chosen else None
    keys = "".join(f'<span class="key {colour}">{name}</span>' for colour, name in LEGEND.items())
    told = f"Step {step + 1}, of median length: {(end - begin) / 1000:.3g} ms."
    if len(chosen) < len(trace.places):
        told += f" {len(chosen)} of {len(trace.places):,} ranks are drawn."
    told += " Spans of the steps before and after are pale."
    return f'<p class="keys">{keys}</p>{rows(names, list(lanes.values()), unit="ms", marked=marked)}<p>{told}</p>'


def _ranks(trace: TracedRun, slowest: int | None) -> list[int]:
    """Return the ranks that are drawn: all, or as many of each stage as there is room for, and the slowest."""
    count = len(trace.places)
    if count <= MOST_ROWS:
        return list(range(count))
    stages: dict[int, list[int]] = defaultdict(list)
    for rank, place in enumerate(trace.places):
        stages[place.stage].append(rank)
    each = max(1, MOST_ROWS // len(stages))
    chosen = {rank for ranks in stages.values() for rank in ranks[:each]}
    chosen |= {slowest} if slowest is not None and slowest < count else set()
    return sorted(chosen)[: MOST_ROWS + 1]


def _bar(span: TracedSpan, begin: float, end: float, step: int) -> Bar:
    kind, number = span.action.kind, span.action.micro_batch
    colour = COLOURS.get(kind, "sends") + ("" if span.step == step else " pale")
    label = f"{kind}{'' if number is None else number}"
    words = f"{WORDS[kind]}{f' {number}' if number is not None else ''}: {(span.end - span.begin) / 1000:.3g} ms"
    first, last = (max(span.begin, begin) - begin) / 1000, (min(span.end, end) - begin) / 1000
    return Bar(first, last, colour, words, label)
