"""Rules of gossip that a plan has to know: how long steps are, what of them is withheld, how many messages come."""

from __future__ import annotations

import math

from nettorrent_mpi.plan.exchange_specs import Gossip
from nettorrent_mpi.plan.pairing import Pairing
from nettorrent_mpi.plan.specs import Sgd, Spec

GROWTH = 0.4  # of a run
SELDOM = 2  # steps
LARGEST = 1 << 28  # bytes of a message, at most
SPARE = 4  # letters to send that there are at once: sends of several rounds overlap


def rate_factor(spec: Gossip, optimizer: Spec | None, replicas: int, done: float, decay: float) -> float:
    """Return what a replica multiplies the learning rate by, which is meant for the whole mini-batch. `done` is the
    part of the run that is done, from 0 to 1; `decay` what the schedule has made of the learning rate, from 1 to 0.

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
    if spec.rate_factor != "auto":
        return spec.rate_factor
    if optimizer is None or isinstance(optimizer, Sgd):
        return 1.0
    whole = min(math.sqrt(replicas) / decay**0.25, replicas) if decay > 0 else replicas
    return 1.0 + (whole - 1.0) * min(done / GROWTH, 1.0)


def withholding(spec: Gossip, replicas: int, parts: int) -> float:
    """Return the part of its own steps that a replica withholds from itself until peers know them; `parts` take turns.

    Until they are averaged, a replica stands beside the others' mean by its own steps, which have sqrt(replicas) times
    the noise of the mean's, and it finds its gradients there. With 1/sqrt(replicas) of the latest step it stands where
    that is no noisier than a step of the exact exchange; with 1/replicas it would be nearest to the mean, but lag
    behind it in what all steps have in common, and steps that are large for the curvature do not bear that. Where
    an element is exchanged more seldom than every SELDOM steps, nothing is withheld: replicas are apart by many steps
    then, and the parameters are many for the compute, so that going over all of them once more would be felt.
    """
    if spec.withhold != "auto":
        return spec.withhold
    period = parts * spec.every / spec.probability
    if period > SELDOM or (period == 1 and not spec.overlap):  # without overlap all is exchanged at once
        return 0.0
    return 1 - 1 / math.sqrt(replicas)


def receives(pairing: Pairing, me: int) -> int:
    """Return how many messages to peer `me` may arrive before one is read: so many receives it posts."""
    if pairing.period is None:  # partners are drawn, and more than a few seldom meet
        return min(2 * pairing.replicas, 8)
    sources = {source for i in range(pairing.period) for source, _ in pairing.receives(i, me)}
    return 2 * len(sources) + 1  # each can be in the open round and one ahead
