"""The texts of a dry run: every rank is told once, shares add up, and nothing is wider than a screen."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from nettorrent_mpi.cli import dry_run as report
from nettorrent_mpi.config import reading as config
from nettorrent_mpi.plan.layouts import layers_layout
from nettorrent_mpi.plan.memory import Memory
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology

NAMES = ["conv2d1", "conv2d2", "conv2d3", "conv2d4", "linear1", "linear2"]
OPERATIONS = [5e6, 48e6, 21e6, 36e6, 7e6, 3e4]
FACTS = [
    LayerFacts(name, operations, 1000 * units, units, 4096, 64 * units)
    for name, operations, units in zip(NAMES, OPERATIONS, [32, 32, 64, 64, 512, 10], strict=True)
]


def setup(topology: Topology, *changes: str, facts: list[LayerFacts] = FACTS) -> Any:
    return SimpleNamespace(
        config=config.load(None, ["train.batch_size=128", "train.epochs=15", *changes]),
        dataset=SimpleNamespace(train=SimpleNamespace(rows=50_000)),
        sampler=SimpleNamespace(steps_per_epoch=391),
        steps=15 * 391,
        network=SimpleNamespace(facts=facts),
        topology=topology,
        options=SimpleNamespace(micro_batches=4),
        layout_line=topology.describe([f.name for f in facts]),
    )


def dry_run(run: Any, hosts: list[str] | None = None) -> str:
    """Each stage's largest rank holds one MB more than the one before."""
    memory = [Memory(parameters=(s + 1) * 10**6, libraries=60 * 10**6) for s in range(len(run.topology.stages))]
    return report.dry_run(run, memory, hosts)


def cells(table: str) -> list[list[str]]:
    return [re.split(r"  +", line.strip()) for line in table.splitlines()]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64, 1000])
def test_a_dry_run_fits_the_screen_for_any_number_of_ranks(ranks: int) -> None:
    hosts = [f"node{rank // 16}.cluster" for rank in range(ranks)]
    text = dry_run(setup(layers_layout(FACTS, ranks, 32)), hosts)
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert len(text.splitlines()) < 100
    assert f"= {ranks} rank" in " ".join(text.split())
    assert "50,000 training rows, 391 steps per epoch, 5,865 steps in all" in text
    assert "no deadlock" in text
    assert "predicted step" in text
    assert "node0" in text


def test_few_ranks_have_a_line_each() -> None:
    topology = Topology(2, (Stage(0, 3, 2, 1), Stage(3, 6, 1, 3)))
    header, *rows = cells(report.layout_table(topology, FACTS, 128, 4, ["a"] * 5 + ["b"] * 5))
    assert header == ["rank", "node", "replica", "stage", "layers", "row", "col", "parameters", "share of cost"]
    assert [row[0] for row in rows] == [str(rank) for rank in range(10)]
    assert rows[6] == ["6", "b", "1", "0", "conv2d1..conv2d3", "1", "0", "128,000", "15.81 %"]
    assert rows[2][4:8] == ["conv2d4..linear2", "0", "0", "197,000"]  # 22 of 64, 171 of 512, 4 of 10 units
    assert rows[4][7] == "194,000"  # 21 + 170 + 3
    assert sum(float(row[-1].removesuffix(" %")) for row in rows) == pytest.approx(100, abs=0.1)


def test_many_ranks_are_folded_and_all_there() -> None:
    for topology, lines in [
        (Topology(1, (Stage(0, 3, 8, 4), Stage(3, 6, 16, 4))), 24),  # a line per row of a team
        (Topology(4, (Stage(0, 3, 8, 4), Stage(3, 6, 16, 4))), 8),  # a line per team
        (Topology(50, (Stage(0, 3, 2, 1), Stage(3, 6, 2, 1))), 2),  # a line per stage
    ]:
        _, *rows = cells(report.layout_table(topology, FACTS, 12_800, 4))
        assert len(rows) == lines
        share = 0.0
        for row in rows:
            number, percent = re.fullmatch(r"(\d+) x ([\d.]+)(?:-[\d.]+)? %", row[-1]).groups()  # type: ignore[union-attr]
            share += int(number) * float(percent)
        assert share == pytest.approx(100, abs=0.5 * topology.size / 100)


def test_folded_ranges() -> None:
    _, *rows = cells(report.layout_table(Topology(50, (Stage(0, 3, 2, 1), Stage(3, 6, 2, 1))), FACTS, 12_800, 4))
    assert rows[0][:6] == ["0-1,4-5 +48 more", "0-49", "0", "conv2d1..conv2d3", "0-1", "0"]


