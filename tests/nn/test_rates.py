"""Learning rates: by hand, and against PyTorch's schedulers where they mean the same."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nettorrent_mpi.nn.rates import make_rate
from nettorrent_mpi.plan.specs import Constant, Cosine, Exponential, Spec, Step


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Constant(), [2, 2, 2, 2, 2, 2]),
        (Constant(warmup_steps=4), [0.5, 1, 1.5, 2, 2, 2]),
        (Step(every=2, factor=0.5), [2, 2, 1, 1, 0.5, 0.5]),
        (Step(every=2, factor=0.5, warmup_steps=2), [1, 2, 2, 2, 1, 1]),
        (Exponential(factor=0.25), [2, 1, 0.5, 0.25, 0.125, 0.0625]),  # two steps an epoch: half a factor each
        (Exponential(factor=0.25, warmup_steps=1), [2, 2, 1, 0.5, 0.25, 0.125]),
        (Cosine(), [2, 1 + math.cos(math.pi / 5), 1 + math.cos(0.4 * math.pi), 1 - math.cos(0.4 * math.pi),
                    1 - math.cos(0.2 * math.pi), 0]),
        (Cosine(final=0.5, warmup_steps=3), [2 / 3, 4 / 3, 2, 2, 1.5, 1]),
        (Cosine(warmup_steps=5), [0.4, 0.8, 1.2, 1.6, 2, 2]),
        (Cosine(warmup_steps=60), [2 / 60, 4 / 60, 6 / 60, 8 / 60, 10 / 60, 12 / 60]),
    ],
)  # fmt: skip
def test_by_hand(spec: Spec, expected: list[float]) -> None:
    rate = make_rate(spec, 2.0, 6, 2)
    assert [rate(step) for step in range(6)] == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_cosine_stays_at_its_end() -> None:
    rate = make_rate(Cosine(final=0.1), 1.0, 10, 5)
    assert rate(9) == rate(10) == rate(100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        (Constant(warmup_steps=7), "LinearLR", {"start_factor": 1 / 7, "total_iters": 6}),
        (Step(every=6, factor=0.3), "StepLR", {"step_size": 6, "gamma": 0.3}),
        (Exponential(factor=0.9), "ExponentialLR", {"gamma": 0.9}),
        (Cosine(final=0.2), "CosineAnnealingLR", {"T_max": 19, "eta_min": 0.2 * 0.05}),
    ],
)
def test_equals_pytorch(spec: Spec, name: str, options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch, the reference, is not installed")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **options)
    rate = make_rate(spec, 0.05, 20, 1)
    for step in range(20):
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()
