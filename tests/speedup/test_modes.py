"""What each mode lays over a configuration, on numbers of ranks that divide nothing, and why one is not possible."""

from __future__ import annotations

from typing import Any

import pytest

from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.reading import Config, Layout
from nettorrent_mpi.engine.setup import set_up
from nettorrent_mpi.plan.errors import ConfigError, UserError
from nettorrent_mpi.speedup import command, modes, sides

NAMES = list(modes.MODES)


def load(*changes: str) -> Config:
    """Of the built-in digits: four weight layers, the last of 10 units, batches of 32 in micro-batches of 8."""
    return configuration.load(None, changes)


def plan(mode: str, ranks: int, *changes: str, names: list[str] | None = None) -> modes.Candidate:
    config = load(*changes)
    shared = modes.baseline(config, names or [mode])
    _, setup = modes.serial(shared)
    return modes.plan(mode, config, shared, setup.network.facts, ranks)


def plans(names: list[str], ranks: int, *changes: str) -> list[modes.Candidate]:
    config = load(*changes)
    shared = modes.baseline(config, names)
    _, setup = modes.serial(shared)
    return modes.plans(names, config, shared, setup.network.facts, ranks)


def grids(made: modes.Candidate) -> tuple[int, list[tuple[int, int, int]]]:
    """(replicas, (layers, rows, cols) of each swarm)."""
    assert made.config is not None, made.impossible
    assert isinstance(made.config.layout, Layout)
    assert made.config.layout.swarms is not None
    return made.config.layout.replicas, [(s.layers, s.rows, s.cols) for s in made.config.layout.swarms]


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("rows", (1, [(4, 3, 1)])),
        ("cols", (1, [(4, 1, 3)])),
        ("replicas", (3, [(4, 1, 1)])),
        ("gossip", (3, [(4, 1, 1)])),
        ("elite", (3, [(4, 1, 1)])),
    ],
)
def test_three_ranks(mode: str, wanted: Any) -> None:
    assert grids(plan(mode, 3)) == wanted