def test_ranks_with_nothing_to_do_are_told() -> None:
    text = report.layout_table(Topology(1, (Stage(0, 6, 5, 1),)), FACTS, 8, 4)
    assert "3 of the 5 ranks stay idle" in text
    assert "0.00 %" in text
    assert "nothing to do" not in report.layout_table(Topology(1, (Stage(0, 6, 2, 1),)), FACTS, 8, 4)


def test_a_schedule_that_fits_is_told_whole() -> None:
    assert report.schedule_table("gpipe", 2, 2).splitlines() == [
        "time     0  1  2  3  4  5",
        "stage 0 F0 F1  .  . B0 B1",
        "stage 1  . F0 F1 B0 B1  .",
    ]


def test_a_pipeline_that_does_not_flush_shows_its_updates_up_to_a_drain() -> None:
    assert report.schedule_table("async", 2, 2).splitlines() == [
        "time      0   1   2   3   4   5   6   7   8   9",
        "stage 0  F0  F1   .  B0  F2 B1U  F3  B2   . B3U",
        "stage 1   .  F0  B0  F1 B1U  F2  B2  F3 B3U   .",
    ]
    text = dry_run(setup(layers_layout(FACTS, 2, 32), "pipeline=async", "train.micro_batches=1"))
    assert "(async: F forward, B backward, U update; 2 mini-batches up to a drain; checked for all 2 ranks" in text


@pytest.mark.parametrize(
    ("pipeline", "stages", "micro_batches"), [("1f1b", 6, 4), ("1f1b", 11, 16), ("gpipe", 3, 24), ("async", 5, 4)]
)
def test_a_wide_schedule_is_cut_into_pieces_that_hold_every_action(
    pipeline: str, stages: int, micro_batches: int
) -> None:
    text = report.schedule_table(pipeline, stages, micro_batches)
    assert max(map(len, text.splitlines())) <= report.WIDTH
    for m in range(micro_batches):
        assert len(re.findall(rf"\bF{m}\b", text)) == stages
        assert len(re.findall(rf"\bB{m}U?\b", text)) == stages


def test_a_very_long_schedule_tells_how_much_is_left_out() -> None:
    text = report.schedule_table("1f1b", 60, 200)
    assert re.search(r"\.\.\. and \d+ more time steps, 20 more stages$", text)
    assert len(text.splitlines()) < 4 * 45


def test_memory_is_told_by_what_it_is_for() -> None:
    memory = [Memory(parameters=12_345_678, rows=10**9, libraries=60 * 10**6), Memory(links=10**5, libraries=5 * 10**7)]
    header, *rows = cells(report.memory_table(memory))
    assert header == ["stage", "parameters", "links", "rows", "libraries", "total"]  # nothing else takes any
    assert rows[:2] == [["0", "12.3", "0.0", "1,000", "60.0", "1,072"], ["1", "0.0", "0.1", "0.0", "50.0", "50.1"]]
    assert "... and 3 more stages" in report.memory_table([Memory(rows=1)] * 43)


def test_replicas_that_differ_are_predicted_without_a_common_sum() -> None:
    topology = Topology(4, (Stage(0, 6, 2, 1),))

    def messages(change: str) -> str:
        found = re.search(r"([\d.]+ ms)$", report.stages_table(setup(topology, change)), re.MULTILINE)
        assert found
        return found[1]

    assert messages("exchange=none") == messages("exchange=gossip")
    assert messages("exchange=none") != messages("exchange=allreduce")


def test_blocks_stand_where_there_is_something_to_say() -> None:
    one, two = layers_layout(FACTS, 4, 32), Topology(2, (Stage(0, 3, 1, 1), Stage(3, 6, 1, 1)))
    for topology, change, blocks in (
        (one, "exchange=allreduce", ["LAYOUT", "SCHEDULE", "STAGES", "MEMORY"]),
        (one, "exchange=none", ["LAYOUT", "SCHEDULE", "STAGES", "MEMORY", "EXCHANGE"]),
        (one, "pipeline=async", ["LAYOUT", "SCHEDULE", "STAGES", "MEMORY", "STALENESS"]),
        (two, "exchange=allreduce", ["LAYOUT", "SCHEDULE", "STAGES", "MEMORY", "EXCHANGE"]),
        (two, "exchange=gossip", ["LAYOUT", "SCHEDULE", "STAGES", "MEMORY", "EXCHANGE"]),
    ):
        text = dry_run(setup(topology, change))
        assert re.findall(r"^[A-Z]{4,}", text, re.MULTILINE) == blocks
        assert max(map(len, text.splitlines())) <= report.WIDTH


def test_long_names_and_lines_are_cut_and_wrapped() -> None:
    facts = [LayerFacts("a" * 60, 1.0, 1, 1, 1, 1)] * 30
    text = dry_run(setup(layers_layout(facts, 30, 32), facts=facts))
    assert max(map(len, text.splitlines())) <= report.WIDTH
