"""What a study answers: importances with known results, rates, words and tables."""

from __future__ import annotations

import math
import random
import sys
from itertools import product
from typing import Any

import pytest

from nettorrent_mpi.config.search_space import Choice, NumberRange, Parameter
from nettorrent_mpi.tune import parzen
from nettorrent_mpi.tune.findings import best, by_groups, importances, rates
from nettorrent_mpi.tune.trials import COMPLETE, PRUNED, Trial, point_in_words


def trials(points: list[dict[str, Any]], accuracies: list[float], **more: Any) -> list[Trial]:
    return [
        Trial(number, point, "job", 0, 1, 1, 0.0, COMPLETE, accuracy, **more)
        for number, (point, accuracy) in enumerate(zip(points, accuracies, strict=True))
    ]


def test_means_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Optuna, too."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    parameters: dict[str, Parameter] = {"b": Choice((1, 2), (1, 2)), "a": Choice(("x", "y"), ("x", "y"))}
    points = [{"a": a, "b": b} for a, b in product("xy", (1, 2))]
    first, second = importances(parameters, trials(points * 3, [1, 1, 2, 3] * 3))
    assert (second.parameter, second.at_best, second.means) == ("a", "y", {"x": 1.0, "y": 2.5})
    assert (first.parameter, first.at_best, first.means) == ("b", "2", {"1": 1.5, "2": 2.0})
    assert first.share is second.share is None


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_what_matters_is_found_whoever_has_drawn_the_points(sampler: str) -> None:
    """TPE soon draws good rates only, among which accuracies are alike."""
    pytest.importorskip("optuna", "5")
    parameters: dict[str, Parameter] = {
        "rate": NumberRange(1e-4, 1.0, log=True),
        "noise": NumberRange(0.0, 1.0),
        "units": NumberRange(16, 256, step=16),
        "kind": Choice(("a", "b", None), ({}, {}, {}), named=True),
    }
    made: list[Trial] = []
    for number in range(40):
        chance = random.Random(number)
        point = {name: each.draw(chance) for name, each in parameters.items()}
        if sampler == "tpe":
            point = parzen.next_point(parameters, number, made)
        accuracy = 0.9 - 0.1 * abs(math.log10(point["rate"]) + 2) + chance.gauss(0, 0.01)
        made.append(Trial(number, point, "job", 0, 1, 1, 0.0, COMPLETE, accuracy))
    found = importances(parameters, made)
    assert found[0].parameter == "rate"
    shares = [each.share or 0.0 for each in found]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] > 0.5
    failed = Trial(99, {**point, "kind": "b"}, "job", 0, 1, 1, 0.0, PRUNED, None)
    assert importances(parameters, [failed, *made]) == found


def test_ranges_are_told_in_quarters() -> None:
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
    assert (len(found["rate"].means), len(found["units"].means)) == (4, 3)
    assert sorted(found["units"].means) == ["1", "2", "3"]


@pytest.mark.parametrize("accuracies", [[], [0.5], [0.1 * number for number in range(9)]])
def test_few_trials_say_nothing(accuracies: list[float]) -> None:
    parameters: dict[str, Parameter] = {"a": NumberRange(1, 9)}
    points = [{"a": number + 1} for number in range(len(accuracies))]
    (found,) = importances(parameters, trials(points, accuracies))
    assert found.share is None


def test_equal_accuracies_are_explained_by_nothing() -> None:
    pytest.importorskip("optuna", "5")
    (found,) = importances({"a": Choice((1, 2), (1, 2))}, trials([{"a": 1}, {"a": 2}, {"a": 2}] * 5, [0.5] * 15))
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
