"""The accuracy of the exchanges on real data: four ranks, the same epochs, the same validation rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.exchange_runs import Here, layout, train
from benchmarks.exchange_text import paragraph, percent, points, table

RANKS = 4
VALIDATION = 0.05  # part of the training rows, for all sides: by them elite chooses


@dataclass(frozen=True)
class Case:
    """A shipped configuration, its weight layers, and a file that identifies the copy of the data."""

    config: str
    weight_layers: int
    file: str


CASES = {
    "mnist": Case("configs/mnist.yaml", 7, "mnist/train-images-idx3-ubyte.gz"),
    "letters": Case("configs/letters.yaml", 4, "letters/emnist-letters-train-images-idx3-ubyte.gz"),
    "cifar": Case("configs/cifar.yaml", 6, "cifar-10-batches-bin/data_batch_1.bin"),
}


@dataclass(frozen=True)
class Side:
    """A way of training. With one replica the layers are divided over the ranks."""

    title: str
    ranks: int
    replicas: int
    settings: Mapping[str, str]


EXACT = "exact"
SIDES = {
    "serial": Side("1 rank", 1, 1, {}),
    EXACT: Side("exact (allreduce), 4 replicas", RANKS, RANKS, {"exchange": "allreduce"}),
    "gossip": Side("gossip, 4 replicas", RANKS, RANKS, {"exchange": "gossip"}),
    "elite": Side("elite, 4 replicas", RANKS, RANKS, {"exchange": "{elite: {every_samples: 10000}}"}),
    "async": Side("async pipeline, 4 ranks of 1 replica", RANKS, 1, {"pipeline": "async"}),
}


def settings_of(case: Case, side: Side, epochs: int, seed: int, root: Path, upright: bool) -> dict[str, str]:
    """Return the changes to the configuration."""
    settings = {
        "data.root": str(root),
        "data.validation": str(VALIDATION),
        "seed": str(seed),
        "train.epochs": str(epochs),
        "layout": "layers" if side.replicas == 1 else layout(side.replicas, case.weight_layers),
        **side.settings,
    }
    if upright and case is CASES["letters"]:
        settings["data.transposed"] = "false"
    return settings


def measure(
    name: str, side_name: str, epochs: int, seed: int, root: Path, upright: bool, mpirun: str
) -> dict[str, Any]:
    """Run one training and return it as a row of the report."""
    case, side = CASES[name], SIDES[side_name]
    done = train(case.config, settings_of(case, side, epochs, seed, root, upright), side.ranks, Here(mpirun))
    told = done.summary
    return {
        "case": name,
        "side": side_name,
        "seed": seed,
        "epochs": epochs,
        "test_accuracy": told["test_accuracy"],
        "average": told.get("average"),
        "best_replica": told.get("best_replica"),
        "by_epoch": done.by_epoch,
        "train_seconds": told["train_seconds"],
        "samples_per_second": told["samples_per_second"],
        "exchange": told.get("exchange"),
        "layout": told["layout"],
        "mpi": told["mpi"],
    }


def digest(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of a file of each data set."""
    files = [CASES[name].file for name in names]
    return {file: hashlib.sha256((root / file).read_bytes()).hexdigest() for file in files}


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs of both, the new ones replacing old ones of the same case, side and seed, in the order of the
    tables."""
    runs = {(run["case"], run["side"], run["seed"]): run for run in [*old, *new]}
    order = [(case, side) for case in CASES for side in SIDES]
    return sorted(runs.values(), key=lambda run: (order.index((run["case"], run["side"])), run["seed"]))


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each case and side: means over the seeds. `difference` is relative to the exact exchange after
    the same epochs with the same seeds; None if there is no such run."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["case"], run["side"]), []).append(run)
    rows = []
    for (case, side), group in groups.items():
        exact = groups.get((case, EXACT), [])
        comparable = [(r["seed"], r["epochs"]) for r in group] == [(r["seed"], r["epochs"]) for r in exact]
        accuracy = mean(r["test_accuracy"] for r in group)
        difference = accuracy - mean(r["test_accuracy"] for r in exact) if comparable and side != EXACT else None
        accuracies = [r["test_accuracy"] for r in group]
        rows.append(
            {
                "case": case,
                "side": side,
                "epochs": group[0]["epochs"],
                "runs": len(group),
                "test_accuracy": accuracy,
                "range": max(accuracies) - min(accuracies),
                "difference": difference,
                "average": _mean_of(group, "average"),
                "best_replica": _mean_of(group, "best_replica"),
                "train_seconds": mean(r["train_seconds"] for r in group),
            }
        )
    return rows


def _mean_of(group: Sequence[dict[str, Any]], key: str) -> float | None:
    """Return the mean test accuracy of the average weights or of the best replica in the summaries."""
    found = [run[key]["test_accuracy"] for run in group if run.get(key)]
    return mean(found) if found and None not in found else None


def to_markdown(section: dict[str, Any]) -> list[str]:
    rows = summarize(section["runs"])
    several = any(row["runs"] > 1 for row in rows)
    head = ["configuration", "side", "epochs", "test accuracy", "to exact, points"]
    head += ["average", "best replica", "training, s"] + (["runs", "range, points"] if several else [])
    text = (
        f"The shipped configurations with {VALIDATION:.0%} of the training rows kept for validation. A step has the "
        "same rows on every side, so that one of four replicas has a quarter of them. The test accuracy is that of "
        "`model.h5`; beside it stand the average of all replicas' weights and the best replica, where the run tells "
        "them. Seconds compare sides on ranks that share this machine's cores; they are no speedup."
    )
    cells = []
    for row in rows:
        cell = [row["case"], SIDES[row["side"]].title, str(row["epochs"]), percent(row["test_accuracy"])]
        cell += [points(row["difference"]), percent(row["average"]), percent(row["best_replica"])]
        cell += [f"{row['train_seconds']:,.0f}"]
        cells.append(cell + ([str(row["runs"]), f"{100 * row['range']:.2f}"] if several else []))
    lines = [
        *paragraph(text),
        "",
        *table(head, cells, texts=2),
        "",
        "![Test accuracy by epoch](exchange-accuracy.svg)",
        "",
        "Data (SHA-256 of a file of each set):",
        "",
    ]
    return lines + [f"- `{name}`: `{checksum}`" for name, checksum in section["data"].items()]
