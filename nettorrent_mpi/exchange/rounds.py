"""Rounds of gossip: they send snapshots to peers, wait for theirs until a deadline, and accept late ones.

A round opens with a snapshot of a part of the vector, which is sent; it closes, one boundary later if messages overlap
with compute, by merging what has arrived. No rank waits for a partner longer than the deadline.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.mail import Arrived, Mail, Pending
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.exchange.merging import Deadline, FlowControl
from nettorrent_mpi.exchange.mixer import NUMBER, Mixer, Round
from nettorrent_mpi.plan.blocks import span
from nettorrent_mpi.plan.exchange_specs import Gossip
from nettorrent_mpi.plan.gossip_rules import LARGEST, receives
from nettorrent_mpi.plan.pairing import Pairing, draw_target
from nettorrent_mpi.plan.seeds import key

TAG = 5
FIRST_DEADLINE = 5.0  # seconds, before there are enough rounds for an automatic one


@dataclass
class Counts:
    """Counts of this rank's rounds since the start: rounds, messages merged in time and late, partners that were late
    (skipped), sends omitted because the previous one was not yet received, nanoseconds spent waiting, bytes sent."""

    rounds: int = 0
    merged: int = 0
    late: int = 0
    skipped: int = 0
    held_back: int = 0
    waited: int = 0
    bytes: int = 0


class Rounds:
    """The rounds of one rank with its peers."""

    def __init__(self, spec: Gossip, pairing: Pairing, peers: Group, mixer: Mixer, seed: int, parts: int):
        self._spec, self._pairing, self._peers, self._mixer, self._seed = spec, pairing, peers, mixer, seed
        self._me, self._count = peers.index, peers.size
        self.counts = Counts()
        self._round: Round | None = None
        self._patient = spec.deadline == "none"  # every message is merged in the round that expects it
        self._held: list[Arrived] = []  # from peers that are ahead, until a round expects them
        self._seen = [-1] * self._count  # the round of the last message of each source
        self._owed = [0] * self._count  # rounds that were closed without a message of this source, since its last one
        self._missed: dict[int, Round] = {}  # the first of these rounds, by source
        self._flow = FlowControl(self._count)
        self._deadline = Deadline(spec.deadline)
        self._sent: list[Array] = []  # see `sent_values`
        self.mail = self._divided(parts)

    @property
    def is_open(self) -> bool:
        """Whether a round is in progress."""
        return self._round is not None

    def _divided(self, parts: int) -> Mail:
        """Make the mail for messages about one of this number of parts."""
        mixer = self._mixer
        mixer.divide(max(parts, -(-mixer.length(mixer.vector.size) // LARGEST)))
        length = mixer.length(span(mixer.vector.size, mixer.parts, 0).size)
        return Mail(self._peers, mixer.vector.device, -(-length // 8) * 8, receives(self._pairing, self._me), TAG)

    def divide(self, parts: int) -> None:
        """Exchange this number of parts in turn from now on. All peers call, settled."""
        self.close_mail()
        self.mail = self._divided(parts)

    def close_mail(self) -> None:
        """Free all requests. All peers call, settled."""
        self.counts.bytes += self.mail.bytes
        self.mail.close()

    # -- opening a round --------------------------------------------------------------------------------------------

    def _takes_place(self, number: int, source: int, target: int) -> bool:
        """Draw with `probability` whether the message is sent; both ends draw the same, and a pair that exchanges draws
        once."""
        if self._spec.probability >= 1:
            return True
        pair = sorted((source, target)) if self._pairing.symmetric else (source, target)
        return random.Random(key(self._seed, "gossip", number, *pair)).random() < self._spec.probability

    def open(self, number: int) -> None:
        """Take the snapshot of a part and send it."""
        if self.mail.broken:
            return
        this = self._begin(number, self._mixer.clock, self._mixer.loss)
        if this is not None:
            self._send(this)
            self._round = this

    def _begin(self, number: int, clock: float, loss: float) -> Round | None:
        """Return this round, whose messages tell this age and loss of the model; None where it has no messages."""
        turn, part = divmod(number, self._mixer.parts)
        me, pairing = self._me, self._pairing
        expected = {i: w for i, w in pairing.receives(turn, me) if self._takes_place(number, i, me)}
        targets: dict[int, float] = {}
        for to, weight in pairing.sends(turn, me):
            if self._takes_place(number, me, to):
                free = self._free_target(to, turn)
                if free is None:
                    self.counts.held_back += 1
                else:
                    targets[free] = weight
        where = self._mixer.where(part)
        return (
            Round(number, part, where, time.perf_counter(), expected, targets, clock, loss)
            if expected or targets
            else None
        )

    def reopen(self, number: int, clock: float, loss: float, *, new: bool) -> None:
        """Open a round again that was open in a run that this one continues, without a deadline; none where the number
        is negative. All peers call.

        What it sent is the present values, if `new`, or in `sent_values`. Of compressed messages the estimates already
        know what they told.
        """
        this = self._round = self._begin(number, clock, loss) if number >= 0 else None
        if this is None:
            return
        if self._mixer.compresses:
            this.known = frozenset(this.expected)
            for source in this.expected:
                self._seen[source] = number
        else:
            self._send(this, None if new else self._sent)

    def standing(self) -> tuple[float, float, float]:
        """Return the number of the open round, or -1, and the age and loss of the model that were sent in it."""
        this = self._round
        return (-1.0, 0.0, 0.0) if this is None else (float(this.number), this.clock, this.loss)

    @property
    def scores(self) -> list[int]:
        """The scores of the peers."""
        return self._flow.scores

    def sent_values(self) -> list[Array]:
        """Return arrays of the vector's size, one for each of its layers, with what the open round has sent."""
        vector, this = self._mixer.vector, self._round
        if not self._sent:
            self._sent = [vector.device.zeros((vector.size,), vector.dtype) for _ in vector.layers]
        if this is not None and this.own is not None:
            self._mixer.take_out(this.own, this.where, self._sent)
        return self._sent

    def _free_target(self, to: int, turn: int) -> int | None:
        """Return `to` if it has received the last message; otherwise, with random pairing, another peer that has."""
        while self._patient and not self.mail.can_send(to):
            self._sort(self.mail.take())
            os.sched_yield()
        if self.mail.can_send(to):
            return to
        self._flow.timed_out(to)
        if self._pairing.kind == "random" and self._count > 2:
            other = draw_target(self._seed, turn, self._me, self._count, self._flow.scores)
            if other != to and self.mail.can_send(other):
                return other
        return None

    def _send(self, this: Round, values: Sequence[Array] | None = None) -> None:
        """Send the messages of a round: the present values, or these `sent_values`."""
        if not self._mixer.compresses:
            this.own = self.mail.letter()
            self._mixer.write(this.own, this, None, values)
            for to in this.targets:
                self.mail.send(this.own, to)
            return
        for to in this.targets:
            letter = self.mail.letter()
            self._mixer.write(letter, this, to)
            self.mail.send(letter, to)
            self.mail.put_back(letter)

    def attend(self) -> int:
        """Take in what has come, so that no peer waits for room while this rank waits for something else than a round;
        return how many rounds the furthest of those that send to this rank has opened."""
        self._sort(self.mail.take())
        return max(self._seen) + 1

    # -- closing a round --------------------------------------------------------------------------------------------

    def close(self, *, wait: bool) -> None:
        """Merge what has arrived; with `wait`, first wait until the deadline for the rest."""
        waiting = NOW.waiting
        before = waiting.nanoseconds
        with waiting:
            while True:
                self._sort(self.mail.take())
                this = self._round
                if this is None:
                    break
                missing = [source for source in this.expected if self._may_come(source, this)]
                if not missing or self.mail.broken or (wait and self._too_late(this, missing)):
                    self._finish(this)
                    break
                if not wait:
                    break
                os.sched_yield()
            if wait and self._patient:
                self.mail.see_off()
        self.counts.waited += waiting.nanoseconds - before

    def _may_come(self, source: int, this: Round) -> bool:
        """Whether to wait for a source's message of this round.

        Messages of one source arrive in the order of its rounds: a source that was seen in this round or a later one is
        ahead, and sends nothing more for it. This lets a rank that has fallen behind catch up.
        """
        return source not in this.got and self._seen[source] < this.number

    def _too_late(self, this: Round, missing: list[int]) -> bool:
        if self._patient:
            return False
        limit = self._deadline.seconds  # not forever while it is unknown: a sender may have omitted a round
        limit = FIRST_DEADLINE if limit is None else limit
        return time.perf_counter() >= this.began + limit * max(self._flow.patience(source) for source in missing)

    def _sort(self, arrived: list[Arrived]) -> None:
        """Assign messages that the open round expects to it, keep those of peers ahead, merge the others now."""
        self._held += arrived
        this, waiting = self._round, self._held
        self._held = []
        for message in waiting:
            source, number = message.source, int(message.letter.head[NUMBER])
            self._seen[source] = max(self._seen[source], number)
            now = this.number if this is not None else -1
            wanted = this is not None and source in this.expected and source not in this.got
            in_time = number == now if self._patient else number >= now or not self._owed[source]
            if this is not None and wanted and in_time:
                this.got[source] = message
                if self._owed[source]:  # its sender omitted the message that this rank skipped
                    self._owed[source] = 0
                    self._drop(self._missed.pop(source))
                continue
            if self._owed[source]:
                self._merge_owed(message)
            elif this is not None and number <= now:
                self._merge_late(message, 1)
            else:
                before = [] if self._patient else [m for m in self._held if m.source == source]
                for older in before:  # one message of each peer far ahead is kept
                    self._held.remove(older)
                    self._merge_late(older, 0)
                self._held.append(message)
        self._make_room()

    def _make_room(self) -> None:
        """Keep at least one receive posted, or peers could wait for each other."""
        while self.mail.is_full and self._held and not self._patient:
            self._merge_late(self._held.pop(0), 0)
        if self.mail.is_full:
            self._held = [self.mail.aside(message) for message in self._held]
        if self.mail.is_full and self._round is not None:
            self._round.got = {source: self.mail.aside(message) for source, message in self._round.got.items()}

    def _finish(self, this: Round) -> None:
        """Merge the round's messages in an order that does not depend on their arrival."""
        if len(this.got) == len(this.expected):  # a late message gives its time when it arrives
            self._deadline.add(time.perf_counter() - this.began)
        self._mixer.merge(this)
        for source, message in this.got.items():
            self._flow.succeeded(source)
            self.counts.merged += 1
            self.mail.release(message)
        for source in this.expected:
            if self._may_come(source, this):
                if not self._owed[source]:
                    self._missed[source] = this
                self._owed[source] += 1
                self._flow.timed_out(source)
                self.counts.skipped += 1
        self._round = None
        self._drop(this)

    def _drop(self, this: Round) -> None:
        """Release a closed round's snapshot when no late message can need it any more."""
        if this.own is not None and all(missed is not this for missed in self._missed.values()):
            self.mail.put_back(this.own)

    def _merge_owed(self, message: Arrived) -> None:
        """Merge a message that a round skipped: as if it had come in time, if it is that message and the part was not
        exchanged again in the meantime; otherwise with less weight."""
        source = message.source
        owed, self._owed[source] = self._owed[source], 0
        missed = self._missed.pop(source)
        self._deadline.add(
            message.when - missed.began
        )  # the time it took in the end: rounds may have become slower permanently
        if owed == 1:
            self._flow.came_late(source)
        if message.letter.head[NUMBER] == missed.number and owed < self._mixer.parts:
            self._merge_late(message, 0, missed)
        else:
            self._merge_late(message, owed)
        self._drop(missed)

    def _merge_late(self, message: Arrived, age: int, this: Round | None = None) -> None:
        """Merge a message that no open round expects, with less weight the older it is; but push-sum's mass and the
        estimates are always updated."""
        self._mixer.merge_late(message, this, age)
        self.counts.late += 1
        self.mail.release(message)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Set the open round aside inside the `with` block, once all of its messages have arrived. All peers call,
        after the same step, and wait. Only without a deadline."""
        self._sort(self.mail.settle())
        assert self.mail.broken or not self._held
        this, self._round = self._round, None
        yield
        self._round = this

    def settle(self) -> None:
        """Merge every message that was sent. All peers call, after the same step, and wait."""
        self._sort(self.mail.settle())
        if self._round is not None:
            self._finish(self._round)
        for message in self._held:
            self._merge_late(message, 0)
        self._held = []
        for source in list(self._missed):  # missing messages were never sent
            self._owed[source] = 0
            self._drop(self._missed.pop(source))


def await_peers(pending: Pending, rounds: Sequence[Rounds], opened: float = math.inf) -> bool:
    """Wait for the sums of all peers while their messages are taken in; return False as soon as one has opened more
    rounds than this rank's `opened`: it may wait for this rank's messages, or soon will."""
    while not pending.done():
        ahead = [each.attend() > opened for each in rounds]
        if any(ahead):
            return False
        os.sched_yield()
    return True
