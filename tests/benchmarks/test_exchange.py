"""The benchmark of exchanges: that its commands are what they say, and what is made of figures, traces and bytes."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nettorrent_mpi.config import reading as config
from nettorrent_mpi.plan import exchange_specs as choices
from nettorrent_mpi.plan import specs

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # benchmarks/ is no part of the package
    sys.path.append(str(ROOT))

exchange, accuracy, network, progress, runs, trace = (
    importlib.import_module(f"benchmarks.exchange{part}")
    for part in ("", "_accuracy", "_network", "_progress", "_runs", "_trace")
)


def loaded(file: str, settings: dict[str, str]) -> config.Config:
    command = runs.training(file, settings, "runs/exchange")
    return config.load(str(ROOT / file), [word for flag, word in pairwise(command) if flag == "--set"])


def weight_layers(made: config.Config) -> int:
    return sum(isinstance(layer, specs.Linear | specs.Conv2d) for layer in made.model.layers)


# -- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "side_name"), list(product(accuracy.CASES, accuracy.SIDES)))
def test_what_is_trained_for_accuracy(name: str, side_name: str) -> None:
    case, side = accuracy.CASES[name], accuracy.SIDES[side_name]
    made = loaded(case.config, accuracy.settings_of(case, side, 7, 3, Path("data"), True))
    assert (made.train.epochs, made.seed, made.data.validation) == (7, 3, 0.05)
    assert made.data.transposed is False
    assert weight_layers(made) == case.weight_layers
    if side.replicas == 4:
        assert isinstance(made.layout, config.Layout)
        assert made.layout.swarms is not None
        assert [(s.layers, s.rows, s.cols) for s in made.layout.swarms] == [(case.weight_layers, 1, 1)]
        assert made.layout.replicas == side.ranks == 4
    else:
        assert made.layout == "layers"
    exchanges = {"gossip": choices.Gossip(), "elite": choices.Elite(every_samples=10000)}
    assert made.exchange == exchanges.get(side_name, choices.Allreduce())
    assert made.pipeline == (choices.Async() if side_name == "async" else choices.OneFOneB())


def test_letters_are_transposed_unless_told() -> None:
    case, side = accuracy.CASES["letters"], accuracy.SIDES["exact"]
    assert loaded(case.config, accuracy.settings_of(case, side, 1, 1, Path("data"), False)).data.transposed


@pytest.mark.parametrize(("name", "side"), list(product(network.FAST, network.FAST_SIDES)))
def test_what_is_timed(name: str, side: str) -> None:
    case = network.FAST[name]
    made = loaded(case.config, network.settings_of(side, case.replicas, case.weight_layers, 50))
    assert weight_layers(made) == case.weight_layers
    assert (made.train.steps, made.train.batch_size) == (50, 128 * case.replicas)
    assert made.exchange.kind == side


@pytest.mark.parametrize(("pipeline", "ranks"), list(product(trace.PIPELINES, (2, 3))))
def test_what_is_traced(pipeline: str, ranks: int) -> None:
    made = loaded("configs/mnist_wide.yaml", trace.settings_of(pipeline, ranks, 20))
    assert made.trace
    assert made.pipeline.kind == pipeline
    assert isinstance(made.layout, config.Layout)
    assert made.layout.swarms is not None
    assert weight_layers(made) == sum(swarm.layers for swarm in made.layout.swarms) == ranks * trace.LAYERS + 1


def test_launchers() -> None:
    assert runs.Here("mpirun").words(1, "sent") == ["mpirun", "-n", "1"]
    assert "--oversubscribe" in runs.Here("mpirun").words(1000, "sent")
    slow, fast = (runs.Hosts("mpirun", rate).words(4, "sent") for rate in ("200mbit", None))
    assert slow == ["benchmarks/hosts", "-n", "4", "-r", "200mbit", "-b", "sent", "-m", "mpirun", "--"]
    assert "-r" not in fast


def test_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    options = exchange.parse(["--only", "accuracy", "--root", "data", "--epochs", "8", "cifar=3"])
    assert [exchange.epochs_of(case, options.epochs) for case in accuracy.CASES] == [8, 8, 3]
    assert exchange.epochs_of("mnist", exchange.parse(["--only"]).epochs) == 10
    for wrong, told in (
        (["--root", "data"], "root"),  # network needs it
        (["--only", "accuracy"], "--root"),
        (["--only", "trace", "--epochs", "cifar="], "number of epochs"),
        (["--only", "trace", "--epochs", "cifra=2"], "cifra"),
    ):
        with pytest.raises(SystemExit):
            exchange.parse(wrong)
        assert told in capsys.readouterr().err


def test_the_command_names_no_folders() -> None:
    told = exchange.command_line(["--root", "/home/me/data", "--only", "fast", "--results=/tmp/x"])
    assert told == "python -m benchmarks.exchange --root DIR --only fast --results=DIR"


@pytest.mark.parametrize("who", ["boundary", "thread"])
def test_whoever_lets_messages_move(who: str, tmp_path: Path, mpirun: Any) -> None:
    settings = progress.settings_of("gossip", 2, 4, 10) | {"model.layers": "[flatten, {linear: 10}]"}
    settings["layout"] = "{replicas: 2}"
    command = runs.training(network.WIDE, settings, str(tmp_path / "run"), ("benchmarks.exchange_progress", who))
    done = mpirun(2, command[1:])
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["exchange"]["rounds"] == 10


def test_bytes_of_a_step() -> None:
    assert network.bytes_per_step([1300, 2500], [300, 500], 10) == 150.0


# -- traces ------------------------------------------------------------------------------------------------------------

TIMES = st.floats(0.1, 10)


@given(st.integers(2, 5), st.integers(1, 6), TIMES, TIMES)
def test_bubble_of_equal_stages(stages: int, micro_batches: int, forward: float, backward: float) -> None:
    spans = trace.simulated("1f1b", stages, micro_batches, 6, [(forward, backward, 0.0)] * stages)
    expected = (stages - 1) / (micro_batches + stages - 1)
    assert trace.shares(spans, 2, 5)["bubble"] == pytest.approx(expected)


@given(st.integers(2, 4), st.integers(2, 5), st.data())
def test_a_stream_waits_for_its_slowest_stage(stages: int, micro_batches: int, data: st.DataObject) -> None:
    slow = data.draw(st.integers(0, stages - 1))
    costs = [(2.0, 4.0, 0.0) if s == slow else (1.0, 2.0, 0.0) for s in range(stages)]
    spans = trace.simulated("async", stages, micro_batches, 60, costs)
    assert trace.shares(spans, 20, 40)["compute"] == pytest.approx((1 + (stages - 1) / 2) / stages, rel=0.05)


def test_shares_and_costs() -> None:
    costs = [(1.0, 2.0, 0.5), (1.5, 2.5, 0.25)]
    spans = trace.simulated("1f1b", 2, 3, 8, costs)
    assert trace.costs_of(spans, 2, 6) == [pytest.approx(cost) for cost in costs]
    found = trace.shares(spans, 2, 6)
    seconds = trace.beginning(spans, 3) - trace.beginning(spans, 2)
    assert found["compute"] == pytest.approx(3 * (1 + 2 + 1.5 + 2.5) / (2 * seconds))
    assert found["update"] == pytest.approx((0.5 + 0.25) / (2 * seconds))
    assert found["bubble"] == pytest.approx(1 - found["compute"])


def chrome(spans: Any) -> str:
    """A trace.json of spans."""
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "rank 0"}}]
    events += [
        {
            "ph": "X", "pid": s.rank, "tid": 0, "name": str(s.action), "cat": s.action.kind, "ts": 1000 * s.begin,
            "dur": 1000 * (s.end - s.begin), "args": {"step": s.step},
        }
        for s in spans
    ]  # fmt: skip
    return json.dumps({"traceEvents": events})


@pytest.mark.parametrize("pipeline", trace.PIPELINES)
def test_traces_are_read_and_told(pipeline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    played = trace.simulated(pipeline, 2, trace.MICRO_BATCHES, 30, [(1.0, 2.0, 0.5), (1.25, 2.0, 0.5)])
    read = trace.read_trace(chrome(played))
    assert [(s.rank, s.action, s.step) for s in read] == [
        (s.rank, s.action, s.step) for s in sorted(played, key=lambda s: (s.begin, s.rank))
    ]
    monkeypatch.setattr(trace, "PIPELINES", (pipeline,))
    done = runs.Trained({"samples_per_second": 5120.0}, [], chrome(played), [])
    monkeypatch.setattr(trace, "train", lambda *_: done)
    told = trace.measure(2, 3, 0.5, "mpirun")["pipelines"][pipeline]
    assert told["steps_per_second"] == 10.0
    assert told["bubbles"] == [pytest.approx(told["shares"]["bubble"])] * 3
    assert told["simulated_bubble"] == pytest.approx(told["shares"]["bubble"], abs=0.02)
    assert told["even_bubble"] == pytest.approx(0.2 if pipeline == "1f1b" else 0.0, abs=1e-9)
    begin, end = min(s[3] for s in told["measured_spans"]), max(s[4] for s in told["measured_spans"])
    assert begin == 0.0
    assert end == pytest.approx(trace.beginning(played, 10) - trace.beginning(played, 7), abs=0.01)


# -- the report --------------------------------------------------------------------------------------------------------


def run_of(case: str, side: str, score: float, seed: int = 1, epochs: int = 2) -> dict[str, Any]:
    best = {"replica": 2, "test_accuracy": score - 0.01} if side == "gossip" else None
    return {
        "case": case, "side": side, "seed": seed, "epochs": epochs, "test_accuracy": score, "average": None,
        "best_replica": best, "by_epoch": [[1.0, score / 2], [2.0, score]], "train_seconds": 10.0 * seed,
    }  # fmt: skip


def about(commit: str) -> dict[str, Any]:
    blas = [{"internal_api": "openblas", "version": "0.3", "architecture": "Zen"}]
    host = {"cpu": "A", "cores": 2, "python": "3", "packages": {"numpy": "2", "torch": None}, "blas": blas}
    return {"host": {**host, "commit": commit, "date": "2026"}, "command": "python -m benchmarks.exchange"}


def test_figures_are_means_over_seeds() -> None:
    given_runs = [run_of("mnist", "exact", 0.98), run_of("mnist", "exact", 0.96, seed=2)]
    given_runs += [run_of("mnist", "gossip", 0.97), run_of("mnist", "gossip", 0.96, seed=2)]
    given_runs += [run_of("mnist", "elite", 0.9), run_of("letters", "gossip", 0.8)]
    rows = {(row["case"], row["side"]): row for row in accuracy.summarize(given_runs)}
    assert rows["mnist", "gossip"]["difference"] == pytest.approx(-0.005)
    assert rows["mnist", "gossip"]["best_replica"] == pytest.approx(0.955)
    assert rows["mnist", "exact"]["test_accuracy"] == pytest.approx(0.97)
    assert rows["mnist", "exact"]["range"] == pytest.approx(0.02)
    assert rows["mnist", "exact"]["train_seconds"] == 15.0
    assert rows["mnist", "exact"]["difference"] is None
    assert rows["mnist", "elite"]["difference"] is None  # other seeds
    assert rows["letters", "gossip"]["difference"] is None  # nothing to compare with
    longer = [run_of("mnist", "exact", 0.98), run_of("mnist", "gossip", 0.99, epochs=3)]
    assert accuracy.summarize(longer)[1]["difference"] is None


def test_what_is_measured_anew_takes_its_place() -> None:
    old = {"accuracy": {"runs": [run_of("mnist", "exact", 0.9), run_of("mnist", "gossip", 0.8)], "data": {"a": "1"}}}
    report = exchange.merge({}, old, about("old"))
    report = exchange.merge(report, {"trace": {"ranks": 2}}, about("old"))
    new = {"accuracy": {"runs": [run_of("mnist", "gossip", 0.85), run_of("cifar", "exact", 0.7)], "data": {"b": "2"}}}
    report = exchange.merge(report, new, about("new"))
    assert list(report) == ["accuracy", "trace"]
    found = [(r["case"], r["side"], r["test_accuracy"], r["commit"]) for r in report["accuracy"]["runs"]]
    assert found == [
        ("mnist", "exact", 0.9, "old"), ("mnist", "gossip", 0.85, "new"), ("cifar", "exact", 0.7, "new"),
    ]  # fmt: skip
    assert report["accuracy"]["data"] == {"a": "1", "b": "2"}
    assert report["accuracy"]["host"]["commit"] == "new"
    assert report["trace"]["host"]["commit"] == "old"
    assert "Commit old, new, 2026" in exchange.where("accuracy", report["accuracy"])[1]
    for case, speed in (("mnist-2", 1.0), ("mnist_wide-2", 2.0), ("mnist-2", 3.0)):
        report = exchange.merge(report, {"fast": {"cases": {case: {"speed": speed}}}}, about("new"))
    assert {case: told["speed"] for case, told in report["fast"]["cases"].items()} == {
        "mnist_wide-2": 2.0,
        "mnist-2": 3.0,
    }
    assert list(report["fast"]["cases"]) == ["mnist_wide-2", "mnist-2"]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A whole report of made-up figures, measured by the real functions."""
    rates = {"gossip": (25.0, 50.0), "exact": (1.0, 10.0), "ddp": (2.0, 8.0)}

    def train_side(side: Any, steps: int, hosts: int, launcher: Any) -> tuple[float, list[int], dict[str, Any] | None]:
        name = next(name for name, known in network.SIDES.items() if known is side)
        slow, fast = rates[name]
        return slow if launcher.rate else fast, [5_000_000 + 2_000_000 * steps] * hosts, None

    def train(file: str, settings: dict[str, str], ranks: int, launcher: Any) -> Any:
        score = 0.97 if settings["exchange"] == "gossip" else 0.98
        rate = {"gossip": 30.0, "allreduce": 20.0, "none": 40.0}[settings["exchange"]]
        summary = {
            "test_accuracy": score,
            "steps": 1170,
            "train_seconds": 50.0,
            "samples_per_second": rate * 128 * ranks,
        }
        return runs.Trained(summary, [{"epoch": 1.0, "test_accuracy": score}], None, [])

    def moved(file: str, settings: dict[str, str], ranks: int, launcher: Any, module: tuple[str, ...]) -> Any:
        assert settings["exchange.gossip.part"] == "0.0625"
        told = {"merged": 90.0, "late": 10.0, "waited_seconds": 0.5}
        speed = 12.5 * network.ROWS * ranks
        return runs.Trained({"samples_per_second": speed, "exchange": told}, [], None, [])

    def traced(file: str, settings: dict[str, str], ranks: int, launcher: Any) -> Any:
        played = trace.simulated(settings["pipeline"], ranks, trace.MICRO_BATCHES, 30, [(1.0, 2.0, 0.5)] * ranks)
        return runs.Trained({"samples_per_second": 512.0}, [], chrome(played), [])

    def measured(*args: Any) -> dict[str, Any]:
        return run_of(args[0], args[1], 0.98 if args[1] == "exact" else 0.975)

    monkeypatch.setattr(network, "train_side", train_side)
    monkeypatch.setattr(network, "train", train)
    monkeypatch.setattr(progress, "train", moved)
    monkeypatch.setattr(trace, "train", traced)
    monkeypatch.setattr(accuracy, "measure", measured)
    monkeypatch.setattr(accuracy, "digest", lambda root, names: dict.fromkeys(names, "abc"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    options: argparse.Namespace = exchange.parse(["--root", "data", "--repeats", "3", "--factor", "0.5"])
    pieces: Iterator[dict[str, Any]] = exchange.measure(options, "mpirun")
    made: dict[str, Any] = {}
    for piece in pieces:
        made = exchange.merge(made, piece, about("abcdef"))
    return made


def test_a_whole_report(report: dict[str, Any], tmp_path: Path) -> None:
    assert list(report) == list(exchange.TITLES)
    assert all(row["bytes_per_step"] == 2_000_000 for row in report["network"]["sides"])
    exchange.write(report, tmp_path, whole=False)
    assert [file.name for file in tmp_path.iterdir()] == ["exchange.json"]
    report = json.loads((tmp_path / "exchange.json").read_text())  # what a later run finds
    text = exchange.to_markdown(report)
    for line in (
        "| mnist | gossip, 4 replicas | 2 | 97.50 % | -0.50 |  | 96.50 % | 10 |",
        "| gossip | 200mbit | 25.00 | 0% | 40.0 | 2.00 |",
        "| gossip, 200mbit / PyTorch DDP, gloo, 200mbit | 12.50 |",
        "| gossip, 200mbit / gossip, unlimited | 0.50 |",
        "| gossip | 97.00 % | -1.00 |  | 50 |",
        "| exact | 98.00 % |  |  | 1,170 |",
        "| by a thread | 12.50 | 0% | 90.00 % | 5.0 |",
        "| mnist_wide | 2 | 30.0 | 20.0 | 40.0 | 1.50 | 0% |",
        "| 1f1b | 1.0 | 22.58 % | 3.23 % | 0.00 % | 19.35 % | 22.58 % | 20.00 % |",
        "| async | 1.0 | 4.00 % | 4.00 % | 0.00 % | 0.00 % | 4.00 % | 0.00 % |",
        "Commit abcdef, 2026. Made by `python -m benchmarks.exchange`.",
    ):
        assert line in text.splitlines()


def test_pictures(report: dict[str, Any], tmp_path: Path) -> None:
    plots = pytest.importorskip("benchmarks.exchange_plots", reason="matplotlib is not installed", exc_type=ImportError)
    for folder in ("once", "twice"):
        (tmp_path / folder).mkdir()
        plots.draw(report, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert names == ["exchange-accuracy.svg", "exchange-network.svg", "exchange-trace.svg"]
    for name in names:
        drawn = (tmp_path / "once" / name).read_text()
        assert drawn == (tmp_path / "twice" / name).read_text()
        assert len(drawn) < 150_000
        words = {element.text for element in ElementTree.fromstring(drawn).iter() if element.text}
        assert {"exchange-accuracy.svg": "cifar", "exchange-network.svg": "gossip, 200mbit"}.get(name, "F3") in words
