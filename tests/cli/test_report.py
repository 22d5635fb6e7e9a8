"""The texts of a dry run: every rank is told once, shares add up, and nothing is wider than a screen."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nettorrent_mpi as nt
from nettorrent_mpi.cli import dry_run as report
from nettorrent_mpi.cli.layout_report import layout_table
from nettorrent_mpi.cli.speed_report import _duration, speed_block
from nettorrent_mpi.comm import library
from nettorrent_mpi.config import reading as config
from nettorrent_mpi.engine.layout import predicted
from nettorrent_mpi.engine.memory_estimate import Libraries, estimate
from nettorrent_mpi.engine.run_plan import Options, Plan
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.nn.rates import Rates
from nettorrent_mpi.plan.layouts import layers_layout
from nettorrent_mpi.plan.memory import Memory
from nettorrent_mpi.plan.performance import Machine
from nettorrent_mpi.plan.topology import LayerFacts, Stage, Topology
from nettorrent_mpi.planning import PlannedRun

NAMES = ["conv2d1", "conv2d2", "conv2d3", "conv2d4", "linear1", "linear2"]
OPERATIONS = [5e6, 48e6, 21e6, 36e6, 7e6, 3e4]
FACTS = [
    LayerFacts(name, operations, 1000 * units, units, 4096, 64 * units)
    for name, operations, units in zip(NAMES, OPERATIONS, [32, 32, 64, 64, 512, 10], strict=True)
]


WHOLE = Network([nt.Flatten(), nt.Linear(8, activation="relu"), nt.Linear(10)], (32, 32, 3)).whole


def setup(topology: Topology, *changes: str, facts: list[LayerFacts] = FACTS) -> Any:
    whole = config.load(None, ["train.batch_size=128", "train.epochs=15", *changes])
    network: Any = SimpleNamespace(facts=facts, has_batch_norm=False, input_shape=(32, 32, 3), whole=WHOLE)
    options = Options(whole.model.loss, whole.train.optimizer, 128, pipeline=whole.pipeline, exchange=whole.exchange)
    return SimpleNamespace(
        config=whole,
        plan=Plan(network, topology, options),
        dataset=SimpleNamespace(train=SimpleNamespace(rows=50_000), missing=None),
        sampler=SimpleNamespace(steps_per_epoch=391),
        steps=15 * 391,
        rates_line=f"{Rates(0.00004, 0.004, 0.0)} (cosine)",
        network=network,
        topology=topology,
        options=options,
        layout_line=topology.describe([f.name for f in facts]),
        machine=Machine(),
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
    assert "rate      4e-05 in the first step, at most 0.004, 0 in the last step (cosine)\n" in text
    assert "no deadlock" in text
    assert "SPEED (predicted)" in text
    assert "node0" in text


def test_few_ranks_have_a_line_each() -> None:
    topology = Topology(2, (Stage(0, 3, 2, 1), Stage(3, 6, 1, 3)))
    header, *rows = cells(layout_table(topology, FACTS, 128, 4, ["a"] * 5 + ["b"] * 5))
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
        _, *rows = cells(layout_table(topology, FACTS, 12_800, 4))
        assert len(rows) == lines
        share = 0.0
        for row in rows:
            number, percent = re.fullmatch(r"(\d+) x ([\d.]+)(?:-[\d.]+)? %", row[-1]).groups()  # type: ignore[union-attr]
            share += int(number) * float(percent)
        assert share == pytest.approx(100, abs=0.5 * topology.size / 100)


def test_folded_ranges() -> None:
    _, *rows = cells(layout_table(Topology(50, (Stage(0, 3, 2, 1), Stage(3, 6, 2, 1))), FACTS, 12_800, 4))
    assert rows[0][:6] == ["0-1,4-5 +48 more", "0-49", "0", "conv2d1..conv2d3", "0-1", "0"]


def test_ranks_with_nothing_to_do_are_told() -> None:
    text = layout_table(Topology(1, (Stage(0, 6, 5, 1),)), FACTS, 8, 4)
    assert "3 of the 5 ranks stay idle" in text
    assert "0.00 %" in text
    assert "nothing to do" not in layout_table(Topology(1, (Stage(0, 6, 2, 1),)), FACTS, 8, 4)


def test_a_schedule_that_fits_is_told_whole() -> None:
    assert report.schedule_table("gpipe", 2, 2).splitlines() == [
        "time     0  1  2  3  4  5",
        "stage 0 F0 F1  .  . B0 B1",
        "stage 1  . F0 F1 B0 B1  .",
    ]


def planned(stages: int, *changes: str) -> PlannedRun:
    """A network of eight linear layers in so many equal stages."""
    swarms = ", ".join([f"{{layers: {8 // stages}}}"] * stages)
    layers = ", ".join(["{linear: {units: 40, activation: relu}}"] * 7 + ["{linear: 10}"])
    given = [f"layout={{swarms: [{swarms}]}}", f"model.layers=[flatten, {layers}]", "train.batch_size=256"]
    return nt.plan(config.load(None, [*given, "train.micro_batches=8", *changes]), ranks=stages)


def test_a_split_pipeline_shows_its_halves_and_what_clipping_costs() -> None:
    text = str(planned(2, "pipeline=zero_bubble"))
    assert "SCHEDULE (zero_bubble: F forward, I gradients of inputs, W of weights; checked for all 2 ranks" in text
    assert re.search(r"^stage 0 F0 F1 .*I0 .*W7$", text, re.MULTILINE)
    assert "clipping" not in text
    told = "clipping  brings a bubble back: all stages wait for the norm of all gradients before they update"
    assert told in str(planned(2, "pipeline=zero_bubble", "train.clip_norm=1"))
    assert told not in str(planned(2, "train.clip_norm=1"))
    alone = str(planned(1, "pipeline=zero_bubble", "train.clip_norm=1"))
    assert "F forward, B backward" in alone
    assert told not in alone


@pytest.mark.parametrize(
    "changes",
    [
        ["train.batch_size=256"],
        ["train.micro_batches=auto", "train.batch_size=16384", "data={name: synthetic, rows: 20000, shape: [8, 8, 1]}"],
    ],
)
def test_a_split_pipeline_says_what_more_memory_would_gain(changes: list[str]) -> None:
    """The line gives the seconds and bytes that both plans predict."""
    plain = planned(4, "pipeline=zero_bubble", *changes)
    found = re.search(
        r"\nstored    at most 4 micro-batches in a stage\. With (\d) \(--set pipeline='\{zero_bubble: \1\}'\) a step "
        r"is predicted to take (\S+) instead of (\S+) ms, and a rank of stage (\d) (\S+) MB more",
        re.sub(r"\n +", " ", str(plain)),
    )
    assert found
    most, after, before, stage, megabytes = found.groups()
    other = planned(4, f"pipeline={{zero_bubble: {most}}}", *changes)
    takes = []
    for made, milliseconds in ((plain, before), (other, after)):
        setup = made.setup
        step = predicted(setup.config, setup.network, setup.topology, setup.machine)
        assert f"{1e3 * step.seconds:.3g}" == milliseconds
        takes.append([memory.total for memory in estimate(setup, Libraries(0, 0))])
    more = [b - a for a, b in zip(*takes, strict=True)]
    assert more[int(stage)] == max(more) > 0
    assert f"{max(more) / 1e6:,.1f}" == megabytes
    for enough in ("{zero_bubble: 7}", "1f1b"):
        assert "\nstored    " not in str(planned(4, f"pipeline={enough}", *changes))


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
        (one, "exchange=allreduce", ["NETWORK", "LAYOUT", "SCHEDULE", "STAGES", "SPEED", "MEMORY"]),
        (one, "exchange=none", ["NETWORK", "LAYOUT", "SCHEDULE", "STAGES", "SPEED", "MEMORY", "EXCHANGE"]),
        (one, "pipeline=async", ["NETWORK", "LAYOUT", "SCHEDULE", "STAGES", "SPEED", "MEMORY", "STALENESS"]),
        (two, "exchange=allreduce", ["NETWORK", "LAYOUT", "SCHEDULE", "STAGES", "SPEED", "MEMORY", "EXCHANGE"]),
        (two, "exchange=gossip", ["NETWORK", "LAYOUT", "SCHEDULE", "STAGES", "SPEED", "MEMORY", "EXCHANGE"]),
    ):
        text = dry_run(setup(topology, change))
        assert re.findall(r"^[A-Z]{4,}", text, re.MULTILINE) == blocks
        assert max(map(len, text.splitlines())) <= report.WIDTH


def test_long_names_and_lines_are_cut_and_wrapped() -> None:
    facts = [LayerFacts("a" * 60, 1.0, 1, 1, 1, 1)] * 30
    text = dry_run(setup(layers_layout(facts, 30, 32), facts=facts))
    assert max(map(len, text.splitlines())) <= report.WIDTH


def test_a_line_for_each_layer() -> None:
    network = Network([nt.Conv2d(4, kernel=3, activation="relu"), nt.Flatten(), nt.Linear(10)], (8, 8, 1))
    header, *rows = cells(report.network_table(network))
    assert header == ["layer", "outputs", "parameters", "cost"]
    assert [row[:3] for row in rows[1:]] == [
        ["conv2d1, relu", "6 x 6 x 4", "40"],
        ["flatten1", "144", "0"],
        ["linear1", "10", "1,450"],
    ]
    assert rows[0] == ["input", "8 x 8 x 1"]
    assert sum(float(row[3].removesuffix(" %")) for row in rows[1:]) == pytest.approx(100, abs=0.2)
    many = Network([nt.Linear(3)] * 50, (8,))
    assert report.network_table(many).endswith("... and 11 more layers")


def cifar(ranks: int, *changes: str) -> PlannedRun:
    """No file of the data set is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nt.NetTorrentWarning)
        return nt.plan(nt.load_config("configs/cifar.yaml", "data.root=/nowhere", *changes), ranks=ranks)


