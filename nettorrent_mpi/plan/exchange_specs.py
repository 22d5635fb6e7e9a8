"""Specs of pipelines, of the exchange between replicas, and of copies for when ranks are lost: their options and
defaults.

Frozen dataclasses like those of plan/specs.py; the first field may be given alone (`compress: {topk: 0.01}`).
"""

from __future__ import annotations

from typing import Literal

from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.specs import Spec

# -- pipelines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpipe(Spec):
    """A mini-batch's pieces all go forward, then all backward (Huang et al. 2018); stages keep all of them."""

    kind = "gpipe"


@dataclass(frozen=True)
class OneFOneB(Spec):
    """A stage does one piece backward after each one forward, and keeps few of them (Narayanan et al. 2019)."""

    kind = "1f1b"


@dataclass(frozen=True)
class ZeroBubble(Spec):
    """1F1B whose backward passes are split: the gradients of the weights are computed where a stage would wait (Qi et
    al. 2023)."""

    kind = "zero_bubble"
    stored: int | None = None  # pieces that a stage keeps at most; None: as many as there are stages


@dataclass(frozen=True)
class Async(Spec):
    """Mini-batches run 1F1B without flush: they follow each other without a gap, each stage updates as its gradients
    arrive."""

    kind = "async"
    staleness_aware: bool = False  # a stage's learning rate is divided by 1 + its staleness in updates


# -- weights of merged messages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConstantMix(Spec):
    """f = value; without a value the pairing's own weights, which keep the average of the replicas."""

    kind = "constant"
    value: float | None = None  # f: the part of the difference to a message that is taken


@dataclass(frozen=True)
class ClockMix(Spec):
    """f = pc / (c + pc): the model that has seen more counts more."""

    kind = "clock"


@dataclass(frozen=True)
class LossMix(Spec):
    """f = l / (l + pl): the worse model takes more of the better one."""

    kind = "loss"


@dataclass(frozen=True)
class LinearMix(Spec):
    """f goes from start to end while the clock goes from 0 to target steps, and stays at end."""

    kind = "linear"
    start: float = 0.5  # f at the first step
    end: float = 0.1  # f from the target on
    target: int = 1000  # steps


@dataclass(frozen=True)
class LossDivergenceMix(Spec):
    """f = l^2 / (l^2 + pl^2) * min(l / target, 1)."""

    kind = "loss_divergence"
    target: float = 1.0  # the loss from which on f is not lowered


@dataclass(frozen=True)
class PushSumMix(Spec):
    """Every message carries a share of its sender's mass; what is merged is weighed by mass (de-biased)."""

    kind = "push_sum"


# -- compression of messages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole(Spec):
    """Messages have the numbers as they are."""

    kind = "none"


@dataclass(frozen=True)
class Float16(Spec):
    """Messages have numbers of 2 bytes."""

    kind = "float16"


@dataclass(frozen=True)
class Int8(Spec):
    """Messages have numbers of 1 byte, with a scale for each block of them."""

    kind = "int8"


@dataclass(frozen=True)
class Sign(Spec):
    """Messages have a bit for each number, its sign, and a scale for each block of them."""

    kind = "sign"


@dataclass(frozen=True)
class TopK(Spec):
    """Messages have the largest changes only, and their places."""

    kind = "topk"
    fraction: float = 0.01  # of all numbers


# -- exchanges --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allreduce(Spec):
    """Gradients are reduced over all replicas, which stay the same: the exact exchange."""

    kind = "allreduce"


@dataclass(frozen=True)
class Nothing(Spec):
    """Replicas train apart."""

    kind = "none"


@dataclass(frozen=True)
class Elite(Spec):
    """At intervals replicas take over the best replica's weights, judged by the validation rows."""

    kind = "elite"
    every_samples: int = 1000  # training rows of all replicas together, from one comparison to the next
    mode: Literal["best", "tournament"] = "best"  # best: all take the best one's; tournament: losers of pairs do
    metric: Literal["validation_loss", "validation_accuracy"] = "validation_loss"  # by which they are compared


@dataclass(frozen=True)
class Consensus(Spec):
    """Replicas that are too far apart are averaged exactly."""

    kind = "consensus"
    max: float = 0.05  # the root mean square distance from their mean, relative to it, above which they are averaged


PairingKind = Literal["ring", "exponential", "hypercube", "shuffle", "random", "complete", "grid", "finite"]


@dataclass(frozen=True)
class Gossip(Spec):
    """Replicas average with few others at a time, by messages that travel while the next step computes."""

    kind = "gossip"
    pairing: PairingKind = "exponential"  # who exchanges with whom in each round
    mix: Spec = ConstantMix()  # the weight of a merged message
    divergence_threshold: float = 0.0  # below this loss f shrinks in proportion to the loss; 0: never
    every: int = 1  # steps from one round to the next
    probability: float = 1.0  # that a pair's round takes place
    part: float | Literal["auto"] = "auto"  # of all elements, in one round
    compress: Spec = Whole()  # messages are made smaller
    gamma: float | None = None  # CHOCO's step towards the others, with compression; None: the codec's
    exact_every: int | None = None  # rounds from one exact average to the next
    slow_momentum: float = 0.0  # SlowMo, at exact averages
    average: tuple[Literal["parameters", "optimizer"], ...] = ("parameters",)  # the arrays that are averaged
    # The factor on the learning rate; auto: see plan.gossip_rules.rate_factor.
    rate_factor: float | Literal["auto"] = "auto"
    # The part of its own latest steps that a replica withholds from itself; auto: see plan.gossip_rules.withholding.
    withhold: float | Literal["auto"] = "auto"
    overlap: bool = True  # messages travel while the next step computes
    deadline: float | Literal["auto", "none"] = "auto"  # milliseconds that a round may take
    consensus: Consensus | None = None  # a bound on the distance between replicas; None: none


# -- copies of the state, for when ranks are lost ---------------------------------------------------------------------


@dataclass(frozen=True)
class BuddyCopies(Spec):
    """Each rank keeps a copy of what it owns and of what its buddy does."""

    kind = "buddy"
    # Steps from one copy to the next; auto: so that copies take about 1 % of the time (plan.recovery.copies_due).
    every_steps: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class NoCopies(Spec):
    """No rank keeps a copy for another: after a loss the run goes on from a checkpoint."""

    kind = "none"


@dataclass(frozen=True)
class AutoCopies(Spec):
    """Copies at a buddy where a run survives the loss of ranks."""

    kind = "auto"


PIPELINES: dict[str, type[Spec]] = {c.kind: c for c in (OneFOneB, Gpipe, ZeroBubble, Async)}
MIXES: dict[str, type[Spec]] = {
    c.kind: c for c in (ConstantMix, ClockMix, LossMix, LinearMix, LossDivergenceMix, PushSumMix)
}
COMPRESSIONS: dict[str, type[Spec]] = {c.kind: c for c in (Whole, Float16, Int8, Sign, TopK)}
EXCHANGES: dict[str, type[Spec]] = {c.kind: c for c in (Allreduce, Nothing, Gossip, Elite)}
REDUNDANCIES: dict[str, type[Spec]] = {c.kind: c for c in (AutoCopies, NoCopies, BuddyCopies)}
