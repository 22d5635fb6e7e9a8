"""Reliability: trainings of which random ranks are killed at random times, beside undisturbed ones.

    python -m benchmarks reliability --root DIR [--runs 100] [--first 0] [--kinds exact gossip ...]

DIR holds mnist/ as `nettorrent data fetch` lays it out; the trainings take its first ROWS rows, and all 10,000 test
rows. Run number n kills 1 to 3 ranks drawn from the seed n, as `nettorrent chaos` draws them, rank 0 among them in
every third run, all of them at once in every fourth. Five undisturbed runs of each case, of other seeds, give the
accuracies to compare with. Writes benchmarks/results/reliability.json and reliability.md after each run; runs that are
there already are kept.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import h5py
import numpy as np

from benchmarks.speed import RESULTS
from nettorrent_mpi.cli.chaos import compared, disturb, draw, train
from nettorrent_mpi.cli.launching import stopped_like_interrupted, tolerant_mpirun
from nettorrent_mpi.speedup.machine import describe_host

ROWS = 6000  # training rows
STEPS = 300
SEEDS = 5  # undisturbed runs of each case
LIMIT = 240.0  # seconds of a run
COMMON = (
    "model.layers=[flatten, linear: {units: 64, activation: relu}, linear: {units: 32, activation: relu}, linear: 10]",
    f"train={{steps: {STEPS}, batch_size: 60, optimizer: {{adam: {{lr: 0.002}}}}}}",
    "train.report_every=5",
    "train.evaluate_every=1000",
    "checkpoint={every_epochs: null, every_seconds: 600}",
    "kernels=numpy",
)


class Case(NamedTuple):
    """A Case is one way of training: exchange, pipeline, layout. `ranks` is what it is started with."""

    kind: str
    ranks: int
    sets: tuple[str, ...]
    every: int  # steps from one copy of the state to the next: so many are lost at most


def buddy(every: int) -> str:
    return f"redundancy={{buddy: {{every_steps: {every}}}}}"


def replicas(exchange: str, count: int, pipeline: str = "1f1b", swarms: str = "") -> tuple[str, ...]:
    layout = f"layout={{replicas: {count}{', swarms: ' + swarms if swarms else ''}}}"
    return (layout, f"exchange={exchange}", f"pipeline={pipeline}")


STAGES = "[{layers: 2}, {layers: 1}]"
ELITE = "{elite: {every_samples: 3000}}"
APART = ("gossip", "elite", "none")  # replicas differ: one that lives loses no step, and copies serve where none does
CASES = [
    Case("exact", 4, ("layout=layers", "pipeline=1f1b", buddy(5)), 5),
    Case("exact", 6, ("layout=layers", "pipeline=gpipe", buddy(1)), 1),
    Case("exact", 5, ("layout={swarms: [{layers: 3, rows: 5}]}", buddy(1)), 1),
    Case("exact", 6, (*replicas("allreduce", 2, "gpipe", "[{layers: 1, rows: 2}, {layers: 2}]"), buddy(5)), 5),
    Case("gossip", 4, (*replicas("gossip", 4), buddy(5)), 5),
    Case("gossip", 6, (*replicas("gossip", 3, "1f1b", STAGES), buddy(5)), 5),
    Case("gossip", 6, (*replicas("gossip", 3, "gpipe", STAGES), buddy(5)), 5),
    Case("elite", 4, (*replicas(ELITE, 4), "data.validation=0.1", buddy(5)), 5),
    Case("elite", 6, (*replicas(ELITE, 3, "gpipe", STAGES), "data.validation=0.1", buddy(5)), 5),
    Case("none", 4, (*replicas("none", 4), buddy(5)), 5),
    Case("none", 6, (*replicas("none", 3, "1f1b", STAGES), buddy(5)), 5),
    Case("async", 4, ("layout=layers", "pipeline=async", buddy(5)), 5),
    Case("async", 6, ("layout=layers", "pipeline=async", buddy(1)), 1),
]
KINDS = list(dict.fromkeys(case.kind for case in CASES))


def make_data(root: Path, path: Path) -> None:
    """Write MNIST's first ROWS training rows and its test rows as an HDF5 data set."""
    with h5py.File(path, "w") as file:
        for part, suffix, rows in (("train", "", ROWS), ("t10k", "_test", 10_000)):
            x = gzip.decompress((root / "mnist" / f"{part}-images-idx3-ubyte.gz").read_bytes())
            y = gzip.decompress((root / "mnist" / f"{part}-labels-idx1-ubyte.gz").read_bytes())
            file["x" + suffix] = np.frombuffer(x, np.uint8, offset=16).reshape(-1, 28, 28, 1)[:rows]
            file["y" + suffix] = np.frombuffer(y, np.uint8, offset=8)[:rows]
        file.attrs["classes"] = [str(digit) for digit in range(10)]


