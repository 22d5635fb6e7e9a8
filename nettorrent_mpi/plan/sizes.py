"""The sizes of what a rank has in a layout: rows, parameters, and how its weight gradients are computed."""

from __future__ import annotations

from collections.abc import Sequence

from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology

PAYS = 2.5  # the factor of memory traffic that `in_parts` has to save: measured with 2, 4 and 8 ranks


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


def little_kept(layers: Sequence[LayerFacts], rows: int) -> bool:
    """Whether all layers are linear, and what enters and leaves them for this many rows takes at most as much memory as
    their weights and gradients."""
    kept = rows * (layers[0].inputs + sum(layer.outputs for layer in layers))
    return all(all(layer.matrix) for layer in layers) and kept <= 2 * sum(layer.parameters for layer in layers)


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
