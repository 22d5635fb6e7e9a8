"""The arithmetic of merges: the weight of a peer's values, the score of its reliability, and the deadline of a round.

Numbers only; the pairing is in plan/pairing.py. Factors, merged clocks and scores are those of dpwa
(github.com/loudinthecloud/dpwa, dpwa.py, interpolation.py, conn.py), after Jin et al. 2016, "How to scale distributed
deep learning?" (arXiv 1611.04581).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from typing import Literal, NamedTuple

from nettorrent_mpi.plan.errors import ConfigError, UserError
from nettorrent_mpi.plan.exchange_specs import ClockMix, ConstantMix, LinearMix, LossDivergenceMix, LossMix
from nettorrent_mpi.plan.pairing import HIGHEST_SCORE, LOWEST_SCORE
from nettorrent_mpi.plan.specs import Spec

SUCCESS, TIMEOUT = 10, -100  # changes of a peer's score
WINDOW = 64  # past rounds that determine the automatic deadline
LEAST_ROUNDS = 8  # rounds before there is one
DEVIATIONS = 5  # with normally distributed round times, 1 in 2700 would be later


class Standing(NamedTuple):
    """A Standing is a replica's progress, which is sent with its parameters.

    `loss` is at least 0; math.nan while unknown, because no step was done, and math.inf once it diverged (see
    `told_loss`). `clock` is the age of the model in steps (fractional after merges, see `merged_clock`).
    """

    loss: float
    clock: float


def told_loss(loss: float | None) -> float:
    """Convert a loss for a `Standing`: None (unknown) becomes nan; a non-finite one, nan included, inf. Raises
    UserError for a loss below 0."""
    if loss is None:
        return math.nan
    if -math.inf < loss < 0.0:
        raise UserError(
            f"the loss is {loss:g}, and replicas compare losses of at least 0: add a constant to all of them"
        )
    return loss if math.isfinite(loss) else math.inf


def factor(mix: Spec, divergence_threshold: float, own: Standing, peer: Standing, weight: float) -> float:
    """Return the f, from 0 to 1, with which a replica merges a peer: param <- f * peer's + (1 - f) * param.

    With l, c and pl, pc the losses and clocks of oneself and the peer:

    constant         value, or without one `weight`, which the pairing gives the message
    clock            pc / (c + pc)
    loss             l / (l + pl)
    linear           from start at c = 0 to end at c = target, and end after that
    loss_divergence  l^2 / (l^2 + pl^2) * min(l / target, 1)

    0 / 0 counts as 1/2. Below a `divergence_threshold` above 0, f is multiplied by l / divergence_threshold, so that
    replicas that are nearly done go apart.

    Of two replicas of which one diverged, the other's parameters are worth everything, whatever the mix: f is 1 for the
    one that diverged and 0 for the other. If both did, their losses count as equal and large. A loss that is not known
    yet counts as equal to the other one in comparisons, and as large where it is compared with a number.

    Push-sum has no f.
    """
    assert all(not loss < 0.0 for loss in (own.loss, peer.loss)), (own, peer)  # nan may be
    if (own.loss == math.inf) != (peer.loss == math.inf):
        return 1.0 if own.loss == math.inf else 0.0
    f = _formula(mix, own, peer, weight)
    if own.loss < divergence_threshold:  # nan, the unknown one, is not
        f *= own.loss / divergence_threshold
    return f


def _formula(mix: Spec, own: Standing, peer: Standing, weight: float) -> float:
    if isinstance(mix, ConstantMix):
        return weight if mix.value is None else mix.value
    if isinstance(mix, ClockMix):
        return _share(peer.clock, own.clock)
    if isinstance(mix, LinearMix):
        return mix.start + (mix.end - mix.start) * min(own.clock / mix.target, 1.0)
    equal = not (math.isfinite(own.loss) and math.isfinite(peer.loss))
    if isinstance(mix, LossMix):
        return 0.5 if equal else _share(own.loss, peer.loss)
    assert isinstance(mix, LossDivergenceMix), mix
    part = 0.5 if equal else _share(own.loss, peer.loss, power=2)
    return part * (1.0 if math.isnan(own.loss) else min(own.loss / mix.target, 1.0))


def _share(a: float, b: float, power: int = 1) -> float:
    """Return a^power / (a^power + b^power), 1/2 where both are 0. Nothing overflows."""
    if a == b:
        return 0.5
    ratio = (min(a, b) / max(a, b)) ** power
    return (ratio if a < b else 1.0) / (1.0 + ratio)


def merged_clock(f: float, clock: float, peer_clock: float) -> float:
    """Return the age of a model that merged a peer with factor f."""
    return f * peer_clock + (1.0 - f) * clock


class FlowControl:
    """Scores the peers by how they answered: dpwa's flow control, from the view of one replica.

    `scores` has one for each replica, from 10 to 1000 (its own, too, which is not used): the form that
    plan.pairing.draw_target takes.
    """

    def __init__(self, replicas: int):
        self.scores = [HIGHEST_SCORE] * replicas

    def succeeded(self, peer: int) -> None:
        """Record that the peer's message came in time."""
        self._change(peer, SUCCESS)

    def timed_out(self, peer: int) -> None:
        """Record that the peer's message missed the deadline."""
        self._change(peer, TIMEOUT)

    def came_late(self, peer: int) -> None:
        """Record that the message came after the deadline, but before the next one was due: the peer is alive, only out
        of step. It regains what it lost."""
        self._change(peer, -TIMEOUT)

    def patience(self, peer: int) -> float:
        """Return the part of the deadline to wait for this peer: 0 with the lowest score, 1 with the highest."""
        return (self.scores[peer] - LOWEST_SCORE) / (HIGHEST_SCORE - LOWEST_SCORE)

    def _change(self, peer: int, by: int) -> None:
        self.scores[peer] = min(max(self.scores[peer] + by, LOWEST_SCORE), HIGHEST_SCORE)