def command(case: Case, seed: int, data: Path) -> list[str]:
    words = [*tolerant_mpirun(), "-n", str(case.ranks), sys.executable, "-m", "nettorrent_mpi.train"]
    sets = (f"data={{name: hdf5, root: {data}}}", *COMMON, *case.sets, f"seed={seed}")
    return [*words, *(word for change in sets for word in ("--set", change))]


def case_of(number: int) -> Case:
    """Return what the run of this number trains: the kinds take turns, and in each its cases."""
    of_kind = [case for case in CASES if case.kind == KINDS[number % len(KINDS)]]
    return of_kind[number // len(KINDS) % len(of_kind)]


def run(number: int, data: Path, folder: Path) -> dict[str, Any]:
    """Make the disturbed run of this number."""
    case = case_of(number)
    kills, first = random.Random(number).randint(1, 3), number % 3 == 0
    drawn = draw(case.ranks, kills, number, [0] if first else [], at_once=number % 4 == 3)
    words = command(case, number // len(KINDS) % SEEDS, data)
    found = disturb(words, folder / f"run-{number}", drawn, LIMIT, STEPS, 0.3)
    found |= compared({}, found)
    about = {"number": number, "kind": case.kind, "ranks": case.ranks, "sets": list(case.sets)}
    about |= {"kills": [asdict(kill) for kill in drawn], "copies_every": case.every}
    return about | found


def undisturbed(case: Case, seed: int, data: Path, folder: Path) -> dict[str, Any]:
    found = train(command(case, seed, data), folder / f"calm-{CASES.index(case)}-{seed}", LIMIT)
    return {"kind": case.kind, "ranks": case.ranks, "sets": list(case.sets), "seed": seed} | found


def calm_of(report: dict[str, Any], each: dict[str, Any]) -> list[float]:
    """Return the accuracies of the undisturbed runs of a run's case."""
    alike = [calm for calm in report["undisturbed"] if calm["sets"] == each["sets"] and calm["ranks"] == each["ranks"]]
    return [calm["test_accuracy"] for calm in alike if calm["complete"]]


def steps_lost(failure: dict[str, Any]) -> int:
    return int(failure["step"] - failure["resumed_from"])


def summarize(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of each kind."""
    figures = []
    for kind in KINDS:
        runs = [each for each in report["runs"] if each["kind"] == kind]
        done = [each for each in runs if each["complete"] and calm_of(report, each)]
        if not done:
            continue
        accuracies = [each["test_accuracy"] for each in done]
        calm = [mean(calm_of(report, each)) for each in done]
        recoveries = [seconds for each in done for seconds in each["recovery_seconds"]]
        failures = [failure for each in done for failure in each["failures"]]
        kept = [failure for failure in failures if failure["source"] == "memory"]
        lost = [steps_lost(failure) for failure in kept]
        beside = [failure for failure in failures if failure["live_replicas"]]
        below = [min(calm_of(report, each)) - each["test_accuracy"] for each in done]
        above = [each["test_accuracy"] - max(calm_of(report, each)) for each in done]
        figures.append({
            "kind": kind,
            "runs": len(runs),
            "complete": len(done),
            "killed": sum(len(each["killed"]) for each in done),
            "rank_0_killed": sum(any(kill["rank"] == 0 for kill in each["killed"]) for each in done),
            "accuracy": round(mean(accuracies), 4),
            "undisturbed_accuracy": round(mean(calm), 4),
            "difference": round(mean(accuracies) - mean(calm), 4),
            "below_range": round(max(0.0, *below), 4),
            "above_range": round(max(0.0, *above), 4),
            "median_recovery": round(median(recoveries), 3) if recoveries else None,
            "longest_recovery": round(max(recoveries), 3) if recoveries else None,
            "mean_steps_lost": round(mean(lost), 2) if lost else None,
            "most_steps_lost": max(lost, default=None),
            "all_copies_lost": len(failures) - len(kept),
            "beside_a_live_replica": len(beside),
            "most_steps_lost_beside": max((steps_lost(failure) for failure in beside), default=None),
            "more_lost_than_may": sum(
                steps_lost(failure) > (0 if failure["live_replicas"] else each["copies_every"])
                for each in done for failure in each["failures"] if failure["source"] == "memory"
            ),
        })  # fmt: skip
    return figures


COLUMNS = ["exchange", "runs", "complete", "ranks killed", "test accuracy", "undisturbed", "difference"]
COLUMNS += ["below, above the range", "median recovery", "longest", "steps lost: mean", "most"]
COLUMNS += ["most beside a live replica", "all copies lost"]
LOST = ("mean_steps_lost", "most_steps_lost", "most_steps_lost_beside")


def to_markdown(report: dict[str, Any]) -> str:
    host = report["host"]
    lines = [
        "# Reliability",
        "",
        f"{host['cpu']}, {host['cores']} cores; commit {host['commit']}, {host['date']}. Made by",
        f"`{report['command']}`:",
        "1 to 3 of 4 to 6 ranks killed at random times, rank 0 among them in every third run; accuracies on MNIST's",
        f"10,000 test rows after {ROWS:,} training rows; beside, the mean of {SEEDS} undisturbed runs of the same",
        f"cases. Replicas of {', '.join(APART)} differ: one that lives loses no step; where none does, and with the",
        "other kinds, steps are done again since the last copies, which are made after every 5 steps, or every one.",
        "Where a rank and its buddy die together, all copies are lost, and without a checkpoint, as here, the training",
        "begins again.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|---|{'---:|' * (len(COLUMNS) - 1)}",
    ]
    for each in report["figures"]:
        recovery = (
            ["-"] * 2
            if each["median_recovery"] is None
            else [f"{each[name]:.2f} s" for name in ("median_recovery", "longest_recovery")]
        )
        lost = ["-" if each[name] is None else f"{each[name]:g}" for name in LOST]
        lines.append(
            f"| {each['kind']} | {each['runs']} | {each['complete']} | {each['killed']} "
            f"| {100 * each['accuracy']:.2f} % | {100 * each['undisturbed_accuracy']:.2f} % "
            f"| {100 * each['difference']:+.2f} "
            f"| {100 * each['below_range']:.2f}, {100 * each['above_range']:.2f} "
            f"| {' | '.join(recovery)} | {' | '.join(lost)} | {each['all_copies_lost']} |"
        )
    failed = [each for each in report["runs"] if not each["complete"]]
    lines += ["", *(f"- run {each['number']} ({each['kind']}): {each['why']}" for each in failed)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--output", type=Path, default=RESULTS / "reliability.json")
    parser.add_argument("--keep", type=Path, help="a folder for the run folders and the output of each run")
    options = parser.parse_args()
    report: dict[str, Any] = {"undisturbed": [], "runs": []}
    if options.output.exists():
        report = json.loads(options.output.read_text(encoding="utf-8"))
    report |= {
        "host": describe_host(),
        "command": shlex.join(["python", "-m", "benchmarks.reliability", *sys.argv[1:]]),
    }

    def save() -> None:
        report["figures"] = summarize(report)
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(to_markdown(report), encoding="utf-8")

    with tempfile.TemporaryDirectory() as temporary, stopped_like_interrupted():
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "mnist.h5"
        make_data(options.root, data)
        numbers = {each["number"] for each in report["runs"]}
        for number in range(options.first, options.first + options.runs):
            if number not in numbers and case_of(number).kind in options.kinds:
                report["runs"].append(run(number, data, folder))
                print(json.dumps(report["runs"][-1]), flush=True)
                save()
        there = {(each["ranks"], tuple(each["sets"]), each["seed"]) for each in report["undisturbed"]}
        for seed in range(SEEDS):
            for case in CASES:
                if case.kind in options.kinds and (case.ranks, case.sets, seed) not in there:
                    report["undisturbed"].append(undisturbed(case, seed, data, folder))
                    print(json.dumps(report["undisturbed"][-1]), flush=True)
                    save()


if __name__ == "__main__":
    main()
