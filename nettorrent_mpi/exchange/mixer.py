"""The mixer merges gossip messages into the vector that this rank owns.

    x += g * (theirs - mine at the time of sending)

With the pairing's own weights for g and no late messages, the sum over the replicas is preserved up to rounding, also
when steps were done in between (adding the received values, instead of moving by the difference, would lose a part of
these steps). Memories (the optimizer's) move towards theirs from their present values, so that squares stay positive.

Sources. dpwa: the factors (exchange/merging.py). Push-sum: Kempe, Dobra, Gehrke 2003; Assran et al. 2019 (stochastic
gradient push), here in a form for overlap: with mass w, mass sent m and masses received m_j,

    w' = w - m + sum m_j,   w' x' = w x - m * (mine at the time of sending) + sum m_j x_j.

Compression: CHOCO-SGD (exchange/estimates.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nettorrent_mpi.comm.channels import Channel
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.mail import Arrived, Letter
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.exchange.estimates import Estimates
from nettorrent_mpi.exchange.merging import Standing, factor, merged_clock
from nettorrent_mpi.exchange.vector import Vector
from nettorrent_mpi.plan.blocks import Span, owner, span
from nettorrent_mpi.plan.exchange_specs import ConstantMix, Gossip, PushSumMix, Whole
from nettorrent_mpi.plan.pairing import Pairing

NUMBER, START, STOP, CLOCK, LOSS, MASS = range(6)  # positions in a message's head


@dataclass
class Round:
    """A Round is an open round: its part, what was sent, the expected messages, and those that have come."""

    number: int
    part: int
    where: Span
    began: float
    expected: dict[int, float]  # source -> weight
    targets: dict[int, float]  # target -> weight
    clock: float  # age and loss of this replica's model when it was opened
    loss: float
    got: dict[int, Arrived] = field(default_factory=dict)
    own: Letter | None = None  # the snapshot; none with compression
    known: frozenset[int] = frozenset()  # sources whose compressed message the estimate of them has already


class Mixer:
    """A Mixer merges messages into the vector, and keeps the masses of its parts and the loss and age of this replica's
    model."""

    def __init__(self, spec: Gossip, pairing: Pairing, vector: Vector):
        self._spec, self._pairing, self.vector = spec, pairing, vector
        self.push_sum = isinstance(spec.mix, PushSumMix)
        self.estimates: Estimates | None = None
        if not isinstance(spec.compress, Whole):
            self.estimates = Estimates(spec.compress, spec.gamma, vector)
        self.clock, self.loss = 0.0, float("nan")
        self._elements: Array | None = None  # memory for a mass of each element
        self.divide(1)

    def divide(self, parts: int) -> None:
        """Exchange this number of parts in turn from now on; all masses are equal then."""
        self.parts = max(min(parts, self.vector.size), 1)
        self.masses = np.ones(self.parts)

    def where(self, part: int) -> Span:
        """Return the elements of a part."""
        return span(self.vector.size, self.parts, part)

    def length(self, elements: int) -> int:
        """Return the bytes of a message about this number of elements."""
        if self.estimates is not None:
            return self.estimates.format.bytes(elements)
        return elements * self.vector.bytes_per_element

    @property
    def compresses(self) -> bool:
        """Whether messages differ from target to target."""
        return self.estimates is not None

    # -- writing messages -------------------------------------------------------------------------------------------

    def write(self, letter: Letter, this: Round, to: int | None, values: Sequence[Array] | None = None) -> None:
        """Write this round's message to the letter: the same for all, or if messages are compressed, the one to `to`.
        It has the vector's present values, or these, an array of the vector's size for each of its layers."""
        weights = set(this.targets.values())
        assert len(weights) <= 1, "all messages of a round carry the same mass"
        mass = self.masses[this.part] * max(weights, default=0.0)
        letter.head[:6] = (this.number, *this.where, this.clock, this.loss, mass)
        letter.length = self.length(this.where.size)
        if self.estimates is None:
            if values is None:
                self.vector.read(this.where, self._values(letter))
            else:
                for part, whole in zip(self.vector.of_layers(this.where, self._values(letter)), values, strict=True):
                    self.vector.device.ops.copy(part, whole[slice(*this.where)])
        else:
            assert to is not None
            self.estimates.write(to, this.where, letter.body[: letter.length])

    def take_out(self, letter: Letter, where: Span, values: Sequence[Array]) -> None:
        """Copy what a letter says of the elements `where` to `values`, as `write` takes them; zeros elsewhere."""
        ops = self.vector.device.ops
        for part, whole in zip(self.vector.of_layers(where, self._values(letter)), values, strict=True):
            ops.fill(whole, 0)
            ops.copy(whole[slice(*where)], part)

    def _values(self, letter: Letter) -> Array:
        return letter.body[: letter.length].view(self.vector.dtype)

    # -- merging messages -------------------------------------------------------------------------------------------

    def merge(self, this: Round) -> None:
        """Merge a round's messages in an order that does not depend on their arrival. Others know this rank's steps by
        then, so withheld changes are released."""
        self.vector.release(this.where)
        if self.push_sum and this.targets:
            self._part_with_mass(this)
        messages = [this.got[source] for source in sorted(this.got)]
        shares = [self._share(message, this, 0) for message in messages]
        for i, message in enumerate(messages):
            self._merge(message, shares[i], sum(shares[i + 1 :]), this)
        for source in sorted(this.known):
            self._approach(source, this.expected[source], this)

    def merge_late(self, message: Arrived, this: Round | None, age: int) -> None:
        """Merge one message, with less weight the older it is; `this` is the round that it belongs to, if the part was
        not exchanged since then."""
        self._merge(message, self._share(message, this, age), 0.0, this)

    def _share(self, message: Arrived, this: Round | None, age: int) -> float:
        """Return the weight of a message's values relative to this rank's."""
        weight, of_round = (0.5, 0.5) if this is None else (this.expected[message.source], sum(this.expected.values()))
        if self.push_sum or self.estimates is not None:
            return weight
        head, clock = message.letter.head, self._clock_then(self._own(message, this))
        theirs = Standing(float(head[LOSS]), float(head[CLOCK]))
        mix = self._spec.mix
        share = weight / of_round
        if (
            this is not None and not self._pairing.doubly_stochastic
        ):  # messages that arrived and this rank's values have equal weights
            weight = 1 / (len(this.got) + 1)
        g = factor(mix, self._spec.divergence_threshold, Standing(self.loss, clock), theirs, weight)
        if not isinstance(mix, ConstantMix) or mix.value is not None:  # f is divided over all sources
            g *= share
        behind = 0 if this is None else this.number - int(head[NUMBER])  # rounds
        return g / (1 + max(age, behind if behind > 1 else 0))

    def _merge(self, message: Arrived, g: float, others: float, this: Round | None) -> None:
        """Merge a message's values with weight g; `others` is the weight of messages that are merged after it."""
        letter, head, source = message.letter, message.letter.head, message.source
        where = Span(int(head[START]), int(head[STOP]))
        if self._own(message, this) is None:  # moves towards the message from the present values
            self.vector.release(where)
        if self.estimates is not None:
            self.estimates.read(source, where, letter.body[: letter.length])
            if this is not None and where == this.where:
                self._approach(source, g, this)
            return
        values = self._values(letter)
        if self.push_sum:
            self._take_mass(where, float(head[MASS]), values)
            return
        own = self._own(message, this)
        self.vector.move(where, g, values, None if own is None else self._values(own))
        # Messages merged later leave 1 - others of this one.
        self.vector.mix(where, min(g / (1 - others), 1.0) if others < 1 else 0.0, values)
        # Its age minus this one's when it was sent: so the mean age of two that exchange is preserved.
        part = where.size / self.vector.size
        self.clock = merged_clock(g * part, self.clock, self.clock + float(head[CLOCK]) - self._clock_then(own))

    def _approach(self, source: int, g: float, this: Round) -> None:
        """Move towards the estimate of a source."""
        assert self.estimates is not None
        out = source if source in this.targets else next(iter(this.targets), None)
        self.estimates.approach(source, out, g, this.where)

    def _own(self, message: Arrived, this: Round | None) -> Letter | None:
        """Return what this rank sent in the same round, if the message is about the same part."""
        start, stop = message.letter.head[START : STOP + 1]
        return this.own if this is not None and (start, stop) == this.where else None

    def _clock_then(self, own: Letter | None) -> float:
        """Return this replica's age when it sent `own`, or now."""
        return self.clock if own is None else float(own.head[CLOCK])

    def _part_with_mass(self, this: Round) -> None:
        """Subtract what push-sum has sent: w x - m own = (w - m) x - m (own - x)."""
        assert this.own is not None
        sent = float(this.own.head[MASS]) * len(this.targets)
        left = float(self.masses[this.part]) - sent
        self.vector.move(this.where, -sent / left, self._values(this.own))
        self.masses[this.part] = left

    def _take_mass(self, where: Span, mass: float, values: Array) -> None:
        part = owner(self.vector.size, self.parts, where.start)
        total = float(self.masses[part]) + mass
        self.vector.move(where, mass / total, values)
        self.vector.mix(where, mass / total, values)
        self.masses[part] = total

    # -- at rest ----------------------------------------------------------------------------------------------------

    def average(self, peers: Group, channel: Channel) -> None:
        """Set the parameters to their mean over the replicas; with push-sum to the mean weighted by mass, which
        exchanges do not change. All peers call, settled; `channel` connects them."""
        totals = self.masses.copy()
        peers.all_reduce(totals)
        for part in range(self.parts):
            self.vector.scale(self.where(part), float(self.masses[part] / totals[part]))
        for shard in self.vector.layers[0]:
            channel.all_reduce(shard)

    def averaged(self) -> None:
        """Restart with replicas that are equal."""
        self.masses[...] = 1
        if self.estimates is not None:
            self.estimates.begin()

    def mass_of_elements(self) -> Array:
        """Return the mass of each element: that of its part."""
        device = self.vector.device
        if self._elements is None:
            self._elements = device.empty((self.vector.size,), "float64")
        whole = self._elements
        for part in range(self.parts):
            device.ops.fill(whole[slice(*self.where(part))], float(self.masses[part]))
        return whole

    def weigh(self, whole: Array) -> None:
        """Set each part's mass from the masses of its elements; `whole` has zeros in the gaps between arrays. If they
        come from a run with other parts, a part gets the largest of its elements' masses."""
        masses = self.vector.device.on_host(whole)
        for part in range(self.parts):
            inside = masses[slice(*self.where(part))]
            self.masses[part] = inside.max(initial=0.0) or 1.0
