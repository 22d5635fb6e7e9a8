"""The cost model: the predicted seconds of a step in a layout.

Costs are those of the rank with the most work: spans round up, so its numbers of rows, units and micro-batches do too.
With an exact exchange replicas and rows differ only in how ranks are grouped: all of them reduce their gradients and
divide the optimizer's work. Without (`exact=False`) the rows of each team do so on their own; messages between replicas
then travel during compute (`Peering`).

Inside a node ranks copy what they send, and read gradients in place. Between nodes arrays travel over the link that the
ranks of a node share, while they compute. plan/search.py finds the layout that is predicted to be the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nettorrent_mpi.plan.actions import Action
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.schedule import PACED, STREAMS, passes
from nettorrent_mpi.plan.sizes import most_rows, parameters_of, part_of, rows_shared
from nettorrent_mpi.plan.stage_cost import Peering, StageStep, around_nodes, gossiping, stage_step, wait_of_cols
from nettorrent_mpi.plan.timeline import Timeline, Wire, simulate, steady_seconds
from nettorrent_mpi.plan.topology import LayerFacts, Topology
from nettorrent_mpi.plan.zero_bubble import Pace, paces_of


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
    peering: Peering | None = None,
    stored: int | None = None,
    meets: bool = False,
    quick: bool = False,
) -> Prediction:
    """Predict one training step; where the pipeline does not flush, one more among many. `stored` is the limit of
    micro-batches where paces decide (plan/zero_bubble.py); `meets` says that all stages wait for each other at the end
    of a step. Where many steps are compared, `quick` leaves out the search for lists by paces.

    A stage's work on a micro-batch is its compute, the copying of what it receives and sends (both ranks pay: messages
    progress only inside MPI calls), and the all-gathers over cols between its own layers. These times go through the
    schedule's simulation; then comes the reduction of gradients as reduce-scatter and all-gather over replicas x rows
    (with `exact=False` over rows only; 2 (n-1)/n of the bytes; 2 log2 n messages), between whose halves the optimizer
    updates each rank's part.
    """
    machine = (machine or Machine()).of(topology.size)
    steps, transfers, carried = _steps(topology, facts, batch_size, micro_batches, machine, exact, peering)
    count, stages = micro_batches, len(steps)
    steps = _for(pipeline, steps, machine)
    forward, backward, finish = _costs(steps)
    if pipeline in STREAMS:
        seconds = steady_seconds(stages, count, forward, backward, transfers, finish)
    else:
        line = _flushed(steps, transfers, count, pipeline, stored, quick=quick)
        seconds = line.period if pipeline in PACED and not meets else line.makespan
    seconds = max(seconds + machine.step, carried)
    if peering is not None and topology.replicas > 1:
        seconds = max(seconds, *(t.travels for t in steps))
    compute = tuple(count * (t.forward + t.backward) + t.update for t in steps)
    communication = tuple(count * (t.arrives + t.leaves) + t.sum for t in steps)
    busy = [count * (f + b) + e for f, b, e in zip(forward, backward, finish, strict=True)]
    bubble = 1 - sum(busy) / (seconds * len(busy)) if seconds else 0.0
    return Prediction(seconds, compute, communication, bubble)


def timeline(
    topology: Topology,
    facts: Sequence[LayerFacts],
    batch_size: int,
    micro_batches: int,
    pipeline: str,
    machine: Machine,
    *,
    exact: bool = True,
    peering: Peering | None = None,
    stored: int | None = None,
) -> Timeline:
    """Return the predicted timeline of a step, or, where the pipeline does not flush, of all mini-batches up to a
    drain."""
    machine = machine.of(topology.size)
    steps, transfers, _ = _steps(topology, facts, batch_size, micro_batches, machine, exact, peering)
    return _flushed(_for(pipeline, steps, machine), transfers, micro_batches, pipeline, stored)


def paces(
    topology: Topology,
    facts: Sequence[LayerFacts],
    batch_size: int,
    micro_batches: int,
    machine: Machine,
    *,
    exact: bool = True,
    stored: int | None = None,
) -> tuple[Pace, ...]:
    """Return the predicted paces of the stages, by which the lists of PACED pipelines are written."""
    machine = machine.of(topology.size)
    steps, transfers, _ = _steps(topology, facts, batch_size, micro_batches, machine, exact, None)
    return _paces(_for("zero_bubble", steps, machine), transfers, stored)


def _paces(steps: Sequence[StageStep], transfers: Sequence[Wire], stored: int | None) -> tuple[Pace, ...]:
    forward, backward, _ = _costs(steps)
    weights = [t.weights for t in steps]
    inputs = [b - w for b, w in zip(backward, weights, strict=True)]
    return paces_of(forward, inputs, weights, [wire.occupied + wire.latency for wire in transfers], stored)


def _for(pipeline: str, steps: Sequence[StageStep], machine: Machine) -> list[StageStep]:
    """Return the steps of the stages in this pipeline: one that splits backward passes has one more pass for each
    micro-batch."""
    if pipeline not in PACED or len(steps) == 1:
        return list(steps)
    more = machine.overhead
    return [replace(t, backward=t.backward + more, weights=t.weights + more) for t in steps]


def _flushed(
    steps: Sequence[StageStep],
    transfers: Sequence[Wire],
    count: int,
    pipeline: str,
    stored: int | None,
    *,
    quick: bool = False,
) -> Timeline:
    forward, backward, finish = _costs(steps)
    at = _paces(steps, transfers, stored) if pipeline in PACED else ()
    found = passes(pipeline, len(steps), count, at, quick=quick)
    lists = [[*a, Action(s, "R")] for s, a in enumerate(found)]
    return simulate(lists, forward, backward, transfers, finish, [t.weights for t in steps])


def _costs(steps: Sequence[StageStep]) -> tuple[list[float], list[float], list[float]]:
    forward = [t.forward + t.arrives for t in steps]
    backward = [t.backward + t.leaves for t in steps]
    return forward, backward, [t.sum + t.update for t in steps]


def _steps(
    topology: Topology,
    facts: Sequence[LayerFacts],
    batch_size: int,
    micro_batches: int,
    machine: Machine,
    exact: bool,
    peering: Peering | None,
) -> tuple[list[StageStep], list[Wire], float]:
    """Return the seconds of each stage, those of a micro-batch's messages from each stage to the next, and the most
    that a link between nodes needs to carry all of a step's in one direction."""
    alike = topology.replicas if exact else 1
    rows = most_rows(batch_size, micro_batches, topology.replicas)
    shared = rows_shared(topology, batch_size, exact)
    last = len(topology.stages) - 1
    each = topology.size // topology.replicas  # ranks of a replica
    steps: list[StageStep] = []
    transfers: list[Wire] = []
    first, carried = 0, 0.0
    for s, stage in enumerate(topology.stages):
        held = facts[stage.first : stage.stop]
        before = topology.stages[s - 1] if s > 0 else None
        after = topology.stages[s + 1] if s < last else None
        sharers = stage.rows * alike
        span = stage.size + (topology.replicas - 1) * each if alike > 1 else stage.size
        near = sharers == 1 or machine.inside(topology, first, span)
        step = stage_step(stage, held, rows, micro_batches, before, after, alike, shared if near else 0, machine)
        local = machine.inside(topology, first, stage.cols, *([stage.cols] if stage.rows > 1 else []))
        if stage.cols > 1 and not local:  # every gather waits for the link
            wait = wait_of_cols(stage, held, -(-rows // stage.rows), machine)
            step = replace(step, arrives=step.arrives + wait, leaves=step.leaves + wait)
        if not near:
            step = replace(step, sum=around_nodes(step, stage, held, sharers, each, topology.size, machine))
            size = parameters_of(held, stage.cols) * machine.wide
            carried = max(carried, 2 * (sharers - 1) / sharers * size / machine.link.bandwidth)
        if peering is not None and topology.replicas > 1:
            step = gossiping(step, stage, held, micro_batches, topology, peering, machine)
        steps.append(step)
        if after is not None:
            wire, link = Wire(machine.latency), machine.link
            if not machine.inside(topology, first, stage.size + after.size):
                assert machine.node is not None
                elements = -(-rows // stage.rows) * held[-1].outputs * part_of(held[-1].units, stage.cols) * after.cols
                sending = min(machine.node, stage.size)
                size = sending * elements * machine.itemsize
                wire = Wire(size / link.bandwidth, link.latency, link.burst / link.bandwidth)
                carried = max(carried, micro_batches * size / link.bandwidth)
            transfers.append(wire)
        first += stage.size
    return steps, transfers, carried
