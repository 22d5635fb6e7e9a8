"""Training speed of this package against PyTorch, and of two ranks against one, on the CPU of this machine.

    python benchmarks/speed.py [--repeats 5] [--cases mlp-128 cnn-64] [--all-peers] [--factor 0.1]

Every side of a case runs in processes of its own, one BLAS thread each, without OPENBLAS_CORETYPE, which some machines
set to an older processor than they have. The sides of a case take turns, so that what else the machine does hits them
alike; medians over the turns are compared. Both train from random bytes of MNIST's or CIFAR-10's shape held in memory.
Writes benchmarks/results/speed.json and speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nettorrent_mpi.speedup.machine import describe_host, environment, find_mpirun, in_words

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
UNTIMED_STEPS = 5  # steps that samples_per_second leaves out


@dataclass(frozen=True)
class Case:
    """A network at a batch size. `steps` take some seconds on one core of 2024."""

    model: str  # as torch_models.py calls it
    config: str
    weight_layers: int
    data: str
    batch: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.batch}"


MNIST = "{name: synthetic, rows: 60000, test_rows: 0, shape: [28, 28, 1], classes: 10}"
CIFAR = "{name: synthetic, rows: 50000, test_rows: 0, shape: [32, 32, 3], classes: 10}"
CASES = {
    case.name: case
    for case in (
        Case("mlp", "configs/mnist.yaml", 7, MNIST, 128, 1500),
        Case("mnist_wide", "configs/mnist_wide.yaml", 4, MNIST, 128, 300),
        Case("mnist_wide", "configs/mnist_wide.yaml", 4, MNIST, 1024, 60),
        Case("cnn", "configs/cifar.yaml", 6, CIFAR, 64, 60),
    )
}


@dataclass(frozen=True)
class Side:
    """One of those that are compared. `against` is the side whose median this one's is divided by."""

    name: str
    ranks: int = 1  # processes
    peer: tuple[str, ...] | None = None  # options of torch_models.py; None: this package
    against: str | None = None


OURS, OURS_2, TORCH = "1 rank", "2 ranks, rows", "PyTorch"


def sides_of(case: Case, all_peers: bool) -> list[Side]:
    """The sides of a case, in the order of their turns. This package's sides are divided by PyTorch and by one rank."""
    sides = [Side(OURS, against=TORCH), Side(TORCH, peer=()), Side(OURS_2, ranks=2, against=OURS)]
    if case.model == "cnn":
        sides.append(Side("PyTorch, channels_last", peer=("--channels-last",), against=TORCH))
    if all_peers:
        sides.append(Side("PyTorch, compiled", peer=("--compile",), against=TORCH))
        sides.append(Side("PyTorch, 2 processes (DDP)", ranks=2, peer=("--processes", "2"), against=TORCH))
    return sides


def run(command: list[str]) -> str:
    """The standard output of a command in the root of the repository; ends the program if it fails."""
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"failed with {done.returncode}: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def our_command(case: Case, ranks: int, steps: int, mpirun: str, output: str) -> list[str]:
    """The training command of this package, all ranks in one team that divides the rows."""
    more = ["--oversubscribe"] if ranks > (os.cpu_count() or 1) else []
    settings = {
        "data": case.data,
        "train.epochs": "null",
        "train.steps": str(steps + UNTIMED_STEPS),
        "train.batch_size": str(case.batch),
        "train.micro_batches": "1",  # there is no pipeline to fill
        "train.schedule": "constant",
        "train.report_every": "1000",
        "layout": f"{{replicas: 1, swarms: [{{layers: {case.weight_layers}, rows: {ranks}, cols: 1}}]}}",
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    train = [sys.executable, "-m", "nettorrent_mpi.train", case.config, "--output", output, "--overwrite", *sets]
    return [mpirun, *more, "-n", str(ranks), *train]


def measure(case: Case, side: Side, steps: int, mpirun: str) -> float:
    """Samples per second of one turn of a side."""
    if side.peer is not None:
        command = [sys.executable, "benchmarks/torch_models.py", "--model", case.model, "--batch", str(case.batch)]
        output = run([*command, "--steps", str(steps), "--warmup", "10", "--threads", "1", *side.peer])
        return float(json.loads(output.splitlines()[-1])["samples_per_second"])
    with tempfile.TemporaryDirectory() as folder:
        run(our_command(case, side.ranks, steps, mpirun, f"{folder}/run"))
        return float(json.loads(Path(folder, "run", "summary.json").read_text())["samples_per_second"])


def compare(case: Case, repeats: int, factor: float, all_peers: bool, mpirun: str) -> dict[str, Any]:
    """All sides of a case in turns: each side's figures, median, spread and ratio to the side that it is against."""
    sides = sides_of(case, all_peers)
    steps = max(5, round(case.steps * factor))
    figures: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(repeats):
        for side in sides:
            figures[side.name].append(measure(case, side, steps, mpirun))
            print(f"{case.name}  turn {turn + 1}  {side.name}: {figures[side.name][-1]:,.0f} samples/s", flush=True)
    rows = []
    for side in sides:
        row = summarize(figures[side.name])
        ratio = row["median"] / median(figures[side.against]) if side.against else None
        rows.append({"side": side.name, "ranks": side.ranks, **row, "against": side.against, "ratio": ratio})
    return {**asdict(case), "name": case.name, "timed_steps": steps, "sides": rows}


def summarize(figures: list[float]) -> dict[str, Any]:
    """`spread` is (largest - smallest) / median."""
    middle = median(figures)
    return {"samples_per_second": figures, "median": middle, "spread": (max(figures) - min(figures)) / middle}


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    host = report["host"]
    lines = [
        "# Training speed",
        "",
        f"Median of {report['repeats']} alternating runs, one thread each; spread = (largest - smallest) / median.",
        in_words(host),
        f"Commit {host['commit']}, {host['date']}. Made by `{report['command']}`.",
        "",
        "| network | batch | side | samples/s | spread | ratio | against |",
        "|---|---:|---|---:|---:|---:|---|",
    ]
    for case in report["cases"]:
        for side in case["sides"]:
            ratio = f"{side['ratio']:.2f}" if side["ratio"] is not None else ""
            lines.append(
                f"| {case['model']} | {case['batch']} | {side['side']} | {side['median']:,.0f} | {side['spread']:.0%} "
                f"| {ratio} | {side['against'] or ''} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed against PyTorch, and of two ranks against one.")
    parser.add_argument("--repeats", type=int, default=5, help="turns of every side")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="which networks at which batch size"
    )
    parser.add_argument("--all-peers", action="store_true", help="torch.compile and DistributedDataParallel, too")
    parser.add_argument("--factor", type=float, default=1.0, help="times the steps of each run")
    parser.add_argument("--mpirun", default=None, help="the launcher")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for speed.json and speed.md")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats has to be at least 1")
    mpirun = options.mpirun or find_mpirun()
    report = {
        "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "repeats": options.repeats,
        "host": describe_host(),
        "cases": [compare(CASES[c], options.repeats, options.factor, options.all_peers, mpirun) for c in options.cases],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "speed.json").write_text(json.dumps(report, indent=1) + "\n")
    table = to_markdown(report)
    (options.results / "speed.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
