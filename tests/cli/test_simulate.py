"""Predictions for other machines: `nettorrent simulate`, and `--nodes`, `--link`, `--memory` of a dry run."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from nettorrent_mpi.cli.arguments import parse
from nettorrent_mpi.cli.elsewhere import Elsewhere, elsewhere
from nettorrent_mpi.cli.simulate import simulate
from nettorrent_mpi.engine.profiles import Profiles
from nettorrent_mpi.plan.errors import ConfigError, LayoutError
from nettorrent_mpi.plan.performance import Link
from nettorrent_mpi.plan.stage_cost import RATE
from nettorrent_mpi.planning import load_config, plan_run


def simulated(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, list[str]], str]:
    """The table, by layout, and the whole text."""
    simulate(parse(["simulate", *words, "--profile", "none"]))
    text = capsys.readouterr().out
    table = text.split("\n\n")[1].splitlines()[1:]
    rows = [re.split(r"  +", line.strip()) for line in table]
    return {name: cells for names, *cells in rows for name in names.split(", ")}, text


def asked(*words: str) -> Elsewhere:
    return elsewhere(parse(["simulate", *words]))


def test_other_machines_are_read() -> None:
    assert asked() == Elsewhere()
    assert asked("--ranks", "7") == Elsewhere(7)
    assert asked("--nodes", "64x48", "--link", "100Gbit,2us") == Elsewhere(3072, 48, Link(2e-6, 12.5e9))
    assert asked("--nodes", "4x2", "--ranks", "7", "--link", "200mbit/s,0.5ms") == Elsewhere(7, 2, Link(5e-4, 25e6))
    assert asked("--nodes", "2x1", "--link", "1Gbit,1us,256kB").link == Link(1e-6, 125e6, 256e3)
    assert asked("--nodes", "2x1", "--link", "1Gbit").link == Link(Link.latency, 125e6)
    assert asked("--memory", "1.5GB").memory == 1.5e9
    assert asked("--memory", "2 GiB").memory == 2**31


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "64"], "--nodes 64: write nodes x cores of each, as 64x48"),
        (["--nodes", "0x4"], "--nodes 0x4: write"),
        (["--nodes", "9999999x9999"], "10,000,000 at most"),
        (["--ranks", "0"], "--ranks 0: from 1 to"),
        (["--nodes", "2x2", "--ranks", "5"], "--ranks 5: 2x2 nodes have 4 cores; raise --nodes"),
        (["--link", "1Gbit"], "--link is for several nodes: give --nodes"),
        (["--nodes", "2x2", "--link", "1GB,1us"], "--link 1GB,1us: write the rate of a node's link and the latency"),
        (["--nodes", "2x2", "--link", "0Gbit,1us"], "--link 0Gbit,1us: write"),
        (["--nodes", "2x2", "--link", "1Gbit,fast"], "as 100Gbit,2us"),
        (["--memory", "1e400GB"], "--memory 1e400GB: write a node's memory, as 256GB"),
        (["--memory=-1GB"], "--memory -1GB"),
    ],
)
def test_what_is_no_machine_is_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        asked(*words)


def test_layouts_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    table, text = simulated(capsys, "--ranks", "4")
    assert {"layers", "auto", "rows", "gossip", "no exchange", "one rank"} <= set(table)
    assert table["one rank"][0] == "1"
    assert table["one rank"][3] == "1.0"
    assert re.search(r"rows.*: 1 replica x \[conv2d1..linear2 4x1\]", text)
    steps = [float(row[1].split()[0]) for row in table.values()]
    assert steps == sorted(steps), "the fastest first"
    assert steps[0] == float(table["auto"][1].split()[0])


def test_slow_links_cost_time(capsys: pytest.CaptureFixture[str]) -> None:
    here, _ = simulated(capsys, "--nodes", "1x4")
    fast, text = simulated(capsys, "--nodes", "2x2", "--link", "100Gbit,2us")
    slow, _ = simulated(capsys, "--nodes", "2x2", "--link", "50Mbit,50us")
    steps = [float(table["rows"][1].split()[0]) for table in (here, fast, slow)]
    assert steps[0] < steps[1] < steps[2]
    # 36,000 weights of 4 bytes: 3/4 of them there and back over 6.25 MB/s
    assert steps[2] == pytest.approx(1e3 * 2 * 0.75 * 35_914 * 4 / (RATE * 6.25e6), rel=0.1)
    assert "on 2 nodes of 2 ranks, each joined to the others by 100 Gbit/s with 2 us" in " ".join(text.split())
    assert float(slow["auto"][1].split()[0]) < steps[2] / 2, "auto avoids what the link makes slow"


def test_a_hundred_thousand_ranks_are_planned_in_seconds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    began = time.process_time()
    words = ("--nodes", "2084x48", "--ranks", "100000", "--output", str(tmp_path / "steps.json"))
    table, text = simulated(capsys, *words)
    assert time.process_time() - began < 10
    assert table["rows"][0] == "100,000"
    assert "ranks at least are idle: a mini-batch has 32 rows" in text
    events = json.loads((tmp_path / "steps.json").read_text())["traceEvents"]
    assert len({event["pid"] for event in events}) == 4, "one rank of each stage"
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["args"]["step"] for event in spans} == {0, 1, 2}
    assert {event["name"] for event in spans} >= {"0F0", "3B3", "0R"}
    assert all(event["dur"] >= 0 for event in spans)


def test_memory_bounds_the_layout() -> None:
    config = load_config("configs/mnist_wide.yaml", "data.root=/nowhere", "layout=auto")
    free = plan_run(config, 8, "cpu", Profiles(node=2), data_needed=False)
    need = 2 * (max(each.total - each.rows for each in free.memory)) + max(each.rows for each in free.memory)
    same = plan_run(config, 8, "cpu", Profiles(node=2), data_needed=False, memory=2 * need)
    assert same.topology == free.topology
    with pytest.raises(LayoutError, match=r"needs \d\.\d GB on a node, which has 0\.1 GB: use more nodes"):
        plan_run(config, 8, "cpu", Profiles(node=2), data_needed=False, memory=1e8)