def test_the_default_layout_stands_beside_auto_and_fewer_ranks() -> None:
    planned = cifar(64)
    text = str(planned)
    assert "cifar10 (not here; as published): 50,000 training rows, 782 steps per epoch, 7,820 steps in all" in text
    speed = text.split("\nSPEED (predicted)\n")[1].split("\n\n", maxsplit=1)[0]
    header, *rows = cells(speed)
    assert header == ["ranks", "layout", "step", "samples/s", "waiting", "whole run"]
    assert [row[:2] for row in rows[:4]] == [["64", "layers"], ["64", "auto"], ["16", "layers"], ["1", "layers"]]
    assert rows[0][2] == f"{1e3 * planned.seconds_per_step:.3g} ms"
    assert rows[0][5] == f"{7820 * planned.seconds_per_step:.0f} s"
    assert rows[1][2] == f"{1e3 * cifar(64, 'layout=auto').seconds_per_step:.3g} ms"
    assert "auto: 1 replica x [conv2d1..linear2 64x1]" in speed
    assert "layout: auto is predicted to be 7.4 times as fast (--set layout=auto)" in speed
    assert "100 GFLOP/s" in speed
    assert "no faster than" not in speed
    assert len(planned.warnings) == 1
    assert planned.warnings[0].startswith(
        "layout: layers is predicted to take 7.4 times as long as auto (94 s, not 13 s"
    )


