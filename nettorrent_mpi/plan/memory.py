"""The memory model: bytes that the ranks of a stage hold, for the largest rank of each stage.

Counted is everything that the engine allocates once and keeps; what layers keep between forward and backward comes from
nn/footprint.py. Ranks are taken to share one node's memory: each counts all shared memory that it touches, as the
system does for a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from nettorrent_mpi.plan.actions import buffers_for
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.schedule import STREAMS, passes
from nettorrent_mpi.plan.sizes import in_parts, most_rows, parameters_of, part_of, rows_shared, sharers_of
from nettorrent_mpi.plan.stream import versions
from nettorrent_mpi.plan.topology import LayerFacts, Topology
from nettorrent_mpi.plan.zero_bubble import Paces


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for."""

    parameters: int = 0  # in the versions that the pipeline needs, with their gradients
    optimizer: int = 0  # this rank's part of the optimizer state
    layers: int = 0  # saved for backward, and workspaces of layers
    links: int = 0  # buffers for transfers from and to neighbouring stages
    rows: int = 0  # of the data set
    copies: int = 0  # of this rank's state and another one's, for when ranks are lost
    exchange: int = 0  # messages between replicas that differ, and their state
    files: int = 0  # the copy from which checkpoints are written, the gathered network, and the HDF5 library
    libraries: int = 0  # Python, NumPy, MPI and the rest of the process

    @property
    def total(self) -> int:
        """The sum."""
        return sum(int(getattr(self, field.name)) for field in fields(self))


def memory(
    topology: Topology,
    facts: Sequence[LayerFacts],
    batch_size: int,
    micro_batches: int,
    pipeline: str,
    layers: Sequence[tuple[int, int]],
    *,
    states: int = 0,
    itemsize: int = 4,
    wide: int | None = None,
    exact: bool = True,
    paces: Paces = (),
) -> list[Memory]:
    """Return the memory of the largest rank of each stage: parameters, optimizer, layers and links.

    `layers[s]` are the bytes that the layers of stage s keep for one micro-batch, and those that they share among all.
    Parameters are those of the rank's neurons, in all versions, its gradients, and where several ranks hold the same
    neurons the same size again: its part of each one's gradients, which it reads, and of their sum; for matrices whose
    gradients are computed in parts the operands, and its part of the sum. Of the optimizer's `states` arrays each of
    these ranks has its part. An element of what layers compute with takes `itemsize` bytes; where weights, their
    gradients and what the optimizer keeps take more (`wide`), each of these ranks also has its part of the weights.
    With `exact=False` replicas hold nothing in common. `paces` are those by which the lists of some pipelines are
    written.
    """
    wide = wide or itemsize
    rows = most_rows(batch_size, micro_batches, topology.replicas)
    lists = passes(pipeline, len(topology.stages), micro_batches, paces)
    have = [buffers_for(s, actions) for s, actions in enumerate(lists)]
    batch_rows = rows_shared(topology, batch_size, exact)
    last = len(topology.stages) - 1
    found = []
    for s, stage in enumerate(topology.stages):
        held, here = facts[stage.first : stage.stop], -(-rows // stage.rows)
        parameters, sharers = parameters_of(held, stage.cols), sharers_of(topology, stage, exact)
        kinds = versions(len(have), micro_batches, s) if pipeline in STREAMS else 1
        gradients = 1 if sharers == 1 else 2
        # Inputs of all slots, and of one more that is arriving; gradients arrive and leave in two buffers each (where
        # passes are split, they arrive in one for each slot). Parts of rows, and partial gradients, go through staging
        # buffers.
        before = topology.stages[s - 1].cols if s > 0 else 1
        after = topology.stages[s + 1].cols if s < last else 1
        inputs, outputs = held[0].inputs, held[-1].outputs * part_of(held[-1].units, stage.cols)
        links: float = (have[s].slots + 1) * inputs * (2 if before > 1 else 1)
        links += 2 * inputs * (2 if before > 1 else 1) * (s > 0) + have[s].dy * outputs * after * (s < last)
        own, shared = layers[s]
        size = parameters * (kinds * itemsize + gradients * wide + (wide / sharers if wide > itemsize else 0))
        for ins, units in ((layer.matrix[0], layer.matrix[1] * part_of(layer.units, stage.cols)) for layer in held):
            if in_parts(batch_rows, sharers, ins, units):  # operands in the place of gradients
                size += batch_rows * (ins + units) * itemsize - ins * units * (2 - 1 / sharers) * wide
        found.append(
            Memory(
                parameters=round(size),
                optimizer=round(states * parameters / sharers * wide),
                layers=have[s].slots * own + shared,
                links=round(here * links * itemsize),
            )
        )
    return found
