"""The benchmark of speed: that all sides train the same, and how figures are summed up."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nettorrent_mpi.speedup.machine import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def speed() -> Any:
    sys.path.insert(0, str(ROOT))
    try:
        yield importlib.import_module("benchmarks.speed")
    finally:
        sys.path.remove(str(ROOT))


def test_every_case_is_a_training_of_one_rank_and_of_two(speed: Any) -> None:
    for case in speed.CASES.values():
        config = speed.settings(case)
        assert config.train.batch_size == case.batch
        _, setup = speed.modes.serial(config)
        two = speed.modes.plan("rows", config, config, setup.network.facts, 2)
        assert two.impossible is None, case.name
        assert setup.options.micro_batches == two.micro_batches
        known = {
            speed.OURS,
            speed.WIDE,
            speed.OURS_2,
            speed.STAGES,
            speed.PRODUCTS,
            *speed.PEERS,
            speed.SHALLOW,
            speed.SHALLOW_2,
        }
        assert set(case.sides) <= known


@pytest.mark.slow
def test_one_turn_of_every_side(speed: Any, tmp_path: Path) -> None:
    """A small network through the whole program, but for PyTorch where it is missing."""
    config = tmp_path / "small.yaml"
    config.write_text(
        "data: {name: digits}\nmodel: {layers: [flatten, linear: {units: 12, activation: relu}, linear: {units: 10}], "
        "loss: cross_entropy}\ntrain: {epochs: 1, batch_size: 32}\n"
    )
    data = "{name: synthetic, rows: 400, test_rows: 0, shape: [28, 28, 1], classes: 10}"
    there = speed.torch_is_there()
    against = speed.TORCH if there else speed.PRODUCTS
    aims = {(speed.OURS, against): 0.5, (speed.OURS, speed.PRODUCTS): 0.8, (speed.OURS, speed.SHALLOW): 3.5}
    case = speed.Case("small-32", str(config), 32, data, aims)
    told = speed.compare(case, 1, 0.01, speed.Launcher(None))
    assert [side["side"] for side in told["sides"]] == case.sides[: 3 + there]
    assert all(side["median"] > 0 for side in told["sides"])
    assert {(r["side"], r["against"]) for r in told["ratios"]} == {*list(aims)[:2], (speed.OURS_2, speed.OURS)}


@pytest.mark.slow
def test_kernels_are_compared_with_numpy_alone(speed: Any, tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(
        "data: {name: digits}\nmodel: {layers: [flatten, linear: {units: 10}]}\ntrain: {batch_size: 32}\n"
    )
    data = "{name: synthetic, rows: 400, test_rows: 0, shape: [28, 28, 1], classes: 10}"
    case = speed.Case("small-32", str(config), 32, data, {(speed.OURS, speed.TORCH): 2.0}).of_kernels
    told = speed.compare(case, 1, 0.01, speed.Launcher(None))
    assert [side["side"] for side in told["sides"]] == [speed.OURS, speed.NUMPY]
    assert [(r["side"], r["against"]) for r in told["ratios"]] == [(speed.OURS, speed.NUMPY)]


def test_medians_and_ratios(speed: Any) -> None:
    case = speed.Case("mlp-128", "c.yaml", 128, "", {(speed.OURS, speed.TORCH): 1.9, (speed.OURS_2, speed.DDP): 3.0})
    figures = {
        speed.OURS: [30.0, 10.0, 20.0],
        speed.OURS_2: [36.0, 35.0, 37.0],
        speed.TORCH: [8.0, 12.0, 10.0],
        speed.DDP: [18.0, 18.0, 18.0],
    }
    told = {"name": "mlp-128", **speed.summarize(case, figures)}
    rows = {row["side"]: row for row in told["sides"]}
    assert rows[speed.OURS]["median"] == 20.0
    assert rows[speed.OURS]["spread"] == 1.0
    ratios = {(r["side"], r["against"]): r["ratio"] for r in told["ratios"]}
    assert ratios == {(speed.OURS, speed.TORCH): 2.0, (speed.OURS_2, speed.DDP): 2.0, (speed.OURS_2, speed.OURS): 1.8}
    host = {"cpu": "A", "cores": 2, "python": "3", "packages": {"numpy": "2"}, "blas": [], "commit": "c", "date": "d"}
    table = speed.to_markdown({"repeats": 3, "host": host, "command": "speed", "cases": [told]})
    assert "| mlp-128 | 1 rank | PyTorch | **2.00** | 1.90 |" in table
    assert "| mlp-128 | 2 ranks, rows | PyTorch DDP, 2 processes | 2.00 | 3.00 |" in table
    assert "| mlp-128 | 2 ranks, rows | 1 rank | 1.80 |  |" in table
    assert "| mlp-128 | 2 ranks, rows | 36 | 6% |" in table


def test_the_products_of_a_network() -> None:
    command = [sys.executable, "-m", "benchmarks.products", "configs/mnist.yaml", "--steps", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["samples_per_second"] > 0


def test_the_processor_is_not_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    env = environment()
    assert "OPENBLAS_CORETYPE" not in env
    assert env["OMP_NUM_THREADS"] == env["OPENBLAS_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_where_a_step_goes(speed: Any, tmp_path: Path) -> None:
    config = tmp_path / "digits.yaml"
    config.write_text((ROOT / "configs" / "digits.yaml").read_text() + "kernels: fastest\n")
    command = [sys.executable, "-m", "benchmarks.inside", "--one", str(config), "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    took = json.loads(done.stdout.splitlines()[-1])
    layers = {name.split(",")[0] for name in took if "," in name}
    # A ReLU belongs to the layer before it.
    assert layers == {"Conv2d", "MaxPool2d", "Flatten", "Linear", "Dropout"}
    step, products = took.pop("step"), took.pop("products")
    assert 0 < products < step
    assert 0 < sum(took.values()) < 2 * step  # medians of parts need not add up
    host = {"cpu": "A", "cores": 2, "python": "3", "packages": {"numpy": "2"}, "blas": [], "commit": "c", "date": "d"}
    inside = importlib.import_module("benchmarks.inside")
    case = {"name": "x", "seconds": {"step": 1e-3, "products": 8e-4, "Linear, forward": 6e-4, "optimizer": 3e-4}}
    table = inside.to_markdown({"host": host, "steps": 5, "command": "inside", "cases": [case]})
    assert "**80% of it in products and convolutions**" in table
    assert "| everything else | 100 | 10.0% |" in table
