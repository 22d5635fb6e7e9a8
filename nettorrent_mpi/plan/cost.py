"""The cost model: predicted seconds of a layout, and the layout that is predicted to be fastest.

Costs are those of the rank with the most work: spans round up, so its numbers of rows, units and micro-batches do too.
The figures rank layouts; they promise no absolute speed. With an exact exchange replicas and rows differ only in how
ranks are grouped: all of them reduce their gradients and divide the optimizer's work. Without (`exact=False`) the rows
of each team do so on their own; messages between replicas then travel during compute and are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nettorrent_mpi.plan.actions import Action
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.layouts import layers_layout, partition
from nettorrent_mpi.plan.schedule import PIPELINES, STREAMS
from nettorrent_mpi.plan.timeline import simulate, steady_seconds
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology

# For stages of some layers and numbers of micro-batches, by the number of ranks: (seconds, rows, cols) of the fastest.
Tables: TypeAlias = dict[tuple[Span, int], list[tuple[float, int, int]]]
PAYS = 2.5  # the factor of memory traffic that `in_parts` has to save: measured with 2, 4 and 8 ranks


@dataclass(frozen=True)
class Machine:
    """The performance of one rank. The defaults are those of one CPU core per rank, float32, messages in shared
    memory."""

    flops: float = 1e11  # floating-point operations per second of a large matrix product
    bandwidth: float = 4e9  # bytes per second that one rank moves; its own core copies them, so compute waits
    reduction: float = 1.2e10  # the same for gradients, which ranks of a node read in place
    latency: float = 5e-6  # seconds per message
    overhead: float = 2e-5  # overhead in seconds of one layer's forward or backward call
    update: float = 1.5e-9  # seconds for the optimizer to update one parameter
    itemsize: int = 4  # bytes of an element


@dataclass(frozen=True)
class Prediction:
    """The prediction of one training step. `compute` and `communication` are a rank's seconds in the step, for each
    stage."""

    seconds: float
    compute: tuple[float, ...]
    communication: tuple[float, ...]
    bubble: float  # the part of stages x seconds in which a stage waits, without the reduction of gradients


def predict(
    topology: Topology,
    facts: Sequence[LayerFacts],
    batch_size: int,
    micro_batches: int,
    pipeline: str,
    machine: Machine | None = None,
    *,
    exact: bool = True,
) -> Prediction:
    """Predict one training step; where the pipeline does not flush, one more among many.

    A stage's work on a micro-batch is its compute, the copying of what it receives and sends (both ranks pay: messages
    progress only inside MPI calls), and the all-gathers over cols between its own layers. These times go through the
    schedule's simulation; then comes the reduction of gradients as reduce-scatter and all-gather over replicas x rows
    (with `exact=False` over rows only; 2 (n-1)/n of the bytes; 2 log2 n messages), between whose halves the optimizer
    updates each rank's part.
    """
    machine = machine or Machine()
    alike = topology.replicas if exact else 1
    rows = most_rows(batch_size, micro_batches, topology.replicas)
    last = len(topology.stages) - 1
    steps = []
    for s, stage in enumerate(topology.stages):
        held = facts[stage.first : stage.stop]
        before = topology.stages[s - 1] if s > 0 else None
        after = topology.stages[s + 1] if s < last else None
        steps.append(_step(stage, held, rows, before, after, alike, machine))
    count = micro_batches
    forward = [t.compute / 3 + t.calls + t.moves for t in steps]
    backward = [t.compute * 2 / 3 + t.calls + t.moves for t in steps]
    finish = [t.sum + t.update for t in steps]
    if pipeline in STREAMS:
        seconds = steady_seconds(len(steps), count, forward, backward, machine.latency, finish)
    else:
        lists = [[*a, Action(s, "R")] for s, a in enumerate(PIPELINES[pipeline](len(steps), count))]
        seconds = simulate(lists, forward, backward, machine.latency, finish).makespan
    compute = tuple(count * (t.compute + 2 * t.calls) + t.update for t in steps)
    communication = tuple(count * 2 * t.moves + t.sum for t in steps)
    busy = [count * (f + b) + e for f, b, e in zip(forward, backward, finish, strict=True)]
    bubble = 1 - sum(busy) / (seconds * len(busy)) if seconds else 0.0
    return Prediction(seconds, compute, communication, bubble)


@dataclass(frozen=True)
class _Step:
    """Seconds of one rank: compute of a micro-batch (both directions); calls and moves in each direction; once per
    step."""

    compute: float
    calls: float
    moves: float
    sum: float
    update: float


def _step(
    stage: Stage,
    held: Sequence[LayerFacts],
    rows: int,
    before: Stage | None,
    after: Stage | None,
    alike: int,
    machine: Machine,
) -> _Step:
    """Return the seconds of one stage. `rows` are those of a micro-batch in one replica; `before` and `after` the
    neighbouring teams; `alike` is the number of replicas that reduce their gradients."""
    here, cols = -(-rows // stage.rows), stage.cols
    work = sum(layer.operations * part_of(layer.units, cols) for layer in held)
    messages = elements = 0.0
    if before:
        elements += here * held[0].inputs
        messages += min(here, _overlapping(stage.rows, before.rows)) * before.cols
    if after:
        elements += here * held[-1].outputs * part_of(held[-1].units, cols) * after.cols
        messages += min(here, _overlapping(stage.rows, after.rows)) * after.cols
    if cols > 1:
        for layer in held[:-1]:  # the next layer of this stage needs all features
            elements += here * layer.outputs * (cols - 1) / cols
            messages += (cols - 1).bit_length()
    moves = elements * machine.itemsize / machine.bandwidth + messages * machine.latency
    sum_, update = _finish(parameters_of(held, cols), stage.rows * alike, machine)
    return _Step(here * work / machine.flops, machine.overhead * len(held), moves, sum_, update)


def _finish(parameters: float, sharers: int, machine: Machine) -> tuple[float, float]:
    """Return the seconds per step (to reduce gradients of `parameters` over `sharers` ranks, to update them)."""
    moved = 2 * (sharers - 1) / sharers * parameters * machine.itemsize / machine.reduction
    return moved + 2 * (sharers - 1).bit_length() * machine.latency, parameters / sharers * machine.update


def sharers_of(topology: Topology, stage: Stage, exact: bool) -> int:
    """Return the number of ranks that hold the same weights of a stage."""
    return stage.rows * (topology.replicas if exact else 1)


def rows_shared(topology: Topology, batch_size: int, exact: bool) -> int:
    """Return the rows of the mini-batch if these ranks have all of them between them; else 0."""
    return batch_size if exact or topology.replicas == 1 else 0


def in_parts(rows: int, sharers: int, inputs: float, units: float) -> bool:
    """Whether computing weight gradients in parts moves less memory: each of `sharers` ranks of a node, which divide
    the `rows` of a mini-batch, computes a part of the gradient of inputs x units weights from all rows, instead of all
    of it from its own rows with a reduction of the results.

    Counted are the numbers that a rank writes and reads. In parts: it copies its rows' x and dy to shared memory, and
    multiplies its part of everybody's x with everybody's dy. Otherwise: it writes a matrix, reads its part of
    everybody's and writes their sum.
    """
    if sharers == 1 or rows == 0:
        return False
    parts = 2 * rows / sharers * (inputs + units) + rows * (inputs / sharers + units)
    return PAYS * parts < inputs * units * (2 + 1 / sharers)


def parameters_of(held: Sequence[LayerFacts], cols: int) -> float:
    """Return the largest number of parameters of one col of a stage."""
    return sum(layer.parameters * part_of(layer.units, cols) for layer in held)


def most_rows(batch_size: int, micro_batches: int, replicas: int) -> int:
    """Return the largest number of rows of a micro-batch in one replica."""
    micro_batch = -(-batch_size // micro_batches)
    return -(-micro_batch // replicas)


def part_of(units: int, cols: int) -> float:
    """Return the largest part of a layer on one of its cols."""
    return -(-units // cols) / units


def _overlapping(mine: int, theirs: int) -> int:
    """Return the largest number of `theirs` spans that overlap one of `mine` spans of the same rows (an upper
    estimate)."""
    return max(1, -(-theirs // mine)) + (theirs % mine != 0 and mine % theirs != 0)


def auto_layout(
    facts: Sequence[LayerFacts],
    ranks: int,
    batch_size: int,
    pieces: Callable[[int], int],
    pipeline: str,
    machine: Machine | None = None,
    *,
    exact: bool = True,
) -> Topology:
    """Choose `layout: auto`: the least predicted step time among layouts that use all ranks. `pieces` gives the number
    of micro-batches for a number of stages.

    Tries every number of replicas that divides the ranks with every number of stages (cut where the heaviest stage is
    lightest). The ranks of a replica are divided so that the slowest stage is as fast as possible: rows x cols of each
    size are its fastest, and the sizes that add up exactly are found by halving the allowed time. The best of these by
    a closed formula, and `layers_layout`, are then simulated. In ties fewer replicas and fewer stages win.
    """
    machine = machine or Machine()
    found: list[tuple[float, Topology]] = []
    for replicas in (r for r in range(1, ranks + 1) if ranks % r == 0):
        team_ranks = ranks // replicas
        known: Tables = {}
        alike = replicas if exact else 1
        # With 1 stage, replicas that are alike are the same as rows.
        for count in range(1 if alike == 1 else 2, min(len(facts), team_ranks) + 1):
            micro_batches = pieces(count)
            rows = most_rows(batch_size, micro_batches, replicas)
            groups = partition([layer.operations for layer in facts], count)
            chosen = divided(facts, groups, team_ranks, rows, micro_batches, alike, machine, known)
            times, stages = [seconds for seconds, _ in chosen], tuple(stage for _, stage in chosen)
            # all micro-batches through the slowest stage; one through each of the others where the pipeline flushes
            others = 0.0 if pipeline in STREAMS else sum(times) - max(times)
            found.append((max(times) + others / micro_batches, Topology(replicas, stages)))
    found.sort(key=lambda entry: entry[0])
    topologies = [topology for _, topology in found[:16]]
    topologies.append(layers_layout(facts, ranks, -(-batch_size // pieces(min(ranks, len(facts))))))
    return min(
        topologies,
        key=lambda t: (
            predict(t, facts, batch_size, pieces(len(t.stages)), pipeline, machine, exact=exact).seconds,
            t.replicas,
            len(t.stages),
        ),
    )  # fmt: skip


def divided(
    facts: Sequence[LayerFacts],
    groups: Sequence[Span],
    ranks: int,
    rows: int,
    micro_batches: int,
    alike: int,
    machine: Machine | None = None,
    known: Tables | None = None,
) -> list[tuple[float, Stage]]:
    """Divide the ranks of a replica over stages of these layers so that the slowest is as fast as possible; return each
    stage with its predicted seconds. `rows` are those of a micro-batch in one replica, `alike` the replicas that reduce
    their gradients; `known` keeps the tables of stages for further calls with the same of these."""
    known = {} if known is None else known
    for group in groups:
        if (group, micro_batches) not in known:
            first, last, held = group.start == 0, group.stop == len(facts), facts[group.start : group.stop]
            table = _fastest(held, ranks, rows, alike, micro_batches, first, last, machine or Machine())
            known[group, micro_batches] = table
    tables = [known[group, micro_batches] for group in groups]
    sizes = _divide([[seconds for seconds, _, _ in table] for table in tables], ranks - len(groups) + 1, ranks)
    chosen = [table[size] for table, size in zip(tables, sizes, strict=True)]
    return [(seconds, Stage(*group, rows, cols)) for group, (seconds, rows, cols) in zip(groups, chosen, strict=True)]


def _fastest(
    held: Sequence[LayerFacts],
    ranks: int,
    rows: int,
    alike: int,
    micro_batches: int,
    first: bool,
    last: bool,
    machine: Machine,
) -> list[tuple[float, int, int]]:
    """Return for each size 0..ranks the best (seconds of all micro-batches, rows, cols), with links to teams of one
    col."""
    infinite = float("inf")
    best = [(infinite, 0, 0)] * (ranks + 1)
    one = Stage(0, 1, 1, 1)
    for cols in range(1, min(ranks, *(layer.units for layer in held)) + 1):
        grid, parameters = Stage(0, len(held), 1, cols), parameters_of(held, cols)
        before, after = (None if first else one), (None if last else one)
        # everything but calls and messages grows with a rank's rows
        some = _step(grid, held, 1, before, after, alike, machine)
        more = _step(grid, held, 2, before, after, alike, machine)
        slope = more.compute - some.compute + 2 * (more.moves - some.moves)
        base = some.compute + 2 * some.moves - slope + 2 * some.calls
        for team_rows in range(1, ranks // cols + 1):
            seconds = micro_batches * (-(-rows // team_rows) * slope + base)
            if seconds < best[team_rows * cols][0]:
                seconds += sum(_finish(parameters, team_rows * alike, machine))
                if seconds < best[team_rows * cols][0]:
                    best[team_rows * cols] = (seconds, team_rows, cols)
    return best


def _divide(times: Sequence[Sequence[float]], most: int, ranks: int) -> list[int]:
    """Return sizes, one for each stage, that add up to `ranks` with the least largest time, times[stage][size]."""

    def reachable(limit: float) -> list[int]:
        """Return bit sets: bit n of entry s says that the first s stages can have n ranks in all within the limit."""
        reach = [1]
        for stage in times:
            mask = 0
            for size in range(1, most + 1):
                if stage[size] <= limit:
                    mask |= reach[-1] << size
            reach.append(mask & ((2 << ranks) - 1))
        return reach

    limits = sorted({t for stage in times for t in stage[1 : most + 1]})
    low, high = 0, len(limits) - 1  # the largest limit allows every size
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reachable(limits[middle])[-1] >> ranks & 1 else (middle + 1, high)
    reach, limit = reachable(limits[high]), limits[high]
    sizes: list[int] = []
    alone = [stage[1] for stage in times]
    for s in reversed(range(len(times))):
        ideal = ranks * alone[s] / sum(alone[: s + 1])
        fits = [n for n in range(1, min(most, ranks) + 1) if times[s][n] <= limit and reach[s] >> (ranks - n) & 1]
        sizes.append(min(fits, key=lambda n, ideal=ideal: abs(n - ideal)))  # type: ignore[misc]
        ranks -= sizes[-1]
    return sizes[::-1]