@pytest.mark.parametrize("mode", ["gpipe", "1f1b", "zero_bubble", "async"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_pipelines_merge_neighbours(mode: str, ranks: int) -> None:
    made = plan(mode, ranks)
    replicas, swarms = grids(made)
    assert made.config is not None
    assert made.config.pipeline.kind == mode
    assert replicas == 1
    assert len(swarms) == ranks
    assert sum(layers for layers, _, _ in swarms) == 4
    assert all((rows, cols) == (1, 1) for _, rows, cols in swarms)


@pytest.mark.parametrize("ranks", [2, 3, 5, 7])
def test_what_is_possible_has_a_place_for_every_rank(ranks: int) -> None:
    for mode in NAMES:
        made = plan(mode, ranks)
        if made.config is None:
            assert made.impossible
            continue
        setup = set_up(made.config, ranks)
        assert setup.topology.size == ranks
        assert setup.layout_line == made.layout
        assert setup.options.micro_batches == made.micro_batches


@pytest.mark.parametrize(
    ("mode", "ranks", "changes", "why"),
    [
        ("1f1b", 5, [], "5 stages for 4 weight layers"),
        ("async", 6, [], "6 stages for 4 weight layers"),
        ("async", 2, ["train.clip_norm=1"], "train.clip_norm: is not possible with pipeline async"),
        ("cols", 11, [], "11 cols cannot divide the 10 units of linear2"),
        ("rows", 9, [], "9 ranks for 8 rows at a time"),
        ("replicas", 9, [], "9 ranks for 8 rows at a time"),
        ("gossip", 9, [], "leave 1 of the 9 replicas nothing to train on"),
    ],
)
def test_what_is_not_possible_is_told(mode: str, ranks: int, changes: list[str], why: str) -> None:
    made = plan(mode, ranks, *changes)
    assert made.config is None
    assert made.impossible is not None
    assert why in made.impossible


@pytest.mark.parametrize(
    ("names", "ranks", "wanted"),
    [
        (["1f1b", "layers", "gpipe"], 4, [("1f1b", ("layers",)), ("gpipe", ())]),
        (["layers"], 4, [("layers", ())]),  # not left out because of a mode that nobody measures
        (["layers", "rows", "1f1b"], 3, [("layers", ("1f1b",)), ("rows", ())]),
        (["layers", "1f1b"], 5, [("layers", ()), ("1f1b", ())]),  # the latter is impossible
        (["gpipe", "1f1b", "async"], 2, [("gpipe", ()), ("1f1b", ()), ("async", ())]),
        (["1f1b", "zero_bubble"], 2, [("1f1b", ()), ("zero_bubble", ())]),
        (["rows", "replicas", "gossip", "elite"], 2, [("rows", ()), ("replicas", ()), ("gossip", ()), ("elite", ())]),
    ],
)
def test_modes_that_do_the_same_are_one(names: list[str], ranks: int, wanted: Any) -> None:
    assert [(each.mode, each.also) for each in plans(names, ranks)] == wanted


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
def test_no_two_sides_do_the_same(ranks: int) -> None:
    made = plans(NAMES, ranks)
    assert sorted(mode for each in made for mode in (each.mode, *each.also)) == sorted(NAMES)
    work = [(c.layout, c.micro_batches, c.config.pipeline, c.config.exchange) for c in made if c.config is not None]
    assert len(work) == len(set(work))


def test_one_micro_batch_makes_both_pipelines_the_same() -> None:
    assert [(each.mode, each.also) for each in plans(["gpipe", "1f1b"], 2, "train.micro_batches=1")] == [
        ("gpipe", ("1f1b",))
    ]


def test_options_of_the_configuration_are_kept() -> None:
    gossip = plan("gossip", 2, "layout={replicas: 2}", "exchange={gossip: {pairing: ring, every: 3}}")
    assert gossip.config is not None
    assert (gossip.config.exchange.pairing, gossip.config.exchange.every) == ("ring", 3)  # type: ignore[attr-defined]
    late = plan("async", 2, "pipeline={async: {staleness_aware: true}}")
    assert late.config is not None
    assert late.config.pipeline.staleness_aware  # type: ignore[attr-defined]
    rows = plan("rows", 2, "layout={replicas: 2}", "exchange=gossip", "pipeline=async")
    assert rows.config is not None
    assert (rows.config.exchange.kind, rows.config.pipeline.kind) == ("allreduce", "1f1b")


def test_elite_keeps_rows_back_from_everybody() -> None:
    names = ["rows", "elite"]
    for mode in names:
        made = plan(mode, 2, names=names)
        assert made.config is not None
        assert made.config.data.validation == modes.VALIDATION
    without, given = plan("rows", 2), plan("elite", 2, "data.validation=0.2")
    assert without.config is not None
    assert given.config is not None
    assert (without.config.data.validation, given.config.data.validation) == (0.0, 0.2)


def test_measured_trainings_do_nothing_else() -> None:
    made = plan("rows", 2, "train.stop_at={accuracy: 0.5}", "train.epochs=3")
    assert made.config is not None
    timed = modes.timed(made.config, 30, trace=True)
    train = timed.train
    assert (train.steps, train.epochs, train.stop_at, timed.trace) == (30, None, None, True)
    assert min(train.report_every, train.evaluate_every) > 30
    assert {timed.checkpoint.every_steps, timed.checkpoint.every_seconds, timed.checkpoint.every_epochs} == {None}
    until = modes.until(made.config, 0.9).train
    assert until.stop_at is not None
    assert (until.stop_at.accuracy, until.epochs, until.evaluate_every) == (0.9, 3, 1)


def test_mistakes_of_the_configuration_are_no_row_of_the_table() -> None:
    config = load("data={name: mnist, root: nowhere}")
    with pytest.raises(UserError, match="nowhere"):
        modes.serial(modes.baseline(config, NAMES))
    with pytest.raises(ConfigError):
        load("train.batch_size=0")


def test_peers() -> None:
    _, setup = modes.serial(load())
    found = sides.peers(list(sides.PEERS), [1, 2, 40], setup)
    assert [side.name for side in found if side.mode == "ddp"] == ["ddp-2", "ddp-40"]  # one process is plain PyTorch
    assert [side.impossible is None for side in found if side.mode == "ddp"] == [True, False]
    assert [(side.threads, side.options) for side in found if side.cpus == 2] == [
        (2, []),
        (2, ["--channels-last"]),
        (2, ["--compile"]),
        (1, ["--processes", "2"]),
    ]


def test_peers_that_would_train_something_else() -> None:
    rows = "data={name: synthetic, rows: 64, shape: [6], classes: 3}"
    _, plain = modes.serial(load(rows, "model.layers=[{linear: 8}, {linear: 3}]"))
    why = {side.mode: side.impossible for side in sides.peers(list(sides.PEERS), [2], plain)}
    assert why["torch_channels_last"] == "the rows are not images"
    assert why["ddp"] is why["torch"] is None
    _, normed = modes.serial(load(rows, "model.layers=[{linear: 8}, batch_norm, {linear: 3}]"))
    why = {side.mode: side.impossible for side in sides.peers(list(sides.PEERS), [2], normed)}
    assert "batch norm" in str(why["ddp"])
    assert why["torch"] is None


def test_without_pytorch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is compared with it, and one line tells how it could be; asked for by name it is a mistake."""
    monkeypatch.setattr(sides, "torch_is_there", lambda: False)
    assert command._asked_peers(None) == []
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "pip install 'nettorrent_mpi[compare]'" in told
    assert command._asked_peers("none") == []
    with pytest.raises(ConfigError, match="not installed"):
        command._asked_peers("torch,ddp")
    monkeypatch.setattr(sides, "torch_is_there", lambda: True)
    assert command._asked_peers(None) == list(sides.PEERS)
    assert command._asked_peers("ddp,torch,ddp") == ["ddp", "torch"]


def test_what_computes_where() -> None:
    """Compared with a GPU, the modes use GPUs, or, where the configuration says so, CPU cores beside one."""
    assert command._device("gpu", load()) == command._device("gpu", load("device=gpu")) == "gpu"
    assert command._device("gpu", load("device=cpu")) == command._device("cpu", load()) == "cpu"
    for config in (load("device=gpu"), load("device=cpu")):
        device = command._device("gpu", config)
        shared = modes.baseline(config, ["rows"], device)
        one, setup = modes.serial(shared)
        rows, cols = (modes.plan(mode, config, shared, setup.network.facts, 11) for mode in ("rows", "cols"))
        assert cols.impossible
        assert [each.device for each in (one, rows, cols)] == [device] * 3
        assert one.config is not None
        assert one.config.device == device
    alone = modes.alone_on_gpu(modes.baseline(load(), ["rows"]))
    assert (alone.mode, alone.device, alone.ranks) == ("gpu", "gpu", 1)
    with pytest.raises(ConfigError, match="tf32 needs device: gpu"):
        modes.baseline(load("dtype=tf32"), ["rows"])
