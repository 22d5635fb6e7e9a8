"""Gossip: replicas average with few others at a time, by messages that travel while the next step computes.

A rank exchanges what it owns (its shards, `Vector`) with the same place in other replicas. A round goes over one part
of the vector; the parts take turns, and the pairing goes on when all have had theirs, so that every element meets the
same sequence of partners. A round opens with a snapshot of the part, which is sent; it closes, one boundary later where
messages overlap with compute, by merging what has arrived:

    x += g * (theirs - mine at the time of sending)

With the pairing's own weights for g and everything in time, the sum over the replicas stays as it was to rounding, also
when steps were done in between (adding what was received, instead of moving by the difference, would lose a part of
these steps). Nobody waits for a partner longer than the deadline; messages that come later are merged with less weight.

Sources. dpwa: the factors (engine/merging.py). Push-sum: Kempe, Dobra, Gehrke 2003; Assran et al. 2019 (stochastic
gradient push), here in a form for overlap: with mass w, mass sent m and masses received m_j,
    w' = w - m + sum m_j,   w' x' = w x - m * (mine at the time of sending) + sum m_j x_j.
Compression: CHOCO-SGD (Koloskova, Stich, Jaggi 2019), with an estimate for each direction of each pair, which both ends
hold alike. SlowMo: Wang et al. 2020 (arXiv 1910.00643).
"""

from __future__ import annotations

import math
import os
import random
import time
from dataclasses import dataclass, field

import numpy as np

from nettorrent_mpi.comm.mail import Arrived, Letter, Mail, Pending
from nettorrent_mpi.comm.mpi import Group
from nettorrent_mpi.engine import choices
from nettorrent_mpi.engine.calibration import parts_that_hide
from nettorrent_mpi.engine.estimates import Estimates
from nettorrent_mpi.engine.exchange import Exchange
from nettorrent_mpi.engine.merging import Deadline, FlowControl, Peer, factor, merged_clock, told_loss
from nettorrent_mpi.engine.slow_momentum import SlowMomentum
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.tally import Tally
from nettorrent_mpi.engine.vector import Vector
from nettorrent_mpi.nn.backend import Array
from nettorrent_mpi.nn.optimizers import Optimizer
from nettorrent_mpi.nn.specs import Sgd, Spec
from nettorrent_mpi.plan.blocks import Span, owner, span
from nettorrent_mpi.plan.pairing import draw_target, make_pairing
from nettorrent_mpi.plan.seeds import key

TAG = 5
WARM_UP = 8  # rounds with small parts, before `part: auto` measures
SMALL = 1 << 14  # elements of these parts
FIRST_DEADLINE = 5.0  # seconds, before there are enough rounds to tell one
LARGEST = 1 << 28  # bytes of a message, at most
NUMBER, START, STOP, CLOCK, LOSS, MASS = range(6)  # the places in a message's head


def rate_factor(choice: choices.Gossip, optimizer: Spec, replicas: int) -> float:
    """What a replica multiplies the learning rate by, which is meant for the whole mini-batch.

    Adam and its kin divide a step by the size of the gradients, most of which is noise, and a replica's part of the
    mini-batch has sqrt(replicas) times the noise of the whole. Averaged steps become as long, and as noisy, as those of
    the exact exchange when they are multiplied by that (the square-root rule of Malladi, Lyu, Panigrahi, Arora 2022,
    arXiv 2205.10287). Steps of SGD are as they should be without.
    """
    if choice.rate_factor != "auto":
        return choice.rate_factor
    return 1.0 if isinstance(optimizer, Sgd) else math.sqrt(replicas)


@dataclass
class Counts:
    """What this rank did since the start: rounds, messages merged in time and late, partners that were late (skipped),
    sends left out because the last one was not taken yet, seconds spent waiting, bytes sent."""

    rounds: int = 0
    merged: int = 0
    late: int = 0
    skipped: int = 0
    held_back: int = 0
    waited: float = 0.0
    bytes: int = 0


@dataclass
class _Round:
    """A round that is open: which part, what was sent, from whom messages are expected, which have come."""

    number: int
    part: int
    where: Span
    began: float
    expected: dict[int, float]  # source -> weight
    targets: dict[int, float]  # to -> weight, of those that were sent to
    got: dict[int, Arrived] = field(default_factory=dict)
    own: Letter | None = None  # the snapshot; none with compression


