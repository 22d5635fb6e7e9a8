"""A learning-rate schedule is a pure function from a step's number to its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from nettorrent_mpi.plan.specs import Constant, Cosine, Exponential, Spec, Step


def make_rate(spec: Spec, lr: float, total_steps: int, steps_per_epoch: float) -> Callable[[int], float]:
    """Return a function from the step's number, counted from 0, to its learning rate. `spec` is one of specs.SCHEDULES.

    During the first w = warmup_steps steps, step n has lr * (n + 1) / w. The schedule proper begins after them at lr,
    and its steps k are counted from there: constant lr; step lr * factor^(k // every); exponential lr * factor^(k /
    steps_per_epoch); cosine from lr at k = 0 to final * lr at the last of `total_steps`, where it stays if training
    goes on (if only one step is left after the warm-up, it has lr).
    """
    assert isinstance(spec, Constant | Step | Exponential | Cosine), spec
    warmup = spec.warmup_steps
    factor = _factor(spec, total_steps - warmup, steps_per_epoch)

    def rate(step: int) -> float:
        return lr * (step + 1) / warmup if step < warmup else lr * factor(step - warmup)

    return rate


def _factor(spec: Constant | Step | Exponential | Cosine, steps: int, steps_per_epoch: float) -> Callable[[int], float]:
    """Return the factor on lr at each of the `steps` after the warm-up."""
    if isinstance(spec, Step):
        every, drop = spec.every, spec.factor
        return lambda k: float(drop ** (k // every))
    if isinstance(spec, Exponential):
        decay = spec.factor
        return lambda k: float(decay ** (k / steps_per_epoch))
    if isinstance(spec, Cosine):
        final, last = spec.final, max(steps - 1, 1)
        return lambda k: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(k / last, 1.0)))
    return lambda k: 1.0
