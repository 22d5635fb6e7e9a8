"""Gossip: replicas average with few others at a time, by messages that travel while the next step computes.

A rank exchanges what it owns (its shards, `Vector`) with its peers, which own the same elements of other replicas. A
round covers one part of the vector; the parts take turns, and the pairing advances when all have had theirs, so that
every element has the same sequence of partners. exchange/rounds.py sends and waits, exchange/mixer.py merges,
exchange/merging.py has the formulas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from nettorrent_mpi.comm.channels import Channel
from nettorrent_mpi.comm.failures import lost, survivable
from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.device import Device
from nettorrent_mpi.exchange.base import Exchange, next_multiple
from nettorrent_mpi.exchange.calibration import parts_that_hide
from nettorrent_mpi.exchange.merging import told_loss
from nettorrent_mpi.exchange.mixer import Mixer
from nettorrent_mpi.exchange.replicas import Shards
from nettorrent_mpi.exchange.rounds import Rounds
from nettorrent_mpi.exchange.slow_momentum import SlowMomentum
from nettorrent_mpi.exchange.vector import Vector
from nettorrent_mpi.exchange.withheld import Withheld
from nettorrent_mpi.plan.blocks import Span
from nettorrent_mpi.plan.exchange_specs import Gossip, LossDivergenceMix, LossMix
from nettorrent_mpi.plan.gossip_rules import rate_factor
from nettorrent_mpi.plan.pairing import make_pairing
from nettorrent_mpi.plan.scores import Scores
from nettorrent_mpi.plan.specs import Spec

WARM_UP = 8  # rounds with small parts, before `part: auto` measures
SMALL = 1 << 14  # elements in each of these parts


class GossipExchange(Exchange):
    """One rank's gossip with its peers.

    It may withhold a part of its own latest steps (exchange/withheld.py), until peers know of it.
    """

    averages = True
    changes_after_update = True

    def __init__(
        self,
        spec: Gossip,
        shards: Shards,
        peers: Group,
        device: Device,
        channel: Channel | None,
        *,
        optimizer: Spec | None,
        seed: int,
        report_every: int,
    ):
        super().__init__(shards, peers, device, channel)
        self._spec, self._optimizer, self._report_every = spec, optimizer, report_every
        self.waits_for_peers = spec.deadline == "none"
        self.wants_loss = isinstance(spec.mix, LossMix | LossDivergenceMix) or spec.divergence_threshold > 0
        self.pairing = make_pairing(spec.pairing, peers.size, seed)
        memories = list(shards.optimizer.values()) if "optimizer" in spec.average else ()
        vector = Vector(device, shards.parameters, memories, shards.gaps)
        self.mixer = Mixer(spec, self.pairing, vector)
        parts = -(-vector.size // SMALL) if spec.part == "auto" else round(1 / spec.part)
        self.rounds = Rounds(spec, self.pairing, peers, self.mixer, seed, parts)
        self._withheld = Withheld(spec, peers.size, shards.parameters, vector, device)
        self._withheld.choose(self.mixer.parts)
        self._slow = SlowMomentum(spec.slow_momentum, shards.parameters, device) if spec.slow_momentum else None
        self._masses: Array | None = None  # masses of elements restored from a checkpoint
        self._open: tuple[int, float, float] | None = None  # the round to open again, from a checkpoint
        self._warming = WARM_UP if spec.part == "auto" else 0  # rounds until the parts are chosen
        self._seconds: list[float] = []  # seconds from boundary to boundary, while warming up
        self._last = 0.0
        self._steps = 0
        if spec.overlap:
            # A thread instead was within 3 % (benchmarks/results/exchange.md), and would take a core from compute.
            self.progress = self._progress

    def _progress(self) -> None:
        self.rounds.mail.progress()

    def rate_scale(self, done: float, decay: float) -> float:
        return rate_factor(self._spec, self._optimizer, self.count, done, decay)

    @property
    def measuring(self) -> bool:
        return self._warming > 0

    def next_rest(self, step: int) -> int | None:
        return None if self._spec.consensus is None else next_multiple(step, self._report_every)

    def is_collective(self, step: int) -> bool:
        """Whether the parts are chosen, or replicas average exactly."""
        number, rest = divmod(step, self._spec.every)
        exact = self._spec.exact_every
        return not rest and (self._warming == 1 or (exact is not None and number % exact == 0))

    def at_rest(
        self, step: int, compare: Callable[[], list[Scores] | None], distance: float | None = None
    ) -> Scores | None:
        limit = self._spec.consensus
        if limit is not None and distance is not None and distance > limit.max and step % self._report_every == 0:
            self.become()
        return None

    # -- rounds apart from steps ------------------------------------------------------------------------------------

    def open_round(self, step: int, loss: float) -> None:
        """Send the present values, this replica's age and its loss: for loops that call `close_round` after the
        optimizer's step, instead of `before_update` and `after_update`. A round that is still open is closed. Nothing
        may be withheld."""
        assert not self._withheld.part
        if self.rounds.is_open:
            self.rounds.close(wait=True)
        self.mixer.clock += 1
        self.tell_loss(loss)
        self.rounds.open(step - 1)
        self.rounds.counts.rounds += 1

    def close_round(self, loss: float) -> None:
        """Merge what has come of the open round, and wait for the rest until the deadline; this replica's loss now is
        `loss`."""
        self.tell_loss(loss)
        self.rounds.close(wait=True)

    # -- a step's end -----------------------------------------------------------------------------------------------

    def tell_loss(self, loss: float) -> None:
        self.mixer.loss = told_loss(loss)

    def before_update(self, step: int) -> None:
        if self._warming and self._last:
            self.device.synchronize()  # the step's compute is measured, not how soon the host has launched it
            self._seconds.append(time.perf_counter() - self._last)
        self.mixer.clock += 1
        if self._withheld.part:  # changes that peers know are released before a part of the next step is withheld
            self._merge(step)
            self._withheld.begin_step()

    def after_update(self, rate: float, step: int) -> None:
        if self._withheld.part:
            self._withheld.end_step()
        else:  # messages may arrive until now
            self._merge(step)
        self._steps += 1
        number, rest = divmod(step, self._spec.every)
        if rest == 0:
            self._do_round(number - 1, rate)
        self._last = time.perf_counter()

    def _merge(self, step: int) -> None:
        """Close the round in progress; without overlap there is none."""
        if not self._spec.overlap:
            return
        if step % self._spec.every == 0:
            self.rounds.close(wait=True)
        elif self.rounds.is_open and self._spec.deadline != "none":  # which makes runs reproducible
            self.rounds.close(wait=False)

    def _do_round(self, number: int, rate: float) -> None:
        rounds = self.rounds
        rounds.open(number)
        if not self._spec.overlap:
            rounds.close(wait=True)
        rounds.counts.rounds += 1
        if self._warming:
            self._warming -= 1
            if not self._warming:
                self._calibrate()
        if self._spec.exact_every is not None and (number + 1) % self._spec.exact_every == 0:
            self.settle()
            self._with_peers(lambda: self._average_exactly(rate))
            self.shards.gather()

    @property
    def broken(self) -> bool:
        return self.rounds.mail.broken

    def _with_peers(self, act: Callable[[], None]) -> None:
        """Let all peers do something in a step. If some are lost, this rank's shards are as before, and nothing is
        exchanged any more."""
        common = [array for arrays in self.common().values() for array in arrays]
        arrays = [*self.shards.weights, *self.shards.memories, *common] if survivable() else []
        with self._copies(arrays) as kept:
            try:
                if not self.broken:
                    act()
            except Exception as error:
                if not lost(error, self.peers):
                    raise
                self.rounds.mail.broken = True
                for copy, array in zip(kept, arrays, strict=True):
                    self.device.ops.copy(array, copy)

    def _average_exactly(self, rate: float | None = None) -> None:
        self.mixer.average(self.peers, self.channel)
        if self._slow is not None and rate is not None:
            self._slow.apply(rate)
        self.averaged()

    def _calibrate(self) -> None:
        """Choose the number of parts by measuring the links and this rank's steps. All peers call."""
        self.settle()
        if self.mixer.push_sum:  # masses belong to the former parts
            self._with_peers(self._average_exactly)
            self.shards.gather()
        self._with_peers(self._choose_parts)

    def _choose_parts(self) -> None:
        seconds = sorted(self._seconds)[len(self._seconds) // 2] if self._seconds else 0.0
        degree = max(len(self.pairing.sends(0, self.peers.index)), 1)
        self.rounds.divide(parts_that_hide(self.peers, self.mixer.vector, seconds * self._spec.every, degree))
        self._withheld.choose(self.mixer.parts)

    # -- at rest ----------------------------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        if not self.waits_for_peers:
            self.settle()
            yield
            return
        arrays = self._withheld.arrays
        with self.rounds.set_aside(), self._copies(arrays) as kept:
            self.settle()
            try:
                yield
                if kept:
                    self.shards.fence()
            finally:  # also where other replicas lose ranks
                for copy, array in zip(kept, arrays, strict=True):
                    self.device.ops.copy(array, copy)
            if kept:
                self.shards.gather()

    @contextmanager
    def shown(self, best: int | None = None) -> Iterator[None]:
        with self.paused(), super().shown(best):
            yield

    def release(self) -> None:
        self.mixer.vector.release(Span(0, self.mixer.vector.size))

    def settle(self) -> None:
        self.shards.fence()  # other holders may still copy what is merged into here
        self.rounds.settle()
        self.release()
        self.shards.gather()
        self._last = 0.0

    def average(self) -> None:
        """Average parameters and statistics. Statistics are averaged at rest only: training does not read them."""
        self.mixer.average(self.peers, self.channel)
        self.mean(self.shards.statistics)

    def averaged(self) -> None:
        for memories in self.mixer.vector.layers[1:]:
            self.mean(memories)
        self._withheld.forget()
        self.mixer.averaged()
        self._masses = None
        if self._slow is not None:
            self._slow.begin()

    def memories(self) -> dict[str, list[Array]]:
        """Return SlowMo's arrays; with push-sum the mass of every parameter; what is withheld; of compressed messages
        the peers' estimates of this replica; and what was sent in the open round, if it is older than this step.

        Where ranks are lost, replicas that go on take over what they have in common, and begin the rest anew. What is
        withheld has been released before. Masses: with those that were under way, or with the dead, the survivors' no
        longer say how often each is counted; and parameters are divided by theirs, so that they are right with any.
        Estimates: a message may have reached its end or not, so the two ends would differ; they begin with the
        survivors' average, and as a message tells what the estimate lacks, no change is lost. Scores and deadlines are
        measured again, with other neighbours.
        """
        found, vector = self.common(), self.mixer.vector
        if self.mixer.push_sum:
            self._masses = self.mixer.mass_of_elements()
            found["mass"] = vector.split(self._masses)
        if self._withheld.part:
            found["withheld"] = self._withheld.changes
        if self.mixer.estimates is not None:
            found |= {name: vector.split(whole) for name, whole in self.mixer.estimates.memories().items()}
        elif self._spec.overlap and self._spec.every > 1:
            found |= {f"sent_{i}": vector.split(whole) for i, whole in enumerate(self.rounds.sent_values())}
        return found

    def common(self) -> dict[str, list[Array]]:
        slow = self._slow
        return {} if slow is None else {"slow_momentum": slow.momenta, "slow_before": slow.before}

    def numbers(self) -> Array:
        """Return the parts and what remains of the warm-up, age and loss of the model, the open round (its number, and
        age and loss as they were sent), and of each peer the score, and whether it has an estimate of this replica."""
        own = [self.mixer.parts, self._warming, self.mixer.clock, self.mixer.loss, *self.rounds.standing()]
        estimates = self.mixer.estimates
        held = [estimates is not None and estimates.knows(peer) for peer in range(self.count)]
        return np.array([*own, *self.rounds.scores, *held], np.float64)

    def take_numbers(self, numbers: Array) -> None:
        parts, warming, clock, loss, number, sent_clock, sent_loss, *peers = numbers.tolist()
        if int(parts) != self.mixer.parts:
            self.rounds.divide(int(parts))
            self._withheld.choose(self.mixer.parts)
        self._warming, self.mixer.clock, self.mixer.loss = int(warming), clock, loss
        self.rounds.scores[:] = map(int, peers[: self.count])
        if self.mixer.estimates is not None:
            self.mixer.estimates.expect([peer for peer in range(self.count) if peers[self.count + peer]])
        self._open = int(number), sent_clock, sent_loss

    def recall(self, step: int) -> None:
        if self._masses is not None:
            self.mixer.weigh(self._masses)
            self._masses = None
        patient, every = self.waits_for_peers, self._spec.every
        if self._open is None:  # of another layout
            self.mixer.clock = float(step)
            if patient and self._spec.overlap and not self.mixer.compresses:
                # All replicas were in the round of the latest boundary. Its parts are of other elements now, so that
                # what was sent of them before would not do.
                self.rounds.reopen(step // every - 1, self.mixer.clock, self.mixer.loss, new=True)
            return
        if self.mixer.estimates is not None:
            self.mixer.estimates.tell(self.peers, self.channel)
        number, clock, loss = self._open
        if patient:
            self.rounds.reopen(number, clock, loss, new=step % every == 0)
        self._open = None

    def figures(self, ranks: Group) -> dict[str, Any]:
        """Return rounds, parts, messages merged in time and late, peers skipped, sends held back, waiting and bytes."""
        c, parts, steps = self.rounds.counts, self.mixer.parts, max(self._steps, 1)
        sent = (c.bytes + self.rounds.mail.bytes) / steps
        counts = np.array([c.rounds, parts, c.merged, c.late, c.skipped, c.held_back, c.waited / 1e9, sent], np.float64)
        ranks.mean(counts)
        rounds, parts, merged, late, skipped, held_back, waited, sent = counts.tolist()
        return {
            "rounds": round(rounds),
            "parts": round(parts, 1),
            "merged": round(merged, 1),
            "late": round(late, 1),
            "skipped": round(skipped, 1),
            "held_back": round(held_back, 1),
            "waited_seconds": round(waited, 3),
            "bytes_per_step": round(sent),
        }

    def abandon(self) -> None:
        self.rounds.mail.abandon()

    def close(self) -> None:
        self.rounds.close_mail()
