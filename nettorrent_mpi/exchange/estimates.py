"""Both ends of a pair estimate each other's values, and update the estimates by compressed differences (CHOCO-SGD).

Koloskova, Stich, Jaggi 2019 (arXiv 1902.00340), here with an estimate for each direction of each pair, so that the
pairs may change from round to round: for a -> b both ends hold the same x_hat_ab. In a round a sends q = C(x_a -
x_hat_ab), both add q to x_hat_ab, and then each moves by gamma * weight * (its estimate of the other - the other's
estimate of it). What compression omits stays in the difference and is sent later: error feedback.
"""

from __future__ import annotations

from collections.abc import Iterable

from nettorrent_mpi.comm.channels import Channel
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.exchange.vector import Vector
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.compression import MessageFormat
from nettorrent_mpi.plan.specs import Spec


class Estimates:
    """One rank's estimates: two vectors for every peer that it exchanges with, allocated at the first message."""

    def __init__(self, compress: Spec, gamma: float | None, vector: Vector):
        self.format = MessageFormat(compress)
        self._gamma = self.format.gamma if gamma is None else gamma
        self._vector = vector
        self._reference = self._like_vector()
        self._difference = self._like_vector()
        self._sent: dict[int, Array] = {}  # the peer's estimate of this vector
        self._known: dict[int, Array] = {}  # this rank's estimate of the peer's
        self.begin()

    def _like_vector(self) -> Array:
        return self._vector.device.empty((self._vector.size,), self._vector.dtype)

    def begin(self) -> None:
        """Restart all estimates from the present values, which are equal on all peers."""
        whole = Span(0, self._vector.size)
        self._vector.read(whole, self._reference)
        for estimate in (*self._sent.values(), *self._known.values()):
            self._vector.device.ops.copy(estimate, self._reference)

    def _of(self, estimates: dict[int, Array], member: int, where: Span) -> Array:
        if member not in estimates:
            estimates[member] = self._like_vector()
            self._vector.device.ops.copy(estimates[member], self._reference)
        return estimates[member][slice(*where)]

    def knows(self, peer: int) -> bool:
        """Whether a peer has an estimate of this replica."""
        return peer in self._sent

    def expect(self, peers: Iterable[int]) -> None:
        """Make `memories` have the estimates of these peers, which are then restored."""
        for peer in peers:
            self._of(self._sent, peer, Span(0, 0))

    def memories(self) -> dict[str, Array]:
        """Return what a checkpoint holds, arrays of the vector's size: what all estimates have begun with, and the
        peers' estimates of this replica, messages under way included. Peers hold what it knows of them."""
        return {"estimate": self._reference} | {f"estimate_{to}": self._sent[to] for to in sorted(self._sent)}

    def tell(self, peers: Group, channel: Channel) -> None:
        """Tell the peers their estimates of this replica. All peers call."""
        told = peers.gather_objects(sorted(self._sent))
        sources = [source for source, targets in enumerate(told) if peers.index in targets]
        for source in sources:
            self._of(self._known, source, Span(0, 0))
        receives = [(self._known[source], source) for source in sources]
        channel.exchange([(estimate, to) for to, estimate in sorted(self._sent.items())], receives)

    def write(self, to: int, where: Span, out: Array) -> None:
        """Write the message to a peer about the elements `where` to `out`, and update the peer's estimate of them."""
        estimate, difference = self._of(self._sent, to, where), self._difference[: where.size]
        self._vector.difference(where, estimate, difference)
        ops = self._vector.device.ops
        ops.encode(self.format.kind, difference, out)
        self._add(out, estimate, where)

    def read(self, source: int, where: Span, message: Array) -> None:
        """Add a peer's message to the estimate of it."""
        self._add(message, self._of(self._known, source, where), where)

    def _add(self, message: Array, estimate: Array, where: Span) -> None:
        self._vector.device.ops.decode_add(self.format.kind, message, estimate)
        if self.format.kind == "sign":  # to which 0 is positive; no checkpoint has the gaps
            self._vector.clear_gaps(where, estimate)

    def approach(self, source: int, out: int | None, weight: float, where: Span) -> None:
        """Move towards `source` by as much as `out` moves away: the same peer, or with one-way messages the one that
        this rank has sent to. Nothing without a source."""
        if out is not None:
            known, sent = self._of(self._known, source, where), self._of(self._sent, out, where)
            self._vector.move(where, self._gamma * weight, known, sent)
