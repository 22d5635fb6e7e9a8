"""A run with `stop_at: {patience: N}` ends after N evaluations without improvement; model.h5 is its best network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nettorrent_mpi.engine.model_file import opened, read_attributes

Told = tuple[int, str, str]
STEPS = 15  # of an epoch
CONFIG = """\
data: {name: synthetic, rows: 240, test_rows: 60, shape: [6], classes: 3, validation: 0.25}
model: {layers: [linear: {units: 8, activation: relu}, linear: 3]}
train: {epochs: 60, batch_size: 12, report_every: 7, optimizer: {adam: 0.1}, stop_at: {patience: 4}}
seed: 3
dtype: float64
kernels: numpy
"""


def command(config: Path, output: Path, *more: str, **changes: str) -> list[str | Path]:
    sets = [word for key, value in changes.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    return ["train", config, "--output", output, *more, *sets]


def results(run: Path, key: str = "validation_accuracy") -> tuple[dict[str, Any], int, list[float]]:
    """summary.json, the step of the best evaluation, and all figures; it is checked that the run has ended where it
    had to, and that its network is that of the best evaluation."""
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if key in line]
    figures = [line[key] for line in judged]
    best = min(range(len(judged)), key=lambda i: (figures[i] if key.endswith("loss") else -figures[i], i))
    assert summary["best_step"] == judged[best]["step"]
    assert summary["test_accuracy"] == judged[best]["test_accuracy"]
    assert summary["test_loss"] == pytest.approx(judged[best]["test_loss"], rel=1e-12)
    assert summary["stopped_by"] == "patience"
    assert len(judged) - 1 - best == 4
    assert summary["steps"] == judged[-1]["step"]
    with opened(run / "best.h5") as file:
        assert read_attributes(file)["step"] == summary["best_step"]
    return summary, judged[best]["step"], figures


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_best_network_is_kept(series: Callable[..., list[Told]], tmp_path: Path, ranks: int) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    runs = {name: tmp_path / name for name in ("whole", "parts", "loss", "gossip")}
    commands = [
        command(config, runs["whole"]),
        command(config, runs["parts"], train__epochs="2"),
        command(config, runs["parts"], "--resume"),
        command(config, runs["parts"], "--resume"),
        command(config, runs["loss"], train__stop_at="{patience: 4, metric: loss}"),
    ]
    if ranks > 1:
        gossip = {"layout": f"{{replicas: {ranks}}}", "exchange": "{gossip: {deadline: none}}"}
        commands.append(command(config, runs["gossip"], **gossip))
    told = series(ranks, tmp_path / "series", commands)
    summary, best, figures = results(runs["whole"])
    assert STEPS < best < summary["steps"]
    assert f"the best network, after step {best}, is kept as model.h5" in " ".join(told[0][1].split())
    parts, again, others = results(runs["parts"])
    assert (again, others, parts["steps"]) == (best, figures, summary["steps"])
    assert "is complete after step" in told[3][1]
    assert "train.stop_at.patience" in told[3][1]
    results(runs["loss"], "validation_loss")
    if ranks > 1:
        results(runs["gossip"])


@pytest.mark.slow
def test_a_best_network_that_is_lost_is_looked_for_anew(series: Callable[..., list[Told]], tmp_path: Path) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    series(1, tmp_path / "first", [command(config, run, train__epochs="2")])
    (run / "best.h5").unlink()
    ((_, first, others),) = series(1, tmp_path / "on", [command(config, run, "--resume")])
    assert "is not the network after step" in f"{first}{others}"
    assert "it is looked for anew" in " ".join(f"{first}{others}".split())
    assert json.loads((run / "summary.json").read_text())["best_step"] > 2 * STEPS
