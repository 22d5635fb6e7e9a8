"""What a study answers: importances with known results, rates, words and tables."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest

from nettorrent_mpi.config.search_space import Choice, NumberRange, Parameter
from nettorrent_mpi.tune.findings import best, by_groups, importances, rates
from nettorrent_mpi.tune.trials import COMPLETE, PRUNED, Trial, point_in_words


def trials(points: list[dict[str, Any]], accuracies: list[float], **more: Any) -> list[Trial]:
    return [
        Trial(number, point, "job", 0, 1, 1, 0.0, COMPLETE, accuracy, **more)
        for number, (point, accuracy) in enumerate(zip(points, accuracies, strict=True))
    ]


def test_importances_by_hand() -> None:
    """Accuracies 1, 1, 2, 3 of a: total 2.75, inside 0.5; epsilon squared is 1 - 0.5 / 2.75 * 3 / 2 = 0.7273. Of b:
    inside 2.5, below what chance would explain."""
    parameters: dict[str, Parameter] = {"b": Choice((1, 2), (1, 2)), "a": Choice(("x", "y"), ("x", "y"))}
    points = [{"a": a, "b": b} for a, b in product("xy", (1, 2))]
    first, second = importances(parameters, trials(points, [1, 1, 2, 3]))
    assert (first.parameter, first.at_best, first.means) == ("a", "y", {"x": 1.0, "y": 2.5})
    assert first.share == pytest.approx(1 - 0.5 / 2.75 * 3 / 2)
    assert (second.parameter, second.share) == ("b", 0.0)


def test_what_matters_is_found_and_what_does_not_is_near_zero() -> None:
    parameters: dict[str, Parameter] = {
        "rate": NumberRange(1e-4, 1.0, log=True),
        "noise": NumberRange(0.0, 1.0),
        "units": NumberRange(1, 3),
        "kind": Choice(("a", "b"), ({}, {}), named=True),
    }
    chance = random.Random(1)
    points = [{name: each.draw(chance) for name, each in parameters.items()} for _ in range(400)]
    weights = {"a": 0.0, "b": 0.3}
    accuracies = [(point["rate"] > 0.01) + weights[str(point["kind"])] for point in points]
    found = {each.parameter: each for each in importances(parameters, trials(points, accuracies))}
    assert next(iter(found)) == "rate"
    # 0.25 and 0.0225 are the variances of the two terms
    assert found["rate"].share == pytest.approx(0.25 / 0.2725, abs=0.04)
    assert found["kind"].share == pytest.approx(0.0225 / 0.2725, abs=0.04)
    assert found["noise"].share == pytest.approx(0, abs=0.03)
    assert found["units"].share == pytest.approx(0, abs=0.03)
    assert (len(found["rate"].means), len(found["units"].means)) == (4, 3)
    assert sorted(found["units"].means) == ["1", "2", "3"]


@pytest.mark.parametrize("accuracies", [[], [0.5], [0.5, 0.6]])
def test_few_trials_say_nothing(accuracies: list[float]) -> None:
    parameters: dict[str, Parameter] = {"a": NumberRange(1, 5)}
    points = [{"a": number + 1} for number in range(len(accuracies))]
    (found,) = importances(parameters, trials(points, accuracies))
    assert found.share is None


def test_equal_accuracies_are_explained_by_nothing() -> None:
    (found,) = importances({"a": Choice((1, 2), (1, 2))}, trials([{"a": 1}, {"a": 2}, {"a": 2}], [0.5] * 3))
    assert found.share == 0.0


def test_the_best_is_the_first_of_the_complete() -> None:
    made = trials([{}] * 3, [0.5, 0.7, 0.7])
    pruned = Trial(9, {}, "job", 0, 1, 1, 0.0, PRUNED, None, accuracies=((1.0, 0.99),))
    assert best([*reversed(made), pruned]) == made[1]
    assert best([pruned]) is None


def test_rates_are_those_of_the_jobs() -> None:
    made = [
        Trial(number, {}, job, 0, groups, 1, began, COMPLETE, 0.5, ended=ended)
        for number, (job, groups, began, ended) in enumerate(
            [("a", 1, 0.0, 10.0), ("a", 1, 10.0, 20.0), ("b", 2, 100.0, 110.0), ("b", 2, 100.0, 112.0)]
        )
    ]
    one, two = rates(made)
    assert (one.trials, one.seconds, one.per_hour) == (2, 20.0, 360.0)
    assert (two.groups, two.per_hour) == (2, 600.0)
    assert by_groups([one, two]) == {1: 360.0, 2: 600.0}


def test_points_are_told_by_the_ends_of_names() -> None:
    point = {"train.optimizer.adam.lr": 0.00012345, "model.loss": "x", "data.rate": 1, "layers.rate": None}
    assert point_in_words(point) == "lr=0.0001234 loss=x data.rate=1 layers.rate=null"
