"""The performance of the machine that the cost model predicts for: constants, or what `nettorrent profile` measured
(engine/profiles.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from math import gcd

from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.topology import LayerFacts, Topology


@dataclass(frozen=True)
class LayerCost:
    """The seconds of one direction of a weight layer on one rank, with some rows and a part of the neurons:
    call + rows x (row + product x part) + weight x part."""

    call: float
    row: float
    product: float
    weight: float

    def seconds(self, rows: float, part: float) -> float:
        """Return the seconds for so many rows and this part of the neurons or filters."""
        return self.call + rows * (self.row + self.product * part) + self.weight * part

    def scaled(self, factor: float) -> LayerCost:
        return LayerCost(self.call * factor, self.row * factor, self.product * factor, self.weight * factor)


@dataclass(frozen=True)
class LayerTimes:
    """The costs of a weight layer. `accumulate` are the seconds to add the gradients of all its weights to others;
    `weights` the costs that a split backward pass has in W, of those of `backward`."""

    forward: LayerCost
    backward: LayerCost
    accumulate: float = 0.0
    weights: LayerCost = LayerCost(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Link:
    """The link of a node to the others: seconds per message, bytes per second in each direction, for all of its ranks
    together, and the bytes that it takes at once where it was idle (a token bucket's)."""

    latency: float = 2e-5
    bandwidth: float = 1.25e9
    burst: float = 0.0

    def __str__(self) -> str:
        bits = 8 * self.bandwidth
        rate = f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"
        return f"each joined to the others by {rate} with {1e6 * self.latency:.3g} us"


@dataclass(frozen=True)
class Machine:
    """The performance of one rank, and where the ranks lie. The defaults are those of one CPU core per rank, float32,
    messages in shared memory, all ranks on one node."""

    flops: float = 1e11  # floating-point operations per second of a large matrix product
    bandwidth: float = 4e9  # bytes per second that one rank moves; its own core copies them, so compute waits
    reduction: float = 1.2e10  # the same for gradients, which ranks of a node read in place
    latency: float = 5e-6  # seconds per message
    overhead: float = 2e-5  # overhead in seconds of one layer's forward or backward call
    update: float = 1.5e-9  # seconds for the optimizer to update one parameter
    itemsize: int = 4  # bytes of an element of what layers compute with
    layers: Mapping[str, LayerTimes] = field(default_factory=dict)  # measured, by the layers' names
    call: float = 0.0  # seconds of a stage's forward or backward pass besides those of its layers
    row: float = 0.0  # seconds for a row of the mini-batch besides those of layers: to fetch it, and to score it
    step: float = 0.0  # seconds of a step besides all others
    collective: float | None = None  # seconds of one round of messages between cols; None: as of any message
    fence: float | None = None  # seconds of one round of messages between those that hold the same weights; likewise
    mix: float = 2e-9  # seconds for a replica to send, receive and merge a byte of gossip's messages
    round: float = 0.0  # seconds of a round of gossip besides
    node: int | None = None  # ranks on a node; None: all
    link: Link = Link()  # between nodes
    source: str = ""  # of what was measured
    alone: Machine | None = None  # a rank whose node has no other, where that was measured

    def of(self, ranks: int) -> Machine:
        """Return what holds for so many ranks: figures of a rank alone, where each has its node for itself."""
        if self.alone is None or not (ranks == 1 or self.node == 1):
            return self
        return replace(
            self.alone, latency=self.latency, bandwidth=self.bandwidth, collective=self.collective, fence=self.fence,
            mix=self.mix, round=self.round, node=self.node, link=self.link,
        )  # fmt: skip

    def scaled(self, factor: float) -> Machine:
        """Return the machine whose layers and optimizer take so many times as long."""
        layers = {
            name: LayerTimes(
                each.forward.scaled(factor),
                each.backward.scaled(factor),
                each.accumulate * factor,
                each.weights.scaled(factor),
            )
            for name, each in self.layers.items()
        }
        return replace(self, layers=layers, update=self.update * factor)

    def times(self, layer: LayerFacts) -> LayerTimes:
        """Return a weight layer's costs: as measured, or by its operations, of which a third each are of the forward
        pass, the gradients of the inputs and those of the weights."""
        found = self.layers.get(layer.name)
        if found is not None:
            return found
        product = layer.operations / 3 / self.flops
        once, twice = (LayerCost(self.overhead, 0.0, times * product, 0.0) for times in (1, 2))
        return LayerTimes(once, twice, weights=LayerCost(0.0, 0.0, product, 0.0))

    def placed(self, node: int | None, link: Link | None = None) -> Machine:
        """Return the same machine with so many ranks on each node, joined by `link` (None: by its own)."""
        return replace(self, node=node, link=link or self.link)

    @property
    def wide(self) -> int:
        """The bytes of an element of weights and their gradients."""
        return max(self.itemsize, 4)

    @property
    def between_cols(self) -> float:
        return self.latency if self.collective is None else self.collective

    @property
    def between_holders(self) -> float:
        return self.latency if self.fence is None else self.fence

    def nodes(self, ranks: int) -> int:
        """Return the number of nodes of so many ranks."""
        return 1 if self.node is None else -(-ranks // self.node)

    def inside(self, topology: Topology, first: int, count: int, *steps: int) -> bool:
        """Whether groups of `count` neighbouring ranks all lie inside a node, if one begins at rank `first` of a
        replica, and others so many ranks further on, again and again. In doubt they do not."""
        if self.node is None or topology.size <= self.node:
            return True
        whole = topology.size // topology.replicas
        common = gcd(self.node, *steps, *([whole] if topology.replicas > 1 else []))
        return first % common + count <= common
