"""A learning-rate schedule is a pure function from a step's number to its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.specs import Constant, Cosine, Exponential, Spec, Step

LOOKED_AT = 4096  # steps of a long run, by which the highest of scaled rates is found

Scale: TypeAlias = Callable[[float, float], float]
"""The factor that an exchange puts on the rate: of the completed part of the run, from 0 to 1, and of the decay, what
the schedule has made of lr (1 during the warm-up)."""


class Rates(NamedTuple):
    """Rates are what a learning-rate schedule comes to."""

    first: float
    highest: float
    last: float

    def __str__(self) -> str:
        if self.first == self.highest == self.last:
            return f"{self.first:.4g} in all steps"
        return f"{self.first:.4g} in the first step, at most {self.highest:.4g}, {self.last:.4g} in the last step"


def extremes(spec: Spec, lr: float, total_steps: int, steps_per_epoch: float, scale: Scale | None = None) -> Rates:
    """Return the first, the highest and the last learning rate of a run."""
    rate = make_rate(spec, lr, total_steps, steps_per_epoch, scale)
    last, warm = max(total_steps - 1, 0), spec.options()["warmup_steps"]
    # Beyond the warm-up every schedule only falls, or (factors above 1) only rises.
    looked_at = {0, min(warm, last), last}
    if scale is not None:
        looked_at.update(range(0, last, max(1, last // LOOKED_AT)))
    return Rates(rate(0), max(map(rate, looked_at)), rate(last))


def make_rate(
    spec: Spec, lr: float, total_steps: int, steps_per_epoch: float, scale: Scale | None = None
) -> Callable[[int], float]:
    """Return a function from the step's number, counted from 0, to its learning rate. `spec` is one of specs.SCHEDULES.

    During the first w = warmup_steps steps, step n has lr * (n + 1) / w. The schedule proper begins after them at lr,
    and its steps k are counted from there: constant lr; step lr * factor^(k // every_steps); exponential lr *
    factor_per_epoch^(k / steps_per_epoch); cosine from lr at k = 0 to final * lr at the last of `total_steps`, where it
    stays if training goes on (if only one step is left after the warm-up, it has lr). What comes of this is multiplied
    by `scale`.
    """
    assert isinstance(spec, Constant | Step | Exponential | Cosine), spec
    warmup = spec.warmup_steps
    factor = _factor(spec, total_steps - warmup, steps_per_epoch)

    def rate(step: int) -> float:
        return lr * (step + 1) / warmup if step < warmup else lr * factor(step - warmup)

    if scale is None:
        return rate

    def scaled(step: int) -> float:
        planned = rate(step)
        return planned * scale(step / total_steps, planned / lr if step >= warmup and planned else 1.0)

    return scaled


def check_rates(spec: Spec, steps: int, steps_per_epoch: int) -> str | None:
    """Return a warning if the learning rate would drop only after the last of `steps`. Raises ConfigError if the
    warm-up takes all of them or more, so that the schedule proper would never begin."""
    assert isinstance(spec, Constant | Step | Exponential | Cosine), spec
    if steps and spec.warmup_steps >= steps:
        raise ConfigError(
            f"{spec.warmup_steps} steps, but the run has {steps}: the learning rate would never stay at lr; "
            "lower it, or give the run more epochs or steps",
            key=f"train.schedule.{spec.kind}.warmup_steps",
        )
    if isinstance(spec, Step) and 0 < steps <= spec.warmup_steps + _every(spec, steps_per_epoch):
        option = "every_steps" if spec.every_epochs is None else "every_epochs"
        length = f"{steps} steps" if spec.every_epochs is None else f"{steps / steps_per_epoch:.4g} epochs"
        return (
            f"train.schedule.step.{option}: {getattr(spec, option)}, but the run has {length}: the learning rate never "
            "drops"
        )
    return None


def _every(spec: Step, steps_per_epoch: float) -> int:
    """Return the number of steps from one drop to the next."""
    return spec.every_steps or round((spec.every_epochs or 1) * steps_per_epoch)


def _factor(spec: Constant | Step | Exponential | Cosine, steps: int, steps_per_epoch: float) -> Callable[[int], float]:
    """Return the factor on lr at each of the `steps` after the warm-up."""
    if isinstance(spec, Step):
        every, drop = _every(spec, steps_per_epoch), spec.factor
        return lambda k: float(drop ** (k // every))
    if isinstance(spec, Exponential):
        decay = spec.factor_per_epoch
        return lambda k: float(decay ** (k / steps_per_epoch))
    if isinstance(spec, Cosine):
        final, last = spec.final, max(steps - 1, 1)
        return lambda k: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(k / last, 1.0)))
    return lambda k: 1.0
