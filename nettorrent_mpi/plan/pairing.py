"""A pairing determines which replicas exchange with which in each round of gossip averaging.

All of it follows from (kind, number of replicas, seed, round number): every replica computes by itself whom it sends to
and receives from, without asking. plan/mixing.py computes how fast the replicas agree.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field
from functools import lru_cache
from typing import NamedTuple

from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.seeds import key

Shares = list[tuple[int, float]]  # (replica, weight)
Pair = tuple[int, int, float]  # two replicas that exchange, each taking `weight` of the other's

LOWEST_SCORE, HIGHEST_SCORE = 10, 1000  # of a peer, in dpwa's flow control
_SOME_ROUNDS = 8  # drawn rounds that are cached: those in progress


class Edge(NamedTuple):
    """One message of a round: the target's new value takes `weight` of the source's; the rest is its own.

    In the kind `random` several may arrive, or none: `weight` is the share of its value and of its mass that the source
    sends away (push-sum).
    """

    source: int
    target: int
    weight: float


@dataclass(frozen=True)
class Pairing:
    """A Pairing gives who exchanges with whom; made by `make_pairing`. Rounds count from 0, replicas from 0 to
    `replicas` - 1."""

    kind: str
    replicas: int
    seed: int  # used by drawn pairings only
    period: int | None  # rounds after which it repeats; None: drawn anew each time
    symmetric: bool  # in every round whoever sends to j also receives from j, with the same weight
    doubly_stochastic: bool  # rows and columns of every round's matrix sum to 1: the average is kept
    _edges: dict[int, tuple[Edge, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def edges(self, number: int) -> tuple[Edge, ...]:
        """Return the messages of round `number`, sorted; no two have the same source and target.

        Cached: all rounds of a periodic pairing, the latest ones of another. `complete` has replicas^2 of them; a
        replica that needs only its own should call `sends` and `receives`.
        """
        number = self._reduced(number)
        if number not in self._edges:
            if self.period is None and len(self._edges) >= _SOME_ROUNDS:
                self._edges.clear()
            everybody = range(self.replicas)
            self._edges[number] = tuple(sorted(Edge(i, to, w) for i in everybody for to, w in self.sends(number, i)))
        return self._edges[number]

    def sends(self, number: int, replica: int) -> Shares:
        """Return (to, weight) of the messages that `replica` sends in round `number`."""
        assert 0 <= replica < self.replicas, f"replica {replica} of {self.replicas}"
        return _SENDS[self.kind](self, self._reduced(number), replica) if self.replicas > 1 else []

    def receives(self, number: int, replica: int) -> Shares:
        """Return (from, weight) of the messages that `replica` receives in round `number`."""
        if self.symmetric:
            return self.sends(number, replica)
        assert 0 <= replica < self.replicas, f"replica {replica} of {self.replicas}"
        number = self._reduced(number)
        if self.kind == "exponential":
            return [((replica - (1 << number)) % self.replicas, 0.5)]
        assert self.kind == "random"
        drawn = _drawn(self.seed, number, self.replicas)
        return [(source, 0.5) for source, target in enumerate(drawn) if target == replica]

    def _reduced(self, number: int) -> int:
        assert number >= 0, f"round {number}"
        return number if self.period is None else number % self.period


def possible(replicas: int) -> list[str]:
    """Return the kinds of pairing that this number of replicas allows."""
    return [kind for kind in KINDS if _obstacle(kind, replicas) is None]


def make_pairing(kind: str, replicas: int, seed: int) -> Pairing:
    """Make the pairing of that kind, each replica's value being mixed in a round as the weights say.

    ring         with both neighbours, 1/3 each
    exponential  in round t to the replica 2^t further on, 1/2: the one-peer exponential graph (Ying et al. 2021, arXiv
                 2110.13363); the average of all after log2(replicas) rounds where that is whole
    hypercube    in round t with the replica whose number differs in bit t, 1/2; a power of two replicas
    shuffle      in pairs drawn anew each round, 1/2; with an odd number one is left over
    random       half of what a replica has to one drawn by itself; keeps the average only if mass is sent, too
                 (push-sum: Kempe et al. 2003, "Gossip-based computation of aggregate information")
    complete     with all, 1/replicas
    grid         with the neighbours on a torus as square as can be, 1/(neighbours + 1)
    finite       with one at most, so that a period gives the average of all, whatever the number: the Base-2 graph
                 (Takezawa et al. 2023, arXiv 2305.11420)

    One replica has no messages. With two there is nothing to draw: shuffle and random are the exact average then.
    Raises ConfigError (exchange.gossip.pairing) where the number of replicas does not allow the kind.
    """
    assert replicas >= 1, replicas
    where = "exchange.gossip.pairing"
    if kind not in KINDS:
        raise ConfigError(f"unknown pairing {kind!r}; there are {', '.join(KINDS)}", key=where)
    obstacle = _obstacle(kind, replicas)
    if obstacle is not None:
        can = ", ".join(possible(replicas))
        raise ConfigError(f"{kind} {obstacle}, not {replicas}; {replicas} replicas can have {can}", key=where)
    drawn = kind in {"shuffle", "random"} and replicas > 2
    period = {"exponential": (replicas - 1).bit_length(), "hypercube": replicas.bit_length() - 1}.get(kind, 1)
    if kind == "finite":
        period = len(_finite_rounds(replicas))
    return Pairing(
        kind,
        replicas,
        seed,
        period=None if drawn else max(1, period),
        symmetric=kind not in {"exponential", "random"} or replicas <= 2,
        doubly_stochastic=kind != "random" or replicas <= 2,
    )


def draw_target(seed: int, number: int, replica: int, replicas: int, scores: Sequence[float] | None = None) -> int:
    """Draw whom `replica` sends to in round `number` of the kind `random`: never itself.

    The peer with the highest sum of its score and a random number from 10 to 1000, as in dpwa's flow control
    (github.com/loudinthecloud/dpwa, conn.py): a peer with a low score is drawn seldom, but not never. `scores`: one for
    each replica (its own is ignored), from 10 to 1000, higher for those who answer in time; None: all equal. With equal
    scores the draw depends on (seed, number, replica) only, so that any rank can repeat it; with others it differs from
    that one only where a score makes it.
    """
    assert replicas >= 2
    assert 0 <= replica < replicas
    generator = random.Random(key(seed, "pairing", "random", number, replica))
    # Each of several independent random numbers is equally likely to be the highest: one draw decides.
    favourite = int(generator.random() * (replicas - 1))
    if scores is not None:
        assert len(scores) == replicas, f"{len(scores)} scores, {replicas} replicas"
        others = [*scores[:replica], *scores[replica + 1 :]]
        if min(others) < max(others):
            chances = [generator.uniform(LOWEST_SCORE, HIGHEST_SCORE) for _ in others]
            best = chances.index(max(chances))
            chances[best], chances[favourite] = chances[favourite], chances[best]
            favourite = max(range(len(others)), key=lambda i: others[i] + chances[i])
    return favourite + (favourite >= replica)


def torus(kind: str, replicas: int) -> tuple[int, ...]:
    """Return the sides of the torus of a ring (one side) or a grid (rows, cols; as square as can be)."""
    return (replicas,) if kind == "ring" else _grid_sides(replicas)


@lru_cache
def _grid_sides(replicas: int) -> tuple[int, int]:
    rows = next(rows for rows in range(math.isqrt(replicas), 0, -1) if replicas % rows == 0)
    return rows, replicas // rows


def _obstacle(kind: str, replicas: int) -> str | None:
    """Return the requirement of the kind that this number of replicas does not meet."""
    if kind == "hypercube" and replicas & (replicas - 1):
        return "takes a power of two replicas"
    if kind == "grid" and replicas > 1 and min(torus("grid", replicas)) < 2:
        return "takes a number of replicas that is rows x cols, at least 2 of each"
    return None


# -- the messages of a replica in a round, by kind ---------------------------------------------------------------------


def _on_torus(pairing: Pairing, number: int, replica: int) -> Shares:
    neighbours, stride = [], 1
    for side in reversed(torus(pairing.kind, pairing.replicas)):
        place = replica // stride % side
        # on a side of two, the next and the one before are the same
        neighbours += [replica + ((place + step) % side - place) * stride for step in ((1, -1) if side > 2 else (1,))]
        stride *= side
    return [(to, 1 / (len(neighbours) + 1)) for to in neighbours]


def _exponential(pairing: Pairing, number: int, replica: int) -> Shares:
    return [((replica + (1 << number)) % pairing.replicas, 0.5)]


def _hypercube(pairing: Pairing, number: int, replica: int) -> Shares:
    return [(replica ^ (1 << number), 0.5)]


def _shuffle(pairing: Pairing, number: int, replica: int) -> Shares:
    partner = _shuffled(pairing.seed, number, pairing.replicas)[replica]
    return [(partner, 0.5)] if partner != replica else []


@lru_cache(_SOME_ROUNDS)
def _shuffled(seed: int, number: int, replicas: int) -> tuple[int, ...]:
    """Return each replica's partner; a replica that is left over is its own."""
    generator = random.Random(key(seed, "pairing", "shuffle", number))
    order = sorted(range(replicas), key=[generator.random() for _ in range(replicas)].__getitem__)
    partner = list(range(replicas))
    for a, b in zip(order[::2], order[1::2], strict=False):
        partner[a], partner[b] = b, a
    return tuple(partner)


