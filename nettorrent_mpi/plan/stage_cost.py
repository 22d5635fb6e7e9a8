"""The seconds of one rank of a stage: inside a node, between nodes, and with replicas that differ.

Inside a node ranks copy what they send, and read gradients in place. Between nodes arrays travel over the link that the
ranks of a node share, while they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.sizes import in_parts, parameters_of, part_of
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology

RING = 16 << 10  # bytes of a shard from which gradients travel around a ring between nodes, while ranks compute
# Part of a link's rate that rings reach: with Open MPI over TCP 0.66 to 0.71 of 50 Mbit/s, 0.67 to 0.85 of 200 Mbit/s,
# 0.58 to 0.69 of 1 Gbit/s. This is the middle.
RATE = 0.72
BUCKET = 1 << 20  # bytes of gradients that leave together between nodes
TRAVEL = 0.7  # part of a step's compute within which a message of gossip has to arrive, where its length is free
WORK = 0.07  # part of a step's compute that exchanging it may cost


class Peering(NamedTuple):
    """A Peering tells what replicas that differ send each other: bytes for each parameter that a rank owns, after every
    so many steps."""

    sent: float
    every: int = 1
    hidden: bool = True  # messages travel while the next step computes
    fitting: bool = True  # only as much is sent as travels within a step


@dataclass(frozen=True)
class StageStep:
    """Seconds of one rank of a stage: compute and messages of a micro-batch, forward (what arrives) and backward (what
    leaves again), and the part of `backward` that the gradients of weights take; once per step the reduction of
    gradients and the update; and for how long its messages to other replicas travel."""

    forward: float
    backward: float
    arrives: float
    leaves: float
    sum: float
    update: float
    travels: float = 0.0
    weights: float = 0.0

    def whole(self, count: int) -> float:
        """Return the seconds of all of a mini-batch's micro-batches."""
        return count * (self.forward + self.backward + self.arrives + self.leaves)


