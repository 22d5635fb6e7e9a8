"""The order of a comparison's runs, and how long they are said to take: without starting any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.speedup import modes, sides
from nettorrent_mpi.speedup.comparison import Comparison
from nettorrent_mpi.speedup.machine import Launcher
from nettorrent_mpi.speedup.timetable import Job, Timetable


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Make a comparison of four modes and two peers on 2, 4 and 5 ranks, for a machine with four cores."""
    names = ["1f1b", "layers", "rows", "gossip"]
    config = configuration.load(None, [])
    shared = modes.baseline(config, names)
    one, setup = modes.serial(shared)
    plans = [one]
    for ranks in (2, 4, 5):
        plans += modes.plans(names, config, shared, setup.network.facts, ranks)
    everyone = [*sides.ours(plans), *sides.peers(["torch", "ddp"], [1, 2, 4, 5], setup)]
    results: dict[str, Any] = {"modes": names, "sides": [side.plain() for side in everyone], "traces": []}
    return Comparison(tmp_path, Launcher("true {ranks}", cores=4), plans, everyone, results, shared)


def test_sides_take_turns(comparison: Comparison) -> None:
    jobs = comparison._jobs(2, 100, 0.9)
    turn = ["serial-1", "1f1b-2", "rows-2", "gossip-2", "1f1b-4", "rows-4", "gossip-4"]
    turn += ["layers-5", "rows-5", "gossip-5"]
    turn += ["torch-1", "torch-2", "torch-4", "torch-5", "ddp-2", "ddp-4", "ddp-5"]
    largest = ["serial-1", "1f1b-4", "rows-4", "gossip-4"]
    assert [job.side for job in jobs if job.kind == "turn"] == turn * 2
    assert [job.side for job in jobs if job.kind == "trace"] == largest  # layers on 4 ranks is 1f1b
    assert [job.side for job in jobs if job.kind == "training"] == [*largest, "torch-4", "ddp-4"]
    assert [job.kind for job in jobs] == sorted((job.kind for job in jobs), key=["turn", "trace", "training"].index)
    assert not [job for job in comparison._jobs(1, 100, None) if job.kind == "training"]


def test_how_long_it_will_take() -> None:
    known: dict[str, float] = {}
    table = Timetable(known.get)
    first, second = (Job("turn", name, lambda: None) for name in ("a", "b"))
    trace, training = Job("trace", "b", lambda: None), Job("training", "a", lambda: None)
    assert table.left([]) == ""
    assert table.left([first, second]) == "2 runs left"  # nothing is known before the first
    table.turn = 30.0
    assert table.left([first, second, trace]) == "3 runs, about 1:30 left"
    table.took(first, 50.0)
    assert table.left([second, trace]) == "2 runs, about 1:20 left"  # the mean of both
    table.took(second, 70.0)
    table.took(trace, 1000.0)
    assert table.left([second, trace]) == "2 runs, about 2:20 left"
    assert table.left([training]) == "1 run, up to about 0:50 left"
    known["a"] = 3600.0
    assert table.left([training, trace]) == "2 runs, up to about 1:01:10 left"


def test_the_longest_training_is_that_of_the_configuration(comparison: Comparison) -> None:
    assert comparison._longest_training("rows-2") is None
    comparison._entry("rows-2")["samples_per_second"] += [90.0, 100.0, 200.0]
    one = comparison._plans["serial", 1]
    assert one.config is not None
    assert comparison._longest_training("rows-2") == one.steps * one.config.train.batch_size / 100
