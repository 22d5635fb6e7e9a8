"""Accuracy on real data: the shipped configurations, on one rank and on two.

    python -m benchmarks.accuracy --root DIR [--cases mnist mnist_wide cifar] [--ranks 1 2]

DIR holds mnist/ and cifar-10-batches-bin/ in the layout of `nettorrent data fetch`. Trains each configuration
unchanged; several ranks divide the rows. Writes benchmarks/results/accuracy.json and accuracy.md, which identify the
data by their SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed import RESULTS
from nettorrent_mpi.cli.launching import find_mpirun
from nettorrent_mpi.speedup.machine import describe_host
from nettorrent_mpi.speedup.runs import run

LAYERS = {"mnist": 7, "mnist_wide": 4, "cifar": 6}
FILES = {
    "mnist": "mnist/train-images-idx3-ubyte.gz",
    "mnist_wide": "mnist/train-images-idx3-ubyte.gz",
    "cifar": "cifar-10-batches-bin/data_batch_1.bin",
}


def train(case: str, ranks: int, root: Path, mpirun: str) -> dict[str, Any]:
    """Run one training; return the figures of its summary and metrics."""
    with tempfile.TemporaryDirectory() as folder:
        layout = f"{{replicas: 1, swarms: [{{layers: {LAYERS[case]}, rows: {ranks}, cols: 1}}]}}"
        sets = ["--set", f"data.root={root}", "--set", f"layout={layout}"]
        command = [sys.executable, "-m", "nettorrent_mpi.train", f"configs/{case}.yaml", "--output", f"{folder}/run"]
        run([mpirun, "-n", str(ranks), *command, *sets])
        summary = json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))
        metrics = [
            json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    epochs = [record for record in metrics if "test_accuracy" in record]
    return {
        "case": case,
        "ranks": ranks,
        "epochs": epochs[-1]["epoch"],
        "test_accuracy": summary["test_accuracy"],
        "test_accuracy_by_epoch": [record["test_accuracy"] for record in epochs],
        "train_seconds": summary["train_seconds"],
        "samples_per_second": summary["samples_per_second"],
        "peak_memory_mb": summary["peak_memory_mb"],
        "mpi": summary["mpi"],
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Write the report as a table."""
    host = report["host"]
    lines = [
        "# Accuracy on real data",
        "",
        f"{host['cpu']}, {host['cores']} cores, one BLAS thread a rank; commit {host['commit']}, {host['date']}.",
        f"Made by `{report['command']}`. The shipped configurations as they are; ranks divide the rows.",
        "",
        "| configuration | ranks | epochs | test accuracy | training, s | samples/s | peak memory a rank, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['case']} | {r['ranks']} | {r['epochs']:g} | {100 * r['test_accuracy']:.2f} % "
        f"| {r['train_seconds']:.0f} | {r['samples_per_second']:,.0f} | {r['peak_memory_mb']:.0f} |"
        for r in report["runs"]
    ]
    lines += ["", "Data (SHA-256 of a file of each set):", ""]
    lines += [f"- `{name}`: `{digest}`" for name, digest in report["data"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of the shipped configurations on real data.")
    parser.add_argument("--root", type=Path, required=True, help="folder that holds mnist/ and cifar-10-batches-bin/")
    parser.add_argument("--cases", nargs="+", choices=LAYERS, default=list(LAYERS), help="which configurations")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="rank counts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for accuracy.json and accuracy.md")
    options = parser.parse_args()
    root, mpirun = options.root.resolve(), find_mpirun()
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.accuracy --root DIR --cases {' '.join(options.cases)} "
        f"--ranks {' '.join(map(str, options.ranks))}",
        "host": describe_host(),
        "data": {
            name: hashlib.sha256((root / name).read_bytes()).hexdigest()
            for name in dict.fromkeys(FILES[case] for case in options.cases)
        },
        "runs": [],
    }
    for case in options.cases:
        for ranks in options.ranks:
            report["runs"].append(train(case, ranks, root, mpirun))
            print(json.dumps(report["runs"][-1]), flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.results / "accuracy.md").write_text(to_markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
