"""Rules of gossip that a plan needs: the learning-rate factor, the withheld part of steps, the number of messages."""

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
    """Return the factor on a replica's learning rate, which is set for the whole mini-batch. `done` is the completed
    part of the run, from 0 to 1; `decay` what the schedule has made of the learning rate, from 1 to 0.

    Adam and its relatives divide a step by the size of the gradients, most of which is noise, and a replica's part of
    the mini-batch has sqrt(replicas) times the noise of the whole. Averaged steps become as long, and as noisy, as
    those of the exact exchange when they are multiplied by that (the square-root rule of Malladi, Lyu, Panigrahi, Arora
    2022, arXiv 2205.10287). At the start gradients are less noise than direction, and steps that are too long do
    lasting harm: the factor grows from 1 over the first part of a run, GROWTH (gradual warm-up: Goyal et al. 2017,
    arXiv 1706.02677). While steps are long, replicas also learn more slowly, because they compute their gradients away
    from each other. When the schedule shortens the steps, they catch up: the factor goes on growing, at most to the
    number of replicas. The fourth root of the decay is the growth that was found best for CIFAR-10. SGD needs no
    factor.
    """
    if spec.rate_factor != "auto":
        return spec.rate_factor
    if optimizer is None or isinstance(optimizer, Sgd):
        return 1.0
    whole = min(math.sqrt(replicas) / decay**0.25, replicas) if decay > 0 else replicas
    return 1.0 + (whole - 1.0) * min(done / GROWTH, 1.0)


def withholding(spec: Gossip, replicas: int, parts: int) -> float:
    """Return the part of its own steps that a replica withholds from itself until peers know them; `parts` take turns.

    Until they are averaged, a replica's own steps keep it away from the others' mean, with sqrt(replicas) times the
    noise of the mean's steps, and it computes its gradients there. With 1/sqrt(replicas) of the latest step that is no
    noisier than a step of the exact exchange; with 1/replicas it would be nearest to the mean, but lag behind it in
    what all steps have in common, which steps that are large for the curvature do not tolerate. Where an element is
    exchanged less often than every SELDOM steps, nothing is withheld: replicas are then many steps apart, and there are
    so many parameters for the compute that another pass over them would cost time.
    """
    if spec.withhold != "auto":
        return spec.withhold
    period = parts * spec.every / spec.probability
    if period > SELDOM or (period == 1 and not spec.overlap):  # without overlap everything is exchanged at once
        return 0.0
    return 1 - 1 / math.sqrt(replicas)


def receives(pairing: Pairing, me: int) -> int:
    """Return the number of messages to peer `me` that may arrive before one is read: the number of receives it
    posts."""
    if pairing.period is None:  # partners are drawn, and more than a few seldom coincide
        return min(2 * pairing.replicas, 8)
    sources = {source for i in range(pairing.period) for source, _ in pairing.receives(i, me)}
    return 2 * len(sources) + 1  # each can be in the open round and one ahead