def _random(pairing: Pairing, number: int, replica: int) -> Shares:
    return [(_drawn(pairing.seed, number, pairing.replicas)[replica], 0.5)]


@lru_cache(_SOME_ROUNDS)
def _drawn(seed: int, number: int, replicas: int) -> tuple[int, ...]:
    return tuple(draw_target(seed, number, replica, replicas) for replica in range(replicas))


def _complete(pairing: Pairing, number: int, replica: int) -> Shares:
    return [(to, 1 / pairing.replicas) for to in range(pairing.replicas) if to != replica]


def _finite(pairing: Pairing, number: int, replica: int) -> Shares:
    share = _finite_rounds(pairing.replicas)[number].get(replica)
    return [] if share is None else [share]


_SENDS: dict[str, Callable[[Pairing, int, int], Shares]] = {
    "ring": _on_torus,
    "exponential": _exponential,
    "hypercube": _hypercube,
    "shuffle": _shuffle,
    "random": _random,
    "complete": _complete,
    "grid": _on_torus,
    "finite": _finite,
}
KINDS: tuple[str, ...] = tuple(_SENDS)


# -- the Base-2 graph --------------------------------------------------------------------------------------------------


@lru_cache(_SOME_ROUNDS)
def _finite_rounds(replicas: int) -> tuple[dict[int, tuple[int, float]], ...]:
    """Return the rounds of the Base-2 graph (Takezawa et al. 2023, algorithm 3 with k = 1): replica -> (its partner,
    weight).

    With replicas = 2^a q, q odd: first 2^a blocks of q each agree within themselves, then hypercubes across the blocks
    finish. That takes a rounds for q = 1, a + 2 floor(log2 q) + 1 otherwise: never more than 2 log2(replicas) + 1.
    """
    blocks = replicas & -replicas
    size = replicas // blocks
    rounds = [
        [(first + a, first + b, weight) for first in range(0, replicas, size) for a, b, weight in pairs]
        for pairs in _odd_rounds(size)
    ]
    rounds += [
        [pair for i in range(size) for pair in _cube(range(i, replicas, size), bit)]
        for bit in range(blocks.bit_length() - 1)
    ]
    return tuple({x: (y, weight) for a, b, weight in pairs for x, y in ((a, b), (b, a))} for pairs in rounds)


