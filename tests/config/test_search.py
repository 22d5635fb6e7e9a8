"""The file of a search: what trials it makes, and what is said of mistakes in it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nettorrent_mpi.config.reading import load
from nettorrent_mpi.config.search_file import MedianRule, Search, differences, read_plain, read_search
from nettorrent_mpi.config.search_space import Choice, NumberRange, samples
from nettorrent_mpi.plan.errors import ConfigError

BASE = """\
base:
  data: {name: digits, validation: 0.2}
  model: {layers: [flatten, {linear: 10}]}
"""
SHAPES = (
    BASE
    + """\
parameters:
  layers: [0, 2]
  units: {low: 8, high: 32, step: 8}
  train.optimizer.adam.lr: {low: 1e-3, high: 0.1, log: true}
  kind:
    slow: {train.epochs: 2, model.loss: {cross_entropy: {label_smoothing: 0.1}}}
    fast: {train.steps: 3}
settings:
  train.batch_size: 16
  model.layers:
    - flatten
    - repeat: {times: $layers, layers: [{linear: {units: $units, activation: relu}}, {dropout: 0.1}]}
    - linear: 10
trials: 7
"""
)


def search(tmp_path: Path, text: str, *changes: str) -> Search:
    (tmp_path / "search.yaml").write_text(text)
    return read_search(str(tmp_path / "search.yaml"), changes)


def test_a_trial_has_the_base_the_settings_and_its_parameters(tmp_path: Path) -> None:
    made = search(tmp_path, SHAPES, "seed=9")
    point = {"layers": 2, "units": 24, "train.optimizer.adam.lr": 0.02, "kind": "fast"}
    config = made.config(point, "somewhere")
    kinds = [layer.kind for layer in config.model.layers]
    assert kinds == ["flatten", "linear", "dropout", "linear", "dropout", "linear"]
    assert [layer.units for layer in config.model.layers if layer.kind == "linear"] == [24, 24, 10]  # type: ignore[attr-defined]
    assert config.train.optimizer.options()["lr"] == 0.02
    assert (config.train.steps, config.train.epochs, config.train.batch_size) == (3, None, 16)
    assert (config.seed, config.output, made.trials) == (9, "somewhere", 7)
    plain = made.config({**point, "layers": 0, "kind": "slow"})
    assert len(plain.model.layers) == 2
    assert (plain.train.epochs, plain.model.loss.options()["label_smoothing"]) == (2, 0.1)


def test_a_search_with_its_base_inside_is_the_same_one(tmp_path: Path) -> None:
    made = search(tmp_path, SHAPES, "seed=9")
    again = search(tmp_path, made.text())
    assert again.plain() == made.plain() == read_plain(made.text(), "")
    for point in ({name: next(samples(each)) for name, each in made.parameters.items()},):
        assert again.config(point, "x") == made.config(point, "x")
    assert differences(made.plain(), search(tmp_path, SHAPES, "seed=8").plain()) == ["base"]
    longer = search(tmp_path, SHAPES.replace("trials: 7", "trials: 70"), "seed=9")
    assert differences(made.plain(), longer.plain()) == []


def test_the_grid_has_each_point_once(tmp_path: Path) -> None:
    text = BASE + "parameters: {train.epochs: [1, 3], seed: {low: 1, high: 3}, train.clip_norm: [0.5, null]}\n"
    made = search(tmp_path, text + "sampler: grid\n")
    points = [tuple(made.grid_point(number).values()) for number in range(made.trials)]
    assert made.trials == len(set(points)) == 12
    assert points[:3] == [(1, 1, 0.5), (1, 1, None), (1, 2, 0.5)]
    assert made.config(made.grid_point(1)).train.clip_norm is None


@pytest.mark.parametrize(
    ("range_", "grid"),
    [
        (NumberRange(0.1, 0.5, 0.1), (0.1, 0.2, 0.3, 0.4, 0.5)),
        (NumberRange(1, 8, 3), (1, 4, 7)),
        (NumberRange(2, 4), (2, 3, 4)),
        (NumberRange(0.0, 1.0), None),
        (NumberRange(1, 100, log=True), None),
    ],
)
def test_a_range_draws_what_its_grid_has(range_: NumberRange, grid: tuple[Any, ...] | None) -> None:
    chance = random.Random(1)
    drawn: list[Any] = [range_.draw(chance) for _ in range(500)]
    assert range_.grid == grid
    assert all(range_.low <= value <= range_.high for value in drawn)
    assert {type(value) for value in drawn} == {int if range_.whole else float}
    if grid is not None:
        assert set(drawn) == set(grid)
    if range_.log:
        assert 200 < sum(value <= 10 for value in drawn) < 300  # as many below 10 as above


def test_values_of_a_choice_keep_their_types() -> None:
    choice = Choice((1, True, 1.0, "1", None), ("int", "bool", "float", "text", "null"))
    assert [choice.value(label) for label in choice.labels] == list(choice.values)


@pytest.mark.parametrize("value", ["median", "{median: {startup_trials: 3, warmup_epochs: 2}}", "none"])
def test_pruning(tmp_path: Path, value: str) -> None:
    rule = search(tmp_path, f"{BASE}parameters: {{seed: [1]}}\ntrials: 1\nprune: {value}\n").sections.prune
    expected = {"median": MedianRule(), "none": None}
    assert rule == expected.get(value, MedianRule(startup_trials=3, warmup_epochs=2))


ONE = "parameters: {seed: [1, 2]}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "search.yaml: wants base, parameters and trials, not nothing (null): is it a search?"),
        ("base: [a: b", "search.yaml:1: not valid YAML: a comma or a closing bracket is missing"),
        (ONE + "trials: 1", "search.yaml:1: base: is missing"),
        ("base: nowhere.yaml\n" + ONE + "trials: 1", "search.yaml:1: base: nowhere.yaml: there is no such file"),
        (
            BASE + "parametres: {seed: [1]}\ntrials: 2",
            "search.yaml:4: parametres: unknown key; did you mean parameters?",
        ),
        (
            BASE + "parameters: {}\ntrials: 2",
            "search.yaml:4: parameters: wants a mapping from settings to their values",
        ),
        (BASE + ONE, "search.yaml:1: trials: random needs it: add trials: 50, say"),
        (BASE + ONE + "trials: 0", "search.yaml:5: trials: must be at least 1, not 0"),
        (BASE + ONE + "sampler: gird", "search.yaml:5: sampler: must be one of grid, random, tpe, not gird"),
        (BASE + ONE + "sampler: grid\ntrials: 3", "search.yaml:6: trials: the grid has 2 points, and all are tried"),
        (BASE + ONE + "trials: 3\nprune: mean", "search.yaml:6: prune: must be none, median, or median with"),
        (
            BASE + ONE + "trials: 3\nprune: {median: {startup: 3}}",
            "search.yaml:6: prune.median.startup: unknown key; did you mean startup_trials?",
        ),
        (BASE + "parameters:\n  seed: 3\ntrials: 3", "search.yaml:5: parameters.seed: wants a list of values, a range"),
        (BASE + "parameters:\n  seed: [1, 1]\ntrials: 3", "search.yaml:5: parameters.seed[1]: names 1 twice"),
        (
            BASE + "parameters:\n  seed: {low: 3, hihg: 5}\ntrials: 3",
            "search.yaml:5: parameters.seed.hihg: unknown key; did you mean high?",
        ),
        (
            BASE + "parameters:\n  seed: {low: 3, high: 2}\ntrials: 3",
            "search.yaml:5: parameters.seed.high: must be more than low (3), not 2",
        ),
        (
            BASE + "parameters:\n  train.clip_norm: {low: 0.0, high: 2.0, log: true}\ntrials: 3",
            "search.yaml:5: parameters.train.clip_norm.low: must be more than 0 with log, not 0",
        ),
        (
            BASE + "parameters:\n  train.clip_norm: {low: 0.5, high: 2.0}\nsampler: grid",
            "search.yaml:5: parameters.train.clip_norm: a grid needs a list of values, or a step",
        ),
        (
            BASE + "parameters:\n  seed: [1]\n  train.optimizer.adam.lrr: [0.1, 0.2]\ntrials: 3",
            "search.yaml:6: train.optimizer.adam.lrr: unknown key; did you mean lr?",
        ),
        (
            BASE + "parameters:\n  lr: [0.1, 0.2]\ntrials: 3",
            "search.yaml:5: lr: unknown key; did you mean train.optimizer.adam.lr?",
        ),
        (
            BASE + "parameters:\n  train.optimizer: [adma, sdg]\ntrials: 3",
            "search.yaml:5: train.optimizer: unknown optimizer 'adma'; did you mean adam?",
        ),
        (
            BASE + ONE + "trials: 3\nsettings:\n  model.layers: [{linear: $unit}]",
            "search.yaml:7: settings.model.layers[0].linear: there is no parameter 'unit'",
        ),
        (
            BASE + ONE + "trials: 3\nsettings:\n  model.layers: [{repeat: {times: -1, layers: []}}]",
            "search.yaml:7: settings.model.layers[0].repeat.times: wants a whole number from 0 to 1,000, not -1",
        ),
        (
            BASE.replace(", validation: 0.2", "") + ONE + "trials: 3",
            "search.yaml:2: data.validation: is 0: trials are compared by their accuracy on validation rows",
        ),
    ],
)
def test_mistakes_are_told_with_file_line_and_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        search(tmp_path, text)
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(told)


def test_a_value_that_is_wrong_beside_right_ones_is_the_trials_own(tmp_path: Path) -> None:
    made = search(tmp_path, BASE + "parameters:\n  train.batch_size: [-3, 16]\nsampler: grid\n")
    with pytest.raises(ConfigError, match=r"search.yaml:5: train.batch_size: must be at least 1, not -3"):
        made.config(made.grid_point(0))
    assert made.config(made.grid_point(1)).train.batch_size == 16


def test_the_searches_of_the_repository_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    found = {path.name: path for path in sorted((root / "configs" / "search").glob("*.yaml"))}
    assert list(found) == ["digits.yaml", "letters.yaml"]
    digits = read_search(str(found["digits.yaml"]))
    assert digits.trials == 24
    with pytest.raises(ConfigError, match="is a search of hyperparameters: nettorrent tune runs it"):
        load(str(found["digits.yaml"]))
    monkeypatch.chdir(root)
    letters = read_search(str(found["letters.yaml"]))
    assert letters.config(letters.first).data.name == "letters"
