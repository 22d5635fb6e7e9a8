"""The search for the layout that is predicted to be the fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.cost import predict
from nettorrent_mpi.plan.layouts import layers_layout, partition
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.schedule import STREAMS
from nettorrent_mpi.plan.sizes import most_rows, parameters_of
from nettorrent_mpi.plan.stage_cost import Peering, around_nodes, reduced, stage_step
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology

# For stages of some layers and numbers of micro-batches, by the number of ranks: (seconds, rows, cols) of the fastest.
Tables: TypeAlias = dict[tuple[Span, int], list[tuple[float, int, int]]]


LARGEST = 1024  # ranks of a replica whose division into stages is searched
SIMULATED = 16  # layouts that are simulated: the best by a closed formula


def weighed(facts: Sequence[LayerFacts], machine: Machine, rows: int) -> list[LayerFacts]:
    """Return the layers with operations in proportion to their measured times for so many rows, where these are
    known."""
    if not machine.layers:
        return list(facts)
    found = []
    for layer in facts:
        times = machine.times(layer)
        seconds = times.forward.seconds(rows, 1.0) + times.backward.seconds(rows, 1.0)
        found.append(replace(layer, operations=seconds / rows * machine.flops))
    return found


def fast_layouts(
    facts: Sequence[LayerFacts],
    ranks: int,
    batch_size: int,
    pieces: Callable[[int], int],
    pipeline: str,
    machine: Machine | None = None,
    *,
    exact: bool = True,
    peering: Peering | None = None,
) -> list[Topology]:
    """Return layouts that use all ranks, those with the least predicted step time first. `pieces` gives the number of
    micro-batches for a number of stages.

    Tries every number of replicas that divides the ranks with every number of stages (cut where the heaviest stage is
    lightest). The ranks of a replica are divided so that the slowest stage is as fast as possible: rows x cols of each
    size are its fastest, and the sizes that add up exactly are found by halving the allowed time. The best of these by
    a closed formula, and `layers_layout`, are then simulated. In ties fewer replicas and fewer stages win.
    """
    machine = (machine or Machine()).of(ranks)
    found: list[tuple[float, Topology]] = []
    for replicas in (r for r in range(1, ranks + 1) if ranks % r == 0):
        team_ranks = ranks // replicas
        if team_ranks > LARGEST:
            continue
        known: Tables = {}
        alike = replicas if exact else 1
        # With 1 stage, replicas that are alike are the same as rows.
        for count in range(1 if alike == 1 else 2, min(len(facts), team_ranks) + 1):
            micro_batches = pieces(count)
            rows = most_rows(batch_size, micro_batches, replicas)
            groups = partition([layer.operations for layer in weighed(facts, machine, rows)], count)
            chosen = divided(facts, groups, team_ranks, rows, micro_batches, alike, machine, known)
            times, stages = [seconds for seconds, _ in chosen], tuple(stage for _, stage in chosen)
            # all micro-batches through the slowest stage; one through each of the others where the pipeline flushes
            others = 0.0 if pipeline in STREAMS else sum(times) - max(times)
            found.append((max(times) + others / micro_batches, Topology(replicas, stages)))
    found.sort(key=lambda entry: entry[0])
    topologies = [topology for _, topology in found[:SIMULATED]]
    rows = -(-batch_size // pieces(min(ranks, len(facts))))
    topologies.append(layers_layout(weighed(facts, machine, rows), ranks, rows))
    most = min(layer.units for layer in facts)
    topologies += [one_team(len(facts), ranks, cols) for cols in range(1, most + 1) if ranks % cols == 0]
    if peering is not None and ranks > 1:  # one replica would have nobody to exchange with
        topologies = [t for t in topologies if t.replicas > 1] or [Topology(ranks, one_team(len(facts), 1, 1).stages)]
    predictions: dict[Topology, float] = {}
    for each in topologies:
        count = pieces(len(each.stages))
        step = predict(each, facts, batch_size, count, pipeline, machine, exact=exact, peering=peering, quick=True)
        predictions[each] = step.seconds
    return sorted(predictions, key=lambda t: (predictions[t], t.replicas, len(t.stages)))


def one_team(layers: int, ranks: int, cols: int) -> Topology:
    """Return the layout with all layers in one stage of so many ranks."""
    return Topology(1, (Stage(0, layers, ranks // cols, cols),))


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
        before, after = (None if first else one), (None if last else one)
        whole = [
            stage_step(Stage(0, len(held), 1, cols), held, here, micro_batches, before, after, 1, 0, machine)
            for here in (1, 2)
        ]
        # everything but calls and messages grows with a rank's rows
        some, more = (each.whole(micro_batches) for each in whole)
        slope, base = more - some, some - (more - some)
        parameters = parameters_of(held, cols)
        for team_rows in range(1, ranks // cols + 1):
            seconds = -(-rows // team_rows) * slope + base
            if seconds < best[team_rows * cols][0]:
                sharers = team_rows * alike
                if machine.node is None or (team_rows - 1) * cols + (alike - 1) * ranks < machine.node:
                    seconds += reduced(parameters, sharers, machine)
                else:
                    stage, part = Stage(0, len(held), team_rows, cols), replace(whole[0], backward=0.0)
                    seconds += around_nodes(part, stage, held, sharers, ranks, ranks * alike, machine)
                seconds += parameters / sharers * machine.update
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
