"""The schema of configurations and the loader agree, and every option is described."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nettorrent_mpi.config import reading, yaml_lines
from nettorrent_mpi.config.default import DEFAULT, SHIPPED
from nettorrent_mpi.config.schema import schema
from nettorrent_mpi.plan.errors import ConfigError
from tests.conftest import ROOT

SCHEMA = schema()
CHECK = jsonschema.Draft7Validator(SCHEMA)
BASE = """
data: {name: digits}
model: {layers: [{linear: {units: 32, activation: relu}}, {linear: 10}], loss: cross_entropy}
"""
RIGHT = [
    BASE,
    BASE + "train: {steps: 0, optimizer: {sgd: {lr: 0.1, momentum: 0.9}}, schedule: {step: {every_epochs: 2}}}\n",
    BASE + "exchange: {gossip: {mix: {linear: {target: 5}}, part: 0.5, average: [parameters]}}\n",
    BASE + "exchange: {gossip: {compress: {topk: 0.1}, consensus: {max: 0.1}, pairing: ring}}\n",
    BASE + "layout: {replicas: 2, swarms: [{layers: 2, rows: 1, cols: 2}]}\nwatchdog: none\n",
    BASE + "watchdog: {end: null}\nredundancy: {buddy: {every_steps: 5}}\npipeline: async\n",
    BASE.replace("{linear: 10}", "{residual: {layers: [{linear: 32}, relu], shortcut: []}}, {linear: 10}"),
    BASE.replace("cross_entropy}", "{cross_entropy: {label_smoothing: 0.1, class_weights: balanced}}}"),
    BASE.replace("cross_entropy}", "{cross_entropy: {class_weights: [1, 0, 2.5, 1, 1, 1, 1, 1, 1, 1]}}}"),
    BASE.replace("{linear: 10}", "{dropout: 0.25}, dropout, batch_norm: , {linear: {units: 10, name: out}}").replace(
        "batch_norm: ", "{batch_norm: }"
    ),
]
WRONG = [
    BASE.replace("digits", "digitz"),
    BASE.replace("name: digits", "nam: digits"),
    BASE.replace("units: 32", "units: 0"),
    BASE.replace("units: 32", "units: 32.5"),
    BASE.replace("units: 32", "unit: 32"),
    BASE.replace("relu", "swish"),
    BASE.replace("cross_entropy", "crossentropy"),
    BASE.replace("cross_entropy}", "{cross_entropy: {class_weights: even}}}"),
    BASE.replace("cross_entropy}", "{cross_entropy: {class_weights: [1, -1]}}}"),
    BASE.replace("{linear: 10}", "linear"),
    BASE.replace("{linear: 10}", "{linear: 10, dropout: 0.1}"),
    BASE.replace("{linear: 10}", "{dropout: 1.5}, {linear: 10}"),
    BASE.replace("model:", "network:"),
    BASE + "train: {epochs: 1, steps: 5}\n",
    BASE + "train: {batch_size: many}\n",
    BASE + "train: {schedule: {step: {every_epochs: 1, every_steps: 1}}}\n",
    BASE + "train: {schedule: exponential}\n",
    BASE + "train: {optimizer: {adam: {betas: [0.9]}}}\n",
    BASE + "train: {optimizer: {adam: {lr: -1}}}\n",
    BASE + "train: {micro_batches: 0}\n",
    BASE + "exchange: {gossip: {deadline: soon}}\n",
    BASE + "exchange: {gossip: {compress: {topk: 1}}}\n",
    BASE + "layout: rows\n",
    BASE + "layout: {swarms: []}\n",
    BASE + "dtype: float16\n",
    BASE + "checkpoint: {keep: 0}\n",
    BASE + "seed: -1\n",
    BASE + "trace: sometimes\n",
]


def plain(text: str) -> Any:
    return yaml_lines.read(text, "file").value


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_right(path: Path) -> None:
    CHECK.validate(plain(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("text", [DEFAULT, *RIGHT])
def test_what_the_loader_takes_is_right(text: str) -> None:
    reading.loads(text, SHIPPED)
    CHECK.validate(plain(text))


@pytest.mark.parametrize("text", WRONG)
def test_what_the_loader_refuses_is_wrong(text: str) -> None:
    with pytest.raises(ConfigError):
        reading.loads(text, SHIPPED)
    assert not CHECK.is_valid(plain(text))


def test_every_option_and_every_kind_is_described() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)

    def undescribed(part: Any, path: str) -> Iterator[str]:
        if isinstance(part, dict):
            for name, option in part.get("properties", {}).items():
                if "properties" in part and len(part["properties"]) > 1 and "description" not in option:
                    yield f"{path}.{name}"
            for name, inner in part.items():
                if name == "not":
                    continue
                yield from undescribed(inner, f"{path}.{name}")
        elif isinstance(part, list):
            for number, inner in enumerate(part):
                yield from undescribed(inner, f"{path}.{number}")

    assert not list(undescribed(SCHEMA, ""))
    assert [name for name, each in SCHEMA["definitions"].items() if "description" not in each] == []


def test_the_command_prints_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nettorrent_mpi", "schema"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(shown.stdout) == SCHEMA
    subprocess.run([*command, "--output", str(tmp_path / "a.json")], check=True, cwd=ROOT)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == SCHEMA
