"""Specs of pipelines, of the exchange between replicas, and of copies for when ranks are lost: their options and
defaults.

Frozen dataclasses like those of plan/specs.py; the first field may be given alone (`compress: {topk: 0.01}`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nettorrent_mpi.plan.specs import Spec

# -- pipelines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpipe(Spec):
    kind = "gpipe"


@dataclass(frozen=True)
class OneFOneB(Spec):
    kind = "1f1b"


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
    value: float | None = None


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
    start: float = 0.5
    end: float = 0.1
    target: int = 1000


@dataclass(frozen=True)
class LossDivergenceMix(Spec):
    """f = l^2 / (l^2 + pl^2) * min(l / target, 1)."""

    kind = "loss_divergence"
    target: float = 1.0


@dataclass(frozen=True)
class PushSumMix(Spec):
    """Every message carries a share of its sender's mass; what is merged is weighed by mass (de-biased)."""

    kind = "push_sum"


# -- compression of messages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole(Spec):
    kind = "none"


@dataclass(frozen=True)
class Float16(Spec):
    kind = "float16"


@dataclass(frozen=True)
class Int8(Spec):
    kind = "int8"


@dataclass(frozen=True)
class Sign(Spec):
    kind = "sign"


@dataclass(frozen=True)
class TopK(Spec):
    kind = "topk"
    fraction: float = 0.01


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
    every_samples: int = 1000  # of all replicas together
    mode: Literal["best", "tournament"] = "best"
    metric: Literal["validation_loss", "validation_accuracy"] = "validation_loss"


@dataclass(frozen=True)
class Consensus(Spec):
    kind = "consensus"
    max: float = 0.05  # relative distance above which the replicas are averaged exactly


PairingKind = Literal["ring", "exponential", "hypercube", "shuffle", "random", "complete", "grid", "finite"]


@dataclass(frozen=True)
class Gossip(Spec):
    """Replicas average with few others at a time, by messages that travel while the next step computes."""

    kind = "gossip"
    pairing: PairingKind = "exponential"
    mix: Spec = ConstantMix()  # one of MIXES
    divergence_threshold: float = 0.0  # below this loss f shrinks in proportion to the loss; 0: never
    every: int = 1  # steps from one round to the next
    probability: float = 1.0  # that a pair's round takes place
    part: float | Literal["auto"] = "auto"  # of all elements, in one round
    compress: Spec = Whole()  # one of COMPRESSIONS
    gamma: float | None = None  # CHOCO's step towards the others, with compression; None: the codec's
    exact_every: int | None = None  # rounds from one exact average to the next
    slow_momentum: float = 0.0  # SlowMo, at exact averages
    average: tuple[Literal["parameters", "optimizer"], ...] = ("parameters",)
    # The factor on the learning rate; auto: see plan.gossip_rules.rate_factor.
    rate_factor: float | Literal["auto"] = "auto"
    # The part of its own latest steps that a replica withholds from itself; auto: see plan.gossip_rules.withholding.
    withhold: float | Literal["auto"] = "auto"
    overlap: bool = True  # messages travel while the next step computes
    deadline: float | Literal["auto", "none"] = "auto"  # milliseconds that a round may take
    consensus: Consensus | None = None


# -- copies of the state, for when ranks are lost ---------------------------------------------------------------------


@dataclass(frozen=True)
class BuddyCopies(Spec):
    """Each rank keeps a copy of what it owns and of what its buddy does."""

    kind = "buddy"
    # Steps from one copy to the next; auto: so that copies take about 1 % of the time (plan.recovery.copies_due).
    every_steps: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class NoCopies(Spec):
    kind = "none"


@dataclass(frozen=True)
class AutoCopies(Spec):
    """Copies at a buddy where a run survives the loss of ranks."""

    kind = "auto"


PIPELINES: dict[str, type[Spec]] = {c.kind: c for c in (OneFOneB, Gpipe, Async)}
MIXES: dict[str, type[Spec]] = {
    c.kind: c for c in (ConstantMix, ClockMix, LossMix, LinearMix, LossDivergenceMix, PushSumMix)
}
COMPRESSIONS: dict[str, type[Spec]] = {c.kind: c for c in (Whole, Float16, Int8, Sign, TopK)}
EXCHANGES: dict[str, type[Spec]] = {c.kind: c for c in (Allreduce, Nothing, Gossip, Elite)}
REDUNDANCIES: dict[str, type[Spec]] = {c.kind: c for c in (AutoCopies, NoCopies, BuddyCopies)}
