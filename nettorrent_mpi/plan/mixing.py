"""Mixing matrices show how fast a pairing's rounds make the replicas agree: spectral gaps, rounds to consensus.

A round is a matrix W: the new values are W times the old ones. W[target][source] is the weight of a message, W[i][i]
what replica i keeps. So columns sum to 1, and the sum of all values is preserved. In a doubly stochastic pairing rows
sum to 1, too; in `random` they do not, and a replica's estimate is its value divided by its mass, which starts at 1 and
is mixed like a value (push-sum).
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from itertools import product

from nettorrent_mpi.plan.pairing import Pairing, torus
from nettorrent_mpi.plan.seeds import key

MOST_ROUNDS = 100_000
_STARTS = 4  # random starting vectors, of which the worst counts
_ROUNDING = 1e-12  # anything below is 0 up to rounding


def mixed(pairing: Pairing, number: int, values: Sequence[float]) -> list[float]:
    """Return W of round `number` times `values`, one for each replica."""
    result = list(values)
    for source, target, weight in pairing.edges(number):
        part = weight * values[source]
        result[target] += part
        result[source] -= part
    return result


def spectral_gap(pairing: Pairing) -> float:
    """Return 1 minus what a round leaves, in the worst case, of the replicas' distance from their mean; from 0 to 1.

    All in closed form. Periodic pairings: a period leaves s, the second largest singular value of the product of its
    matrices, and a round s^(1/period). Rings and grids have the eigenvalues of a torus. The product of the exponential
    rounds is a circulant matrix with the singular values |cos(x) cos(2x) cos(4x) ...|, x = pi k / n, which is
    |sin(2^period x) / (2^period sin(x))|. The others give the average exactly: 1.

    Drawn pairings: the root of what a round is expected to leave of the squared length of a vector whose sum is 0, the
    same for every such vector. A shuffle leaves (n - 2) / (2 (n - 1)), or 1/2 where n is odd; random leaves
    (n - 2) (2n - 3) / (4 (n - 1)^2), reasoned like Kempe et al. 2003 for push-sum, but nobody sends to itself.
    """
    n, period = pairing.replicas, pairing.period
    if period is None:
        if pairing.kind == "random":
            kept = (n - 2) * (2 * n - 3) / (4 * (n - 1) ** 2)
        else:
            kept = 0.5 if n % 2 else (n - 2) / (2 * (n - 1))
        return 1 - math.sqrt(kept)
    if _is_torus(pairing):
        s = max(map(abs, _torus_eigenvalues(torus(pairing.kind, n))))
    elif pairing.kind == "exponential" and n & (n - 1):
        steps = 1 << period
        s = max(abs(math.sin(math.pi * (steps * k % n) / n)) / (steps * math.sin(math.pi * k / n)) for k in range(1, n))
    else:
        s = 0.0
    return 1 - s ** (1 / period) if s > _ROUNDING else 1.0


def rounds_to_consensus(pairing: Pairing, to: float = 1e-3) -> int | None:
    """Return the rounds until the distance from the mean has fallen to `to` times its initial value; None: more than
    MOST_ROUNDS.

    It is taken for the worst of a few starting vectors with normally distributed elements, drawn from the pairing's
    seed. `finite` takes its period, whatever `to`. Rings and grids, the slow ones, are computed from their eigenvalues
    (a vector's coordinates in the eigenvectors are normally distributed, too); the others are simulated, with push-sum.
    """
    assert _ROUNDING <= to < 1, to
    n = pairing.replicas
    if n == 1:
        return 0
    if pairing.kind in {"finite", "complete"}:
        return pairing.period
    generators = [random.Random(key(pairing.seed, "consensus", start)) for start in range(_STARTS)]
    if not _is_torus(pairing):
        return _tried_out(pairing, to, [[generator.gauss() for _ in range(n)] for generator in generators])
    eigenvalues = _torus_eigenvalues(torus(pairing.kind, n))
    starts = [[generator.gauss() for _ in eigenvalues] for generator in generators]

    def near(rounds: int) -> bool:
        factors = [value**rounds for value in eigenvalues]
        return all(math.hypot(*map(_times, factors, start)) <= to * math.hypot(*start) for start in starts)

    rounds = bisect_left(range(MOST_ROUNDS + 1), True, key=near)
    return rounds if rounds <= MOST_ROUNDS else None


def _times(a: float, b: float) -> float:
    return a * b


def _is_torus(pairing: Pairing) -> bool:
    return pairing.kind in {"ring", "grid"} and pairing.replicas > 1


def _torus_eigenvalues(sides: tuple[int, ...]) -> list[float]:
    """Return all but that of the mean, in no order. All weights are 1 / (neighbours + 1); on a side of two, one
    neighbour."""
    counts = [2 if side > 2 else 1 for side in sides]
    waves = [
        [count * math.cos(2 * math.pi * k / side) for k in range(side)]
        for side, count in zip(sides, counts, strict=True)
    ]
    return [(1 + sum(parts)) / (1 + sum(counts)) for parts in product(*waves)][1:]


def _tried_out(pairing: Pairing, to: float, starts: list[list[float]]) -> int | None:
    means = [math.fsum(values) / len(values) for values in starts]
    goals = [to * math.dist(values, [mean] * len(values)) for values, mean in zip(starts, means, strict=True)]
    mass = [1.0] * pairing.replicas
    for number in range(MOST_ROUNDS):
        mass = mixed(pairing, number, mass)
        starts = [mixed(pairing, number, values) for values in starts]
        if all(
            math.hypot(*(value / share - mean for value, share in zip(values, mass, strict=True))) <= goal
            for values, mean, goal in zip(starts, means, goals, strict=True)
        ):
            return number + 1
    return None
