"""Whole runs of replicas that differ: what is told of them, what is saved, and when they end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.engine.model_file import read_arrays
from nettorrent_mpi.plan.gossip_rules import GROWTH

CONFIG = """\
dtype: float64
data: {name: synthetic, rows: 320, test_rows: 50, shape: [6], classes: 3, validation: 0.2}
model: {layers: [{linear: {units: 12, activation: tanh}}, {dropout: 0.1}, {linear: {units: 3}}]}
train: {epochs: 2, batch_size: 32, micro_batches: 2, optimizer: {sgd: {lr: 0.2}}, report_every: 2}
layout: {replicas: 2, swarms: [{layers: 2}]}
"""
GOSSIP = "deadline: none, part: 0.5"
NEVER = "deadline: none, probability: 0.0000001"  # nobody exchanges anything
ADAM = {"train.optimizer": "{adam: 0.01}", "train.schedule": "constant", "train.report_every": 1}
REACHED = {"train.stop_at": "{accuracy: 0.9}", "train.evaluate_every": 50}  # only comparisons evaluate, until the end
RUNS: dict[str, dict[str, Any]] = {
    "gossip": {"exchange": f"{{gossip: {{{GOSSIP}}}}}", "checkpoint.every_epochs": 2},
    "without test rows": {"exchange": f"{{gossip: {{{GOSSIP}}}}}", "data.test_rows": 0, "train.steps": 3},
    "elite": {"exchange": "{elite: {every_samples: 96, metric: validation_accuracy}}"},
    "none": {"exchange": "none"},
    "by training loss": {"exchange": "none", "data.validation": 0, "data.partition": "disjoint"},
    "not begun": {"exchange": "none", "data.validation": 0, "train.steps": 0},
    "reached": {"exchange": "{elite: 96}", "train.epochs": 50, **REACHED},
    "apart": {"exchange": f"{{gossip: {{{NEVER}}}}}", "train.report_every": 1},
    "bound": {"exchange": f"{{gossip: {{{NEVER}, consensus: {{max: 0.02}}}}}}", "train.report_every": 1},
    "no bound": {"exchange": f"{{gossip: {{{NEVER}, consensus: {{max: 1000000}}}}}}", "train.report_every": 1},
    "tight": {"exchange": f"{{gossip: {{{NEVER}, consensus: {{max: 0.0000001}}}}}}", "train.report_every": 1},
    "exact": {"exchange": "allreduce", "train.report_every": 1},
    "adam": {"exchange": f"{{gossip: {{{NEVER}}}}}", **ADAM},
    "slower": {"exchange": f"{{gossip: {{{NEVER}, rate_factor: 0.5}}}}", **ADAM},
    "sgd": {"exchange": f"{{gossip: {{{NEVER}}}}}", **ADAM, "train.optimizer": "{sgd: 0.01}"},
}


class Done:
    def __init__(self, folder: Path, evaluation: str):
        self.folder, self.evaluation = folder, evaluation
        self.summary = json.loads((folder / "summary.json").read_text())
        self.metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        self.arrays = read_arrays(folder / "model.h5")

    def distances(self) -> list[float]:
        return [record["consensus_distance"] for record in self.metrics]

    def evaluated(self, name: str) -> tuple[str, str]:
        """Loss and accuracy in per cent that `nettorrent evaluate` has told of model.h5."""
        found = re.search(rf"{name}: loss ([\d.]+), accuracy ([\d.]+) %", self.evaluation)
        assert found, self.evaluation
        return found[1], found[2]


def printed(figures: dict[str, Any], name: str) -> tuple[str, str]:
    return f"{figures[f'{name}_loss']:.4f}", f"{100 * figures[f'{name}_accuracy']:.2f}"


@pytest.fixture(scope="module")
def runs(series: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Every run, and an evaluation of each, on two ranks."""
    root = tmp_path_factory.mktemp("replica_runs")
    (root / "config.yaml").write_text(CONFIG)
    commands = []
    for name, changes in RUNS.items():
        sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
        if "train.steps" in changes:
            sets += ["--set", "train.epochs=null"]
        commands.append(["train", str(root / "config.yaml"), "--output", str(root / name), *sets])
        commands.append(["evaluate", str(root / name)])
    told = series(2, root / "series", commands)
    return {name: Done(root / name, told[2 * i + 1][1]) for i, name in enumerate(RUNS)}


