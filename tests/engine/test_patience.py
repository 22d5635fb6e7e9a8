"""A Patience counts evaluations without improvement, forgets what was after a step, and goes on from its text."""

from __future__ import annotations

import pytest

from nettorrent_mpi.engine.patience import Patience
from nettorrent_mpi.plan.scores import Scores


def judged(accuracies: list[float], most: int = 3) -> tuple[Patience, list[bool]]:
    patience = Patience(most, by_loss=False)
    return patience, [patience.see(10 * (i + 1), Scores(1.0, each)) for i, each in enumerate(accuracies)]


def test_the_first_of_the_best_counts() -> None:
    patience, best = judged([0.1, 0.5, 0.5, 0.4])
    assert best == [True, True, False, False]
    assert (patience.step, patience.exhausted) == (20, False)
    assert not patience.see(50, Scores(1.0, 0.5))
    assert patience.exhausted
    assert judged([0.1, 0.1, 0.0, 0.05, 0.2])[0].step == 50


def test_losses_are_better_where_they_are_lower() -> None:
    patience = Patience(1, by_loss=True)
    assert patience.see(1, Scores(2.0, None))
    assert patience.see(2, Scores(1.5, None))
    assert not patience.see(3, Scores(float("nan"), None))
    assert (patience.step, patience.exhausted) == (2, True)


def test_it_goes_on_from_its_text_and_from_an_earlier_step() -> None:
    patience, _ = judged([0.1, 0.5, 0.4])
    again = Patience(3, by_loss=False)
    again.read(patience.text())
    assert (again.step, again.exhausted) == (20, False)
    again.see(40, Scores(1.0, 0.3))
    again.see(50, Scores(1.0, 0.3))
    assert again.exhausted
    again.forget_after(40)
    assert not again.exhausted
    patience.forget_after(15)
    assert patience.step == 10
    patience.forget()
    assert (patience.step, patience.exhausted) == (None, False)
    for text in ("{}", "[1]", "[[1, null]]", "x"):
        with pytest.raises(ValueError):
            again.read(text)
