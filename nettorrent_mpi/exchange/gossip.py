"""Gossip: replicas average with few others at a time, by messages that travel while the next step computes.

A rank exchanges what it owns (its shards, `Vector`) with the same place in other replicas. A round goes over one part
of the vector; the parts take turns, and the pairing goes on when all have had theirs, so that every element meets the
same sequence of partners. exchange/rounds.py sends and waits, exchange/mixer.py merges, exchange/merging.py has the
formulas.
"""

from __future__ import annotations

import math
import time

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.comm.mail import Pending
from nettorrent_mpi.device.arrays import Array, aligned
from nettorrent_mpi.engine.state import State
from nettorrent_mpi.engine.tally import Tally
from nettorrent_mpi.engine.update import Exchange
from nettorrent_mpi.exchange.calibration import parts_that_hide
from nettorrent_mpi.exchange.merging import told_loss
from nettorrent_mpi.exchange.mixer import Mixer
from nettorrent_mpi.exchange.rounds import Rounds
from nettorrent_mpi.exchange.slow_momentum import SlowMomentum
from nettorrent_mpi.exchange.vector import Vector
from nettorrent_mpi.nn.optimizers import Optimizer
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.pairing import make_pairing
from nettorrent_mpi.plan.specs import Sgd, Spec

WARM_UP = 8  # rounds with small parts, before `part: auto` measures
SMALL = 1 << 14  # elements of these parts
GROWTH = 0.4  # of a run
SELDOM = 2  # steps


def rate_factor(choice: choices.Gossip, optimizer: Spec, replicas: int, done: float, decay: float) -> float:
    """What a replica multiplies the learning rate by, which is meant for the whole mini-batch. `done` is the part of
    the run that is done, from 0 to 1; `decay` what the schedule has made of the learning rate, from 1 to 0.

    Adam and its kin divide a step by the size of the gradients, most of which is noise, and a replica's part of the
    mini-batch has sqrt(replicas) times the noise of the whole. Averaged steps become as long, and as noisy, as those of
    the exact exchange when they are multiplied by that (the square-root rule of Malladi, Lyu, Panigrahi, Arora 2022,
    arXiv 2205.10287). In the beginning gradients are less noise than direction, and steps that are too long do lasting
    harm: the factor grows from 1 over the first part of a run, GROWTH (gradual warm-up: Goyal et al. 2017,
    arXiv 1706.02677). While steps are long, replicas also learn more slowly, because they find their gradients apart
    from each other. When the schedule makes them shorter, they catch up: the factor goes on growing, at most to the
    number of replicas. With the fourth root of the decay that is as gradual as was found best for CIFAR-10. Steps of
    SGD are as they should be without.
    """
    if choice.rate_factor != "auto":
        return choice.rate_factor
    if isinstance(optimizer, Sgd):
        return 1.0
    whole = min(math.sqrt(replicas) / decay**0.25, replicas) if decay > 0 else replicas
    return 1.0 + (whole - 1.0) * min(done / GROWTH, 1.0)


def withholding(choice: choices.Gossip, replicas: int, parts: int) -> float:
    """The part of its own steps that a replica does not compute with until others know them; so many parts take turns.

    Until they are averaged, a replica stands beside the others' mean by its own steps, which have sqrt(replicas) times
    the noise of the mean's, and it finds its gradients there. With 1/sqrt(replicas) of the latest step it stands where
    that is no noisier than a step of the exact exchange; with 1/replicas it would be nearest to the mean, but lag
    behind it in what all steps have in common, and steps that are large for the curvature do not bear that. Where
    an element is exchanged more seldom than every SELDOM steps, nothing is withheld: replicas are apart by many steps
    then, and the parameters are many for the compute, so that going over all of them once more would be felt.
    """
    if choice.withhold != "auto":
        return choice.withhold
    period = parts * choice.every / choice.probability
    if period > SELDOM or (period == 1 and not choice.overlap):  # without overlap all is exchanged at once
        return 0.0
    return 1 - 1 / math.sqrt(replicas)