def _odd_rounds(count: int) -> list[list[Pair]]:
    """Return the rounds of the simple Base-2 graph (algorithm 2 with k = 1) of an odd number of replicas.

    They are split into groups of different powers of two, the largest first. Each group agrees on its own average. Then
    group after group exchanges with all that follow, each of which has a partner in it: with the weight
    |group| / |group and followers| the followers' average, and so the group's, becomes that of all. A group that has
    done so averages its members again.
    """
    if count == 1:
        return []
    powers = [p for p in reversed(range(count.bit_length())) if count >> p & 1]
    starts = [sum(1 << p for p in powers[:i]) for i in range(len(powers))]
    groups = [(range(start, start + (1 << p)), p) for start, p in zip(starts, powers, strict=True)]
    top = powers[0]
    # A small group would be done earlier; repeating costs no time and mixes what was learned meanwhile.
    rounds = [[pair for group, p in groups if p for pair in _cube(group, t % p)] for t in range(top)]
    for t in range(top + 1):
        pairs: list[Pair] = []
        for i, (group, p) in enumerate(groups):
            followers = range(group.stop, count)
            if i == t and followers:
                weight = len(group) / (len(group) + len(followers))
                pairs += [(a, b, weight) for a, b in zip(followers, group, strict=False)]
                idle = group[len(followers) :]
                pairs += [(a, b, 0.5) for a, b in zip(idle[::2], idle[1::2], strict=False)]
            elif i <= t and p:
                pairs += _cube(group, t % p)
        rounds.append(pairs)
    return rounds


def _cube(members: range, bit: int) -> Iterator[Pair]:
    """Yield pairs of members whose places differ in this bit; a power of two of them."""
    for place in range(len(members)):
        if not place >> bit & 1:
            yield members[place], members[place | 1 << bit], 0.5