class Deadline:
    """The Deadline limits the time of a round: a number of milliseconds, "none" (no limit), or "auto".

    The automatic one is the median of the last WINDOW rounds' times plus DEVIATIONS times their median absolute
    deviation: neither is moved by a few stragglers. With fewer than LEAST_ROUNDS there is none, because the first
    rounds, which set up connections and touch memory for the first time, are not typical.
    """

    def __init__(self, limit: float | Literal["auto", "none"]):
        if not isinstance(limit, str) and not 0.0 <= limit < math.inf:
            text = f'{limit} is not a number of milliseconds of at least 0; or write "auto" or "none"'
            raise ConfigError(text, key="exchange.gossip.deadline")
        assert not isinstance(limit, str) or limit in {"auto", "none"}, limit
        self._auto = limit == "auto"
        self._seconds = None if isinstance(limit, str) else limit / 1000.0
        self._times: deque[float] = deque()
        self._sorted: list[float] = []
        self._changed = False

    def add(self, seconds: float) -> None:
        """Record a round's time. For a late round it is the time that it took in the end: if the deadline stood for it,
        rounds that became slower permanently would stay late forever."""
        assert 0.0 <= seconds < math.inf, seconds
        if not self._auto:
            return
        if len(self._times) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._times.popleft())]
        self._times.append(seconds)
        insort(self._sorted, seconds)
        self._changed = True

    @property
    def seconds(self) -> float | None:
        """Return the deadline in seconds after the start of a round; None: no limit."""
        if self._changed and len(self._sorted) >= LEAST_ROUNDS:
            middle = _median(self._sorted)
            # falls, then rises: sorts in one pass
            deviations = sorted(abs(seconds - middle) for seconds in self._sorted)
            self._seconds = middle + DEVIATIONS * _median(deviations)
            self._changed = False
        return self._seconds


def _median(ordered: list[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else 0.5 * (ordered[half - 1] + ordered[half])
