"""Learning rates: by hand, and against PyTorch's schedulers where they mean the same."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from nettorrent_mpi.nn.rates import check_rates, extremes, make_rate
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.specs import Constant, Cosine, Exponential, Spec, Step


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Constant(), [2, 2, 2, 2, 2, 2]),
        (Constant(warmup_steps=4), [0.5, 1, 1.5, 2, 2, 2]),
        (Step(every_steps=2, factor=0.5), [2, 2, 1, 1, 0.5, 0.5]),
        (Step(every_epochs=1, factor=0.5, warmup_steps=2), [1, 2, 2, 2, 1, 1]),
        (Exponential(0.25), [2, 1, 0.5, 0.25, 0.125, 0.0625]),  # two steps an epoch: half a factor each
        (Exponential(factor_per_epoch=0.25, warmup_steps=1), [2, 2, 1, 0.5, 0.25, 0.125]),
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


@pytest.mark.parametrize(
    "spec",
    [
        Constant(),
        Constant(warmup_steps=4),
        Constant(warmup_steps=60),
        Step(every_steps=2, warmup_steps=2),
        Step(every_epochs=1, factor=3.0),
        Exponential(1.1, warmup_steps=3),
        Cosine(warmup_steps=2),
        Cosine(final=0.5),
    ],
)
def test_extremes(spec: Spec) -> None:
    rates = list(map(make_rate(spec, 2.0, 6, 2), range(6)))
    assert extremes(spec, 2.0, 6, 2) == (rates[0], max(rates), rates[-1])


def test_a_scale_is_given_the_part_of_the_run_and_the_decay() -> None:
    asked: list[tuple[float, float]] = []

    def scale(done: float, decay: float) -> float:
        asked.append((done, decay))
        return 1 + 10 * done

    spec = Exponential(0.25, warmup_steps=2)
    plain = make_rate(spec, 2.0, 6, 2)
    scaled = [make_rate(spec, 2.0, 6, 2, scale)(step) for step in range(6)]
    assert scaled == pytest.approx([plain(step) * (1 + 10 * step / 6) for step in range(6)])
    assert asked == [(step / 6, 1.0 if step < 2 else plain(step) / 2) for step in range(6)]
    assert extremes(spec, 2.0, 6, 2, scale) == (scaled[0], max(scaled), scaled[-1])


def test_extremes_in_words() -> None:
    assert str(extremes(Constant(), 0.001, 100, 10)) == "0.001 in all steps"
    words = str(extremes(Cosine(warmup_steps=10), 0.1, 100, 10))
    assert words == "0.01 in the first step, at most 0.1, 0 in the last step"


@pytest.mark.parametrize("spec", [Constant(), Cosine(), Step(every_steps=3), Exponential(0.9)])
def test_a_warm_up_of_the_whole_run_is_refused(spec: Spec) -> None:
    for warmup in (20, 1000):
        with pytest.raises(ConfigError, match=f"{warmup} steps, but the run has 20") as caught:
            check_rates(replace(spec, warmup_steps=warmup), 20, 5)
        assert caught.value.key == f"train.schedule.{spec.kind}.warmup_steps"
    assert check_rates(replace(spec, warmup_steps=16), 20, 5) is None
    assert check_rates(replace(spec, warmup_steps=16), 0, 5) is None


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (Step(every_steps=19), None),
        (Step(every_steps=20), "step.every_steps: 20, but the run has 20 steps: the learning rate never drops"),
        (Step(every_epochs=3), None),
        (Step(every_epochs=3, warmup_steps=5), "step.every_epochs: 3, but the run has 4 epochs"),
        (Step(every_epochs=30), "step.every_epochs: 30, but the run has 4 epochs: the learning rate never drops"),
    ],
)
def test_a_drop_that_is_never_reached_is_told(spec: Step, told: str | None) -> None:
    text = check_rates(spec, 20, 5)
    assert text == told or (told is not None and text is not None and told in text)
    rates = set(map(make_rate(replace(spec, warmup_steps=0), 1.0, 20, 5), range(20 - spec.warmup_steps)))
    assert (len(rates) == 1) == (told is not None)


def test_cosine_stays_at_its_end() -> None:
    rate = make_rate(Cosine(final=0.1), 1.0, 10, 5)
    assert rate(9) == rate(10) == rate(100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        (Constant(warmup_steps=7), "LinearLR", {"start_factor": 1 / 7, "total_iters": 6}),
        (Step(every_steps=6, factor=0.3), "StepLR", {"step_size": 6, "gamma": 0.3}),
        (Exponential(0.9), "ExponentialLR", {"gamma": 0.9}),
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