def test_more_ranks_that_are_slower_are_told_of() -> None:
    planned = cifar(256)
    assert "256 ranks are predicted to be no faster than 64" in speed_block(planned.setup)
    assert "layout: layers is predicted to be slower on 256 ranks than on 64 (102 s, not 94 s" in planned.warnings[1]


@pytest.mark.parametrize("changes", [("layout=auto",), ("train.steps=60", "train.schedule=cosine")])
def test_nobody_is_warned_who_does_not_wait(changes: tuple[str, ...]) -> None:
    assert cifar(64, *changes).warnings == ()


def test_replicas_that_differ_are_not_compared_with_one_network() -> None:
    text = speed_block(cifar(4, "layout={replicas: 4}", "exchange=gossip").setup)
    assert "auto" not in text
    assert "    4  as given" in text
    same = cifar(2, "layout={swarms: [{layers: 6, rows: 2}]}")
    assert "auto: the same layout" in speed_block(same.setup)


def test_copies_are_told_with_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "loaded", lambda: False)  # other tests may have loaded MPI

    def told(*changes: str) -> str:
        return " ".join(cifar(4, *changes).describe().split())

    assert "after every 16 steps a rank copies what it owns" in told("redundancy=buddy")
    assert "to a buddy: about 0.98 % of the time" in told("redundancy=buddy")
    assert "after every step a rank copies what it owns" in told("redundancy={buddy: {every_steps: 1}}")
    assert "about 16 % of the time" in told("redundancy={buddy: {every_steps: 1}}")
    assert "none: a run survives lost ranks under" in told()


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.0123, "0.012 s"), (9.94, "9.9 s"), (94.2, "94 s"), (120, "2 min"), (1e4, "2.8 h")]
)
def test_durations(seconds: float, told: str) -> None:
    assert _duration(seconds) == told


def test_a_run_needs_the_data_that_its_plan_did_not(tmp_path: Path) -> None:
    with pytest.raises(nt.DataError, match=r"data_batch_1.bin: no such file; run `nettorrent data fetch cifar10`"):
        nt.Trainer(cifar(1))
    with pytest.raises(nt.DataError, match="no such file"):
        nt.plan(nt.load_config("configs/cifar.yaml", f"data.root={tmp_path}"), data_needed=True)
    damaged = tmp_path / "cifar-10-batches-bin"
    damaged.mkdir()
    (damaged / "data_batch_1.bin").write_bytes(b"x")
    with pytest.raises(nt.DataError, match="truncated"):
        nt.plan(nt.load_config("configs/cifar.yaml", f"data.root={tmp_path}"))