class Gossip(Exchange):
    """The exchange of one rank with its column."""

    agrees = True

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
        self._choice, self._tally = choice, tally
        self._column = column.duplicate()
        self._losses = (
            everyone.duplicate() if isinstance(choice.mix, choices.LossMix | choices.LossDivergenceMix) else None
        )
        self._pending: Pending | None = None
        self.pairing = make_pairing(choice.pairing, column.size, seed)
        self._shards = [segment.params[segment.shard] for segment in state.segments]
        names = optimizer.states if "optimizer" in choice.average else ()
        memories = [[segment.optimizer[name] for segment in state.segments] for name in names]
        vector = Vector(self._shards, memories)
        self.mixer = Mixer(choice, self.pairing, vector)
        parts = -(-vector.size // SMALL) if choice.part == "auto" else round(1 / choice.part)
        self.rounds = Rounds(choice, self.pairing, self._column, self.mixer, seed, parts)
        self._decide_what_to_withhold()
        self._slow = SlowMomentum(choice.slow_momentum, self._shards) if choice.slow_momentum else None
        self._remembered: list[Array] = []  # masses, on their way from a checkpoint
        self._warming = choice.part == "auto"
        self._steps: list[float] = []  # seconds from boundary to boundary, while warming up
        self._last = 0.0
        if choice.overlap:
            self.progress = self._progress

    def _progress(self) -> None:
        """Between actions and layers. A thread for it was within 3 % (benchmarks/results/exchange.md), and would take a
        core that computes."""
        self.rounds.mail.progress()
        self._state.rings.progress()

    # -- a step's end -----------------------------------------------------------------------------------------------

    def hear(self, step: int) -> None:
        if self._warming and self._last:
            self._steps.append(time.perf_counter() - self._last)
        self.mixer.clock += 1
        if self._losses is not None:
            self._learn_loss()
        if self._withhold:  # what others know of is released before the next step is withheld
            self._merge(step)

    def agree(self, rate: float, step: int) -> None:
        if not self._withhold:  # messages may come until now
            self._merge(step)
        number, rest = divmod(step, self._choice.every)
        if rest == 0:
            self._do_round(number - 1, rate)
        self._last = time.perf_counter()

    def _merge(self, step: int) -> None:
        """Close the round that is under way; without overlap there is none."""
        if not self._choice.overlap:
            return
        if step % self._choice.every == 0:
            self.rounds.close(wait=True)
        elif self.rounds.is_open and self._choice.deadline != "none":  # which makes runs repeatable
            self.rounds.close(wait=False)

    def _do_round(self, number: int, rate: float) -> None:
        rounds = self.rounds
        rounds.open(number)
        if not self._choice.overlap:
            rounds.close(wait=True)
        rounds.counts.rounds += 1
        if self._warming and rounds.counts.rounds == WARM_UP:
            self._warming = False
            self._calibrate()
        if self._choice.exact_every is not None and (number + 1) % self._choice.exact_every == 0:
            self.settle()
            self.average(self._column)
            if self._slow is not None:
                self._slow.apply(rate)
            self.averaged()

    def _calibrate(self) -> None:
        """Choose the parts by what the links and this rank's steps are like. Every member of the column calls."""
        self.settle()
        if self.mixer.push_sum:  # masses are of the parts as they were
            self.average(self._column)
            self.averaged()
        seconds = sorted(self._steps)[len(self._steps) // 2] if self._steps else 0.0
        degree = max(len(self.pairing.sends(0, self._column.index)), 1)
        self.rounds.divide(parts_that_hide(self._column, self.mixer.vector, seconds * self._choice.every, degree))
        self._decide_what_to_withhold()

    def _decide_what_to_withhold(self) -> None:
        """For as many parts as there are now. Settled, so that nothing is withheld."""
        self._withhold = withholding(self._choice, self._column.size, self.mixer.parts)
        kept = [aligned(shard.size, shard.dtype) for shard in self._shards] if self._withhold else []
        for array in kept:
            array.fill(0)
        self._withheld = [*kept] or [None] * len(self._shards)
        self.mixer.vector.withhold(kept)

    def _learn_loss(self) -> None:
        """The loss of this replica's rows in the step before. Only its last stage knows it, so it is summed up."""
        assert self._losses is not None
        if self._pending is not None:
            loss, rows = self._pending.sums()
            if rows:
                self.mixer.loss = told_loss(float(loss / rows))
        self._pending = Pending(self._losses, self._tally.recent)
        self._tally.recent = (0.0, 0.0)

    # -- all together -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        self.rounds.settle()
        self.mixer.vector.release(Span(0, self.mixer.vector.size))
        for flat in self._state.flats:
            flat.share()
        self._last = 0.0

    def average(self, column: Group) -> None:
        """Running statistics, too: training does not read them, and a variance must not be merged by differences."""
        self.mixer.average(column)
        for flat in self._state.statistics:
            column.mean(flat.params[flat.shard])
            flat.share()

    def averaged(self) -> None:
        for memories in self.mixer.vector.layers[1:]:
            for array in memories:
                self._column.mean(array)
        self.mixer.averaged()
        self._remembered = []
        if self._slow is not None:
            self._slow.begin()

    def memories(self) -> dict[str, list[Array]]:
        """SlowMo's momenta and what the last average led to; with push-sum the mass of every parameter."""
        slow = self._slow
        found = {"slow_momentum": slow.momenta, "slow_before": slow.before} if slow is not None else {}
        if self.mixer.push_sum:
            sizes = np.cumsum([segment.counts[segment.group.index] for segment in self._state.segments])
            self._remembered = np.split(self.mixer.mass_of_elements()[: sizes[-1]], sizes[:-1])
            found["mass"] = self._remembered
        return found

    def recall(self, step: int) -> None:
        self.mixer.clock = float(step)
        if self._remembered:
            self.mixer.weigh(np.concatenate(self._remembered))
            self._remembered = []

    def figures(self) -> tuple[float, ...]:
        """Rounds, parts, messages merged in time and late, partners skipped, sends held back, seconds waited, bytes."""
        c, parts, sent = self.rounds.counts, self.mixer.parts, self.rounds.mail.bytes
        return (c.rounds, parts, c.merged, c.late, c.skipped, c.held_back, c.waited, c.bytes + sent)

    def close(self) -> None:
        self.rounds.close_mail()
        if self._pending is not None:
            self._pending.sums()
        for group in (self._column, self._losses):
            if group is not None:
                group.comm.Free()