@pytest.mark.parametrize(
    ("name", "final", "chosen_by"),
    [
        ("gossip", "average", "validation_loss"),
        ("elite", "best_replica", "validation_accuracy"),
        ("none", "best_replica", "validation_loss"),
        ("by training loss", "best_replica", "train_loss"),
    ],
)
def test_what_the_summary_says_of_replicas(runs: dict[str, Done], name: str, final: str, chosen_by: str) -> None:
    done = runs[name]
    summary = done.summary
    average, best = summary["average"], summary["best_replica"]
    assert best["chosen_by"] == chosen_by
    assert best["replica"] in (0, 1)
    assert {key: summary[key] for key in ("test_accuracy", "test_loss")} == {
        key: summary[final][key] for key in ("test_accuracy", "test_loss")
    }
    assert average["test_loss"] != best["test_loss"], "they differ"
    assert summary["exchange"]["kind"] == (name if name in ("gossip", "elite") else "none")
    assert done.evaluated("test") == printed(summary, "test"), "model.h5 is what the summary tells of"
    if chosen_by != "train_loss":
        assert done.evaluated("validation") == printed(summary[final], "validation")
    assert all(record["consensus_distance"] > 0 for record in done.metrics)
    told = [record for record in done.metrics if "test_loss" in record]
    assert len(told) == 2
    assert [record["step"] for record in told] == [summary["steps"] // 2, summary["steps"]]
    assert (told[-1]["test_loss"], told[-1]["test_accuracy"]) == (summary["test_loss"], summary["test_accuracy"])
    assert ("best_replica" in told[-1]) == (final == "best_replica")
    if final == "best_replica":
        assert told[-1]["best_replica"] == best["replica"]


def test_one_network_has_no_average_and_no_distance(runs: dict[str, Done]) -> None:
    assert not {"average", "best_replica"} & set(runs["exact"].summary)
    assert all("consensus_distance" not in record for record in runs["exact"].metrics)


def test_neither_test_rows_nor_steps_are_needed(runs: dict[str, Done]) -> None:
    nothing = {"test_loss": None, "test_accuracy": None}
    assert nothing.items() <= runs["without test rows"].summary["average"].items()
    assert nothing.items() <= runs["without test rows"].summary.items()
    begun = runs["not begun"].summary
    assert begun["steps"] == 0
    assert begun["average"].items() <= begun["best_replica"].items(), "all are as in the beginning"
    assert runs["not begun"].evaluated("test") == printed(begun, "test")


def test_elite_ends_when_the_winner_is_good_enough(runs: dict[str, Done]) -> None:
    summary = runs["reached"].summary
    assert summary["stopped_by"] == "accuracy"
    assert summary["steps"] % 3 == 0, "comparisons are 96 rows apart"
    assert summary["steps"] < 50 * 8, "it ended early"
    assert float(runs["reached"].evaluated("validation")[1]) >= 90
    assert summary["best_replica"]["validation_accuracy"] >= 0.9


def test_replicas_that_are_too_far_apart_are_averaged(runs: dict[str, Done]) -> None:
    """After that a step takes them no further apart than where they are averaged after every step."""
    apart, bound, tight = (runs[name].distances() for name in ("apart", "bound", "tight"))
    assert max(apart) > 0.04
    far = [distance > 0.02 for distance in bound[:-1]]
    assert set(far) == {True, False}
    for was_far, distance, of_one_step in zip(far, bound[1:], tight[1:], strict=True):
        if was_far:
            assert distance == pytest.approx(of_one_step, rel=0.1)
        else:
            assert distance < 0.02 + 1.5 * max(tight)
    assert sum(apart) > 1.1 * sum(bound)


def test_a_high_bound_changes_nothing(runs: dict[str, Done]) -> None:
    assert runs["no bound"].distances() == runs["apart"].distances()
    for key, array in runs["apart"].arrays.items():
        np.testing.assert_array_equal(runs["no bound"].arrays[key], array)


def test_averaging_after_every_step_is_the_exact_exchange(runs: dict[str, Done]) -> None:
    """With plain gradient descent and equal parts of the rows the average of the steps is the step of the average."""
    for key, array in runs["exact"].arrays.items():
        np.testing.assert_allclose(runs["tight"].arrays[key], array, rtol=0, atol=1e-12, err_msg=key)
    tight = runs["tight"].summary
    assert tight["average"].items() <= tight["best_replica"].items()


def test_replicas_have_rates_of_their_own(runs: dict[str, Done]) -> None:
    """With Adam up to sqrt(2) times a constant rate, for two replicas, after GROWTH of the run; none with SGD."""
    rates = {name: [record["learning_rate"] for record in runs[name].metrics] for name in ("adam", "slower", "sgd")}
    steps = len(rates["adam"])
    assert steps == runs["adam"].summary["steps"] > 10
    factors = [1 + (2**0.5 - 1) * min(n / steps / GROWTH, 1) for n in range(steps)]
    assert rates["adam"] == pytest.approx([0.01 * factor for factor in factors])
    assert rates["slower"] == pytest.approx([0.005] * steps)
    assert rates["sgd"] == pytest.approx([0.01] * steps)