class Gossip(Exchange):
    """The exchange of one rank with its column."""

    def __init__(
        self,
        everyone: Group,
        state: State,
        optimizer: Optimizer,
        clip_norm: float | None,
        choice: choices.Gossip,
        column: Group,
        tally: Tally,
        seed: int,
    ):
        super().__init__(everyone, state, optimizer, clip_norm)
        self._choice, self._tally, self._seed = choice, tally, seed
        self._column = column.duplicate()
        self._losses = everyone.duplicate() if isinstance(choice.mix, choices.Loss | choices.LossDivergence) else None
        self._me, self._count = column.index, column.size
        self.pairing = make_pairing(choice.pairing, self._count, seed)
        self._shards = [flat.params[flat.shard] for flat in state.flats]
        memories = [array for segment in state.segments for array in segment.optimizer.values()]
        self._memories = memories if "optimizer" in choice.average else []
        self._vector = Vector([*self._shards, *self._memories])
        self._push_sum = isinstance(choice.mix, choices.PushSum)
        self._estimates: Estimates | None = None
        if not isinstance(choice.compress, choices.Whole):
            self._estimates = Estimates(choice.compress, choice.gamma, self._vector)
        weights = [segment.params[segment.shard] for segment in state.segments]
        self._slow = SlowMomentum(choice.slow_momentum, weights) if choice.slow_momentum else None
        self.clock, self._loss = 0.0, float("nan")
        self._pending: Pending | None = None
        self._round: _Round | None = None
        self._patient = choice.deadline == "none"  # every message is merged in the round that expects it
        self._held: list[Arrived] = []  # from those who are ahead, until a round expects them
        self._owed = [0] * self._count  # rounds that were closed without a message of this source, since its last one
        self._missed: dict[int, _Round] = {}  # the first of these, by source
        self._flow = FlowControl(self._count)
        self._deadline = Deadline(choice.deadline)
        self._remembered: list[Array] = []  # masses, on their way from a checkpoint
        self.counts = Counts()
        self._warming = choice.part == "auto"
        self._steps: list[float] = []  # seconds from boundary to boundary, while warming up
        self._last = 0.0
        self._mail: Mail | None = None
        self._divide(-(-self._vector.size // SMALL) if choice.part == "auto" else round(1 / choice.part))
        if choice.overlap:
            self.progress = self._progress

    def _progress(self) -> None:
        self.mail.progress()

    @property
    def mail(self) -> Mail:
        assert self._mail is not None
        return self._mail

    def _divide(self, parts: int) -> None:
        """Exchange so many parts in turn from now on. All members of the column call, settled."""
        size, item = self._vector.size, self._vector.dtype.itemsize
        self.parts = max(min(max(parts, -(-size * item // LARGEST)), size), 1)
        largest = span(size, self.parts, 0).size
        length = self._estimates.codec.bytes(largest, self._vector.dtype) if self._estimates else largest * item
        rounds = range(self.pairing.period or 1)
        sources = {source for i in rounds for source, _ in self.pairing.receives(i, self._me)}
        if self._mail is not None:
            self.counts.bytes += self._mail.bytes
            self._mail.close()
        # Each source can be in the open round and one ahead. Where partners are drawn, more than a few seldom meet.
        receives = 2 * len(sources) + 1 if self.pairing.period is not None else min(2 * self._count, 8)
        self._mail = Mail(self._column, -(-length // 8) * 8, receives, TAG)
        self._masses = np.ones(self.parts)

    # -- a step's end -----------------------------------------------------------------------------------------------

    def agree(self, rate: float, step: int) -> None:
        if self._warming and self._last:
            self._steps.append(time.perf_counter() - self._last)
        self.clock += 1
        if self._losses is not None:
            self._learn_loss()
        number, rest = divmod(step, self._choice.every)
        if rest == 0:
            self._do_round(number - 1, rate)
        elif self._round is not None:
            self._close(wait=False)
        for flat in self._state.statistics:
            flat.share()
        self._last = time.perf_counter()

    def _do_round(self, number: int, rate: float) -> None:
        if self._choice.overlap:
            self._close(wait=True)
        self._open(number)
        if not self._choice.overlap:
            self._close(wait=True)
        self.counts.rounds += 1
        if self._warming and self.counts.rounds == WARM_UP:
            self._warming = False
            self.settle()
            if self._push_sum:  # masses are of the parts as they were
                self.average(self._column)
                self.averaged()
            seconds = sorted(self._steps)[len(self._steps) // 2] if self._steps else 0.0
            degree = max(len(self.pairing.sends(0, self._me)), 1)
            self._divide(parts_that_hide(self._column, self._vector, seconds * self._choice.every, degree))
        if self._choice.exact_every is not None and (number + 1) % self._choice.exact_every == 0:
            self.settle()
            self.average(self._column)
            if self._slow is not None:
                self._slow.apply(rate)
            self.averaged()

    def _learn_loss(self) -> None:
        """The loss of this replica's rows in the step before. Only its last stage knows it, so it is summed up."""
        assert self._losses is not None
        if self._pending is not None:
            loss, rows = self._pending.sums()
            if rows:
                self._loss = told_loss(float(loss / rows))
        self._pending = Pending(self._losses, self._tally.recent)
        self._tally.recent = (0.0, 0.0)

    # -- a round opens ----------------------------------------------------------------------------------------------

    def _takes_place(self, number: int, source: int, target: int) -> bool:
        """With `probability`; both ends draw the same, and a pair that exchanges draws once."""
        if self._choice.probability >= 1:
            return True
        pair = sorted((source, target)) if self.pairing.symmetric else (source, target)
        return random.Random(key(self._seed, "gossip", number, *pair)).random() < self._choice.probability

    def _open(self, number: int) -> None:
        """Take the snapshot of a part and send it."""
        turn, part = divmod(number, self.parts)
        me, pairing = self._me, self.pairing
        expected = {i: w for i, w in pairing.receives(turn, me) if self._takes_place(number, i, me)}
        targets: dict[int, float] = {}
        for to, weight in pairing.sends(turn, me):
            if self._takes_place(number, me, to):
                free = self._free_target(to, turn)
                if free is None:
                    self.counts.held_back += 1
                else:
                    targets[free] = weight
        if expected or targets:
            where = span(self._vector.size, self.parts, part)
            this = _Round(number, part, where, time.perf_counter(), expected, targets)
            self._send(this)
            self._round = this

    def _free_target(self, to: int, turn: int) -> int | None:
        """`to`, if it has taken the last message; with random pairing otherwise another one that has."""
        while self._patient and not self.mail.can_send(to):
            self._sort(self.mail.take())
            os.sched_yield()
        if self.mail.can_send(to):
            return to
        self._flow.timed_out(to)
        if self.pairing.kind == "random" and self._count > 2:
            other = draw_target(self._seed, turn, self._me, self._count, self._flow.scores)
            if other != to and self.mail.can_send(other):
                return other
        return None

    def _send(self, this: _Round) -> None:
        weights = set(this.targets.values())
        assert len(weights) <= 1, "all messages of a round carry the same mass"
        mass = self._masses[this.part] * max(weights, default=0.0)
        head = (this.number, *this.where, self.clock, self._loss, mass)
        if self._estimates is None:
            this.own = self._letter(head, this.where.size * self._vector.dtype.itemsize)
            self._vector.read(this.where, self._values(this.own))
            for to in this.targets:
                self.mail.send(this.own, to)
            return
        for to in this.targets:
            letter = self._letter(head, self._estimates.codec.bytes(this.where.size, self._vector.dtype))
            self._estimates.write(to, this.where, letter.body[: letter.length])
            self.mail.send(letter, to)
            self.mail.put_back(letter)

    def _letter(self, head: tuple[float, ...], length: int) -> Letter:
        letter = self.mail.letter()
        letter.head[: len(head)] = head
        letter.length = length
        return letter

    def _values(self, letter: Letter) -> Array:
        return letter.body[: letter.length].view(self._vector.dtype)

    # -- a round is closed ------------------------------------------------------------------------------------------

    def _close(self, *, wait: bool) -> None:
        """Merge what has arrived; `wait` until the deadline for what has not, and then go on without it."""
        began = time.perf_counter()
        while True:
            self._sort(self.mail.take())
            this = self._round
            if this is None:
                break
            missing = [source for source in this.expected if source not in this.got]
            if not missing or (wait and self._too_late(this, missing)):
                self._finish(this)
                break
            if not wait:
                break
            os.sched_yield()
        self.counts.waited += time.perf_counter() - began

    def _too_late(self, this: _Round, missing: list[int]) -> bool:
        if self._patient:
            return False
        limit = self._deadline.seconds  # not for ever where it is not known yet: a sender may have left a round out
        limit = FIRST_DEADLINE if limit is None else limit
        return time.perf_counter() >= this.began + limit * max(self._flow.patience(source) for source in missing)

    def _sort(self, arrived: list[Arrived]) -> None:
        """Messages that the open round expects go there; those from members ahead wait; the others are merged now."""
        self._held += arrived
        this, waiting = self._round, self._held
        self._held = []
        for message in waiting:
            source, number = message.source, message.letter.head[NUMBER]
            now = this.number if this is not None else -1
            wanted = this is not None and source in this.expected and source not in this.got
            in_time = number == now if self._patient else number >= now or not self._owed[source]
            if this is not None and wanted and in_time:
                this.got[source] = message
                if self._owed[source]:  # its sender left out what this rank went on without
                    self._owed[source] = 0
                    self._drop(self._missed.pop(source))
                continue
            if self._owed[source]:
                self._merge_owed(message)
            elif this is not None and number <= now:
                self._merge_late(message, 1)
            else:
                before = [] if self._patient else [m for m in self._held if m.source == source]
                for older in before:  # of who is far ahead one is kept
                    self._held.remove(older)
                    self._merge_late(older, 0)
                self._held.append(message)
        self._make_room()

    def _make_room(self) -> None:
        """There is always a receive posted, or members could wait for each other."""
        while self.mail.is_full and self._held and not self._patient:
            self._merge_late(self._held.pop(0), 0)
        if self.mail.is_full:
            self._held = [self.mail.aside(message) for message in self._held]
        if self.mail.is_full and self._round is not None:
            self._round.got = {source: self.mail.aside(message) for source, message in self._round.got.items()}

    def _finish(self, this: _Round) -> None:
        """Merge what the round has brought, in an order that does not depend on what came first."""
        if self._push_sum and this.targets:
            self._part_with_mass(this)
        if len(this.got) == len(this.expected):  # what was late tells its time when it comes
            self._deadline.add(time.perf_counter() - this.began)
        total = sum(this.expected.values())
        for source in sorted(this.got):
            message, weight = this.got[source], this.expected[source]
            self._merge(message, weight, weight / total, this, 0)
            self._flow.succeeded(source)
            self.counts.merged += 1
            self.mail.release(message)
        for source in this.expected:
            if source not in this.got:
                if not self._owed[source]:
                    self._missed[source] = this
                self._owed[source] += 1
                self._flow.timed_out(source)
                self.counts.skipped += 1
        self._round = None
        self._drop(this)

    def _drop(self, this: _Round) -> None:
        """A closed round's snapshot is needed no longer than it may be asked for."""
        if this.own is not None and all(missed is not this for missed in self._missed.values()):
            self.mail.put_back(this.own)

    def _merge_owed(self, message: Arrived) -> None:
        """From someone whose message a round went on without: as if it had come in time, if it is that message and the
        part was not exchanged again in the meantime; otherwise with less weight."""
        source = message.source
        owed, self._owed[source] = self._owed[source], 0
        missed = self._missed.pop(source)
        self._deadline.add(message.when - missed.began)  # what it took in the end: rounds may be slower for good
        if owed == 1:
            self._flow.came_late(source)
        if message.letter.head[NUMBER] == missed.number and owed < self.parts:
            weight = missed.expected[source]
            self._merge(message, weight, weight / sum(missed.expected.values()), missed, 0)
            self.counts.late += 1
            self.mail.release(message)
        else:
            self._merge_late(message, owed)
        self._drop(missed)

    def _merge_late(self, message: Arrived, age: int) -> None:
        """What no open round expects: with less weight the older it is; but mass is mass, and estimates are kept up."""
        self._merge(message, 0.5, 1.0, None, age)
        self.counts.late += 1
        self.mail.release(message)

    def _merge(self, message: Arrived, weight: float, share: float, this: _Round | None, age: int) -> None:
        """Merge one message: `weight` is the pairing's, `share` this source's among those of the round."""
        head, source = message.letter.head, message.source
        where = Span(int(head[START]), int(head[STOP]))
        same = this is not None and where == this.where
        if self._estimates is not None:
            self._estimates.read(source, where, message.letter.body[: message.letter.length])
            if this is not None and same:
                out = source if source in this.targets else next(iter(this.targets), None)
                self._estimates.approach(source, out, weight, where)
            return
        values = self._values(message.letter)
        if self._push_sum:
            self._take_mass(where, float(head[MASS]), values)
            return
        own = this.own if this is not None and same else None
        clock = self.clock if own is None else float(own.head[CLOCK])
        theirs = Peer(float(head[LOSS]), float(head[CLOCK]))
        mix = self._choice.mix
        if this is not None and not self.pairing.doubly_stochastic:  # those that arrived and this rank's own are alike
            weight = 1 / (len(this.got) + 1)
        g = factor(mix, self._choice.divergence_threshold, Peer(self._loss, clock), theirs, weight)
        if not isinstance(mix, choices.Constant) or mix.value is not None:  # f is for all sources together
            g *= share
        behind = max(clock - theirs.clock, 0.0) / self._choice.every
        g /= 1 + max(age, behind if behind > 1 else 0)
        self._vector.move(where, g, self._values(message.letter), None if own is None else self._values(own))
        self.clock = merged_clock(g * where.size / self._vector.size, self.clock, self.clock + theirs.clock - clock)

    def _part_with_mass(self, this: _Round) -> None:
        """Push-sum: what was sent away is not here any more. w x - m own = (w - m) x - m (own - x)."""
        assert this.own is not None
        sent = float(this.own.head[MASS]) * len(this.targets)
        left = float(self._masses[this.part]) - sent
        self._vector.move(this.where, -sent / left, self._values(this.own))
        self._masses[this.part] = left

    def _take_mass(self, where: Span, mass: float, values: Array) -> None:
        part = owner(self._vector.size, self.parts, where.start)
        total = float(self._masses[part]) + mass
        self._vector.move(where, mass / total, values)
        self._masses[part] = total

    # -- all together -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        if self._mail is None:
            return
        self._sort(self._mail.settle())
        if self._round is not None:
            self._finish(self._round)
        for message in self._held:
            self._merge_late(message, 0)
        self._held = []
        for source in list(self._missed):  # what has not come was never sent
            self._owed[source] = 0
            self._drop(self._missed.pop(source))
        for flat in self._state.flats:
            flat.share()
        self._last = 0.0

    def average(self, column: Group) -> None:
        """The mean over the replicas; with push-sum of what they weigh, which exchanges do not change."""
        totals = self._masses.copy()
        column.sum(totals)
        size = sum(shard.size for shard in self._shards)
        for part in range(self.parts):
            start, stop = span(self._vector.size, self.parts, part)
            self._vector.scale(Span(start, min(stop, size)), float(self._masses[part] / totals[part]))
        for shard in self._shards:
            column.sum(shard)

    def averaged(self) -> None:
        self._masses[...] = 1
        for array in self._memories:
            self._column.sum(array)
            np.multiply(array, 1 / self._column.size, out=array)
        if self._estimates is not None:
            self._estimates.begin()
        if self._slow is not None:
            self._slow.begin()

    def memories(self) -> dict[str, list[Array]]:
        """SlowMo's momenta; with push-sum the mass of every parameter (there are as many parts as there are now)."""
        found = {"slow_momentum": self._slow.momenta} if self._slow is not None else {}
        if self._push_sum:
            whole = np.empty(self._vector.size, self._vector.dtype)
            for part in range(self.parts):
                whole[slice(*span(whole.size, self.parts, part))] = self._masses[part]
            sizes = np.cumsum([segment.counts[segment.group.index] for segment in self._state.segments])
            self._remembered = np.split(whole[: sizes[-1]], sizes[:-1])
            found["mass"] = self._remembered
        return found

    def recall(self) -> None:
        if self._push_sum:
            whole = np.concatenate(self._remembered)
            for part in range(self.parts):
                inside = whole[slice(*span(self._vector.size, self.parts, part))]
                self._masses[part] = inside.mean() if inside.size else 1.0

    def figures(self) -> tuple[float, ...]:
        """Rounds, parts, messages merged in time and late, partners skipped, sends held back, seconds waited, bytes."""
        c, sent = self.counts, self._mail.bytes if self._mail is not None else 0
        return (c.rounds, self.parts, c.merged, c.late, c.skipped, c.held_back, c.waited, c.bytes + sent)

    def close(self) -> None:
        if self._mail is not None:
            self.counts.bytes += self._mail.bytes
            self._mail.close()
            self._mail = None
        if self._pending is not None:
            self._pending.sums()
        for group in (self._column, self._losses):
            if group is not None:
                group.comm.Free()