def stage_step(
    stage: Stage,
    held: Sequence[LayerFacts],
    rows: int,
    micro_batches: int,
    before: Stage | None,
    after: Stage | None,
    alike: int,
    shared: int,
    machine: Machine,
) -> StageStep:
    """Return the seconds of one stage inside a node. `rows` are those of a micro-batch in one replica; `before` and
    `after` the neighbouring teams; `alike` is the number of replicas that reduce their gradients, `shared` the rows
    that those who hold the same weights have between them, if it is all of them (`rows_shared`)."""
    here, cols, sharers = -(-rows // stage.rows), stage.cols, stage.rows * alike
    forward = backward = machine.call
    weights = summed = 0.0  # seconds; parameters
    again = (micro_batches - 1) / micro_batches  # part of the backward passes that add to gradients
    for layer in held:
        part, times = part_of(layer.units, cols), machine.times(layer)
        forward += times.forward.seconds(here, part)
        if in_parts(shared, sharers, layer.matrix[0], layer.matrix[1] * part):
            more = -times.backward.weight * part * (1 - 1 / sharers)
            summed += layer.parameters * part - layer.matrix[0] * layer.matrix[1] * part
        else:
            more = times.accumulate * part * again
            summed += layer.parameters * part
        whole = times.backward.seconds(here, part) + more
        backward += whole
        weights += min(max(times.weights.seconds(here, part) + more, 0.0), whole)
    arrives = leaves = 0.0
    if before is None:
        forward += here * machine.row
    else:
        messages = min(here, _overlapping(stage.rows, before.rows)) * before.cols
        arrives = leaves = _moved(here * held[0].inputs, messages, machine)
    if after:
        messages = min(here, _overlapping(stage.rows, after.rows)) * after.cols
        gone = _moved(here * held[-1].outputs * part_of(held[-1].units, cols) * after.cols, messages, machine)
        arrives, leaves = arrives + gone, leaves + gone
    if cols > 1:
        for layer in held[:-1]:  # the next layer of this stage needs all features
            gathered = here * layer.outputs * (cols - 1) / cols * machine.itemsize / machine.bandwidth
            gathered += (cols - 1).bit_length() * machine.between_cols
            arrives, leaves = arrives + gathered, leaves + gathered
    parameters = parameters_of(held, cols)
    return StageStep(
        forward,
        backward,
        arrives,
        leaves,
        reduced(summed, sharers, machine),
        parameters / sharers * machine.update,
        weights=weights,
    )


def _moved(elements: float, messages: int, machine: Machine) -> float:
    return elements * machine.itemsize / machine.bandwidth + messages * machine.latency


def reduced(parameters: float, sharers: int, machine: Machine) -> float:
    """Return the seconds per step to reduce gradients of `parameters` over `sharers` ranks of a node."""
    moved = 2 * (sharers - 1) / sharers * parameters * machine.wide / machine.reduction
    return moved + 2 * (sharers - 1).bit_length() * machine.between_holders


# -- between nodes ----------------------------------------------------------------------------------------------------


def wait_of_cols(stage: Stage, held: Sequence[LayerFacts], here: int, machine: Machine) -> float:
    """Return the seconds that the all-gathers of a micro-batch in one direction wait for the links of nodes."""
    assert machine.node is not None
    part = min(machine.node, stage.cols) / stage.cols  # of all features, on the ranks of one node
    elements = sum(here * layer.outputs for layer in held[:-1]) * part * min(machine.node / stage.cols, stage.rows, 1)
    rounds = (machine.nodes(stage.cols) - 1).bit_length() or 1
    wire = elements * machine.itemsize / machine.link.bandwidth
    return wire + (stage.layers - 1) * rounds * machine.link.latency


def around_nodes(
    step: StageStep,
    stage: Stage,
    held: Sequence[LayerFacts],
    sharers: int,
    each: int,
    ranks: int,
    machine: Machine,
) -> float:
    """Return the seconds per step to reduce gradients between nodes, where a replica has `each` of the `ranks`: around
    a ring, as much as possible under the last backward pass and the update; short ones by MPI's own algorithms, which
    nobody hides."""
    assert machine.node is not None
    size = parameters_of(held, stage.cols) * machine.wide
    # Rings that go through one node's link: one for each part of the weights that its ranks hold.
    if each <= machine.node:
        weights = float(sum(layer.parameters for layer in held) * machine.wide)
    else:
        weights = size * min(stage.cols, machine.node)
    part = (sharers - 1) / sharers
    if 2 * part * weights <= machine.link.burst:
        weights = 0.0
    lap = part * weights / (RATE * machine.link.bandwidth)
    copies = part * size / machine.bandwidth
    nodes = min(machine.nodes(ranks), sharers)
    if size / sharers < RING:
        return 2 * (RATE * lap + copies) + 2 * (sharers - 1).bit_length() * machine.link.latency
    buckets = max(1.0, size / BUCKET)
    hops = (nodes - 1) * machine.link.latency + (sharers - nodes) * machine.latency
    hidden = [step.backward * (1 - 1 / buckets), step.update * (1 - 1 / buckets)]
    return sum(max(lap + hops - under, lap / buckets) + copies for under in hidden)


def gossiping(
    step: StageStep,
    stage: Stage,
    held: Sequence[LayerFacts],
    micro_batches: int,
    topology: Topology,
    peering: Peering,
    machine: Machine,
) -> StageStep:
    """Return the step of a rank that exchanges its shard with those of other replicas."""
    size = peering.sent * parameters_of(held, stage.cols) / stage.rows
    works, travels, calls = machine.mix * size, 0.0, machine.round
    if not machine.inside(topology, 0, topology.size):
        assert machine.node is not None
        sending = min(machine.node, topology.size // topology.replicas * max(machine.node // topology.size, 1))
        travels = machine.link.latency + sending * size / machine.link.bandwidth
        calls += machine.link.latency  # which the cores feel, too
    if peering.fitting:
        compute = step.whole(micro_batches)
        parts = max(round(max(travels / (TRAVEL * compute), works / (WORK * compute))), 1) if compute else 1
        works, travels = works / parts, travels / parts
    works, travels = (works + calls) / peering.every, travels / peering.every
    waits = 0.0 if peering.hidden else travels
    return replace(step, update=step.update + works + waits, travels=travels if peering.hidden else 0.0)


def _overlapping(mine: int, theirs: int) -> int:
    """Return the largest number of `theirs` spans that overlap one of `mine` spans of the same rows (an upper
    estimate)."""
    return max(1, -(-theirs // mine)) + (theirs % mine != 0 and mine % theirs != 0)
