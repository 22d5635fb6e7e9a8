"""This benchmark measures the time to an accuracy on real data: two ranks that divide the rows, against one.

    python -m benchmarks reach --root DIR [--cases digits mnist cifar] [--repeats 3]

Both train a shipped configuration as one stage with the same seed, and average exactly: they need the same epochs, so
that only their speed differs. The accuracy is that of the test rows after an epoch. Each side's time is counted from
the first step to that evaluation, and once more without the evaluations. DIR holds mnist/ and cifar-10-batches-bin/ in
the layout of `nettorrent data fetch`; digits are built in. Writes benchmarks/results/reach.json and reach.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.speed import RESULTS, ROOT
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.writing import to_yaml
from nettorrent_mpi.speedup import modes, runs
from nettorrent_mpi.speedup.machine import Launcher, describe_host, in_words

RANKS = (1, 2)


class Case(NamedTuple):
    """A Case is a configuration with some changes, and the accuracy to reach."""

    config: str
    accuracy: float
    changes: tuple[str, ...] = ()


CASES = {
    "digits": Case("configs/digits.yaml", 0.97),
    "mnist": Case("configs/mnist.yaml", 0.97),
    "mnist_wide-1024": Case("configs/mnist_wide.yaml", 0.97, ("train.batch_size=1024",)),
    "cifar": Case("configs/cifar.yaml", 0.68),
}


def written(case: Case, root: Path, folder: Path) -> dict[int, Path]:
    """Write the case's configuration for each number of ranks; return the files."""
    changes = [*case.changes, "train.micro_batches=1"]  # there is no pipeline to fill
    if "digits" not in case.config:
        changes.append(f"data.root={root}")
    shared = modes.baseline(configuration.load(str(ROOT / case.config), changes), ["rows"])
    one, setup = modes.serial(shared)
    found = {1: one, 2: modes.plan("rows", shared, shared, setup.network.facts, 2)}
    paths = {ranks: folder / f"{ranks}.yaml" for ranks in found}
    for ranks, candidate in found.items():
        assert candidate.config is not None, candidate.impossible
        paths[ranks].write_text(to_yaml(modes.until(candidate.config, case.accuracy)), encoding="utf-8")
    return paths


def reach(case: Case, path: Path, ranks: int, launcher: Launcher) -> dict[str, float]:
    """Train until the accuracy is reached. Ends the program if it is not."""
    done = runs.train(path, ranks, launcher)
    for seconds, epoch, accuracy in runs.curve_of(done.metrics):
        if accuracy >= case.accuracy:
            training = float(done.summary["train_seconds"])
            return {"seconds": seconds, "training_seconds": training, "epochs": epoch, "accuracy": accuracy}
    raise SystemExit(f"{case.config} did not reach an accuracy of {case.accuracy} on {ranks} ranks")


def compare(name: str, root: Path, repeats: int, launcher: Launcher) -> dict[str, Any]:
    """Let both sides reach the accuracy in turns; return their runs, and the ratios of the medians of their times."""
    case, found = CASES[name], {ranks: list[dict[str, float]]() for ranks in RANKS}
    with tempfile.TemporaryDirectory() as folder:
        paths = written(case, root, Path(folder))
        for turn in range(repeats):
            for ranks in RANKS:
                found[ranks].append(reach(case, paths[ranks], ranks, launcher))
                print(f"{name}  turn {turn + 1}  {ranks} ranks: {json.dumps(found[ranks][-1])}", flush=True)
    times = {
        what: {ranks: median(run[what] for run in found[ranks]) for ranks in RANKS}
        for what in ("seconds", "training_seconds")
    }
    sides = {str(ranks): found[ranks] for ranks in RANKS}
    ratios = {what: middle[1] / middle[2] for what, middle in times.items()}
    return {"name": name, "config": case.config, "changes": case.changes, "accuracy": case.accuracy,
            "ranks": sides, "ratios": ratios}  # fmt: skip


def to_markdown(report: Mapping[str, Any]) -> str:
    """Write the report as a table."""
    host = report["host"]
    lines = [
        "# Time to an accuracy, two ranks against one",
        "",
        f"Medians of {report['repeats']} alternating runs, one thread a rank. {in_words(host)}",
        f"Commit {host['commit']}, {host['date']}. Made by `{report['command']}`.",
        "",
        "| configuration | accuracy | epochs, 1 and 2 ranks | 1 rank, s | 2 ranks, s | ratio | without evaluations |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for case in report["cases"]:
        one, two = case["ranks"]["1"], case["ranks"]["2"]
        seconds = [median(run["seconds"] for run in side) for side in (one, two)]
        lines.append(
            f"| {case['name']} | {case['accuracy']:.0%} | {one[0]['epochs']:g}, {two[0]['epochs']:g} "
            f"| {seconds[0]:.2f} | {seconds[1]:.2f} | {case['ratios']['seconds']:.2f} "
            f"| {case['ratios']['training_seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to an accuracy on real data, two ranks against one.")
    parser.add_argument("--root", type=Path, required=True, help="folder that holds mnist/ and cifar-10-batches-bin/")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which networks")
    parser.add_argument("--repeats", type=int, default=3, help="turns of both sides")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for reach.json and reach.md")
    options = parser.parse_args()
    launcher = Launcher()
    words = " ".join(["python -m benchmarks reach", *sys.argv[1:]]).replace(str(options.root), "DIR")
    report: dict[str, Any] = {"command": words, "repeats": options.repeats, "host": describe_host(), "cases": []}
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.cases:
        report["cases"].append(compare(name, options.root.resolve(), options.repeats, launcher))
        (options.results / "reach.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (options.results / "reach.md").write_text(to_markdown(report), encoding="utf-8")
    print(to_markdown(report))


if __name__ == "__main__":
    main()
