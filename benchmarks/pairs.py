"""This benchmark shows what two cores can do at most, and how near two ranks come to it.

    python -m benchmarks pairs [--cases mlp-1024 resnet20-128] [--repeats 3] [--seconds 2]

Four sides of each case of the benchmark `speed` take turns: one rank; two ranks that divide the rows; one process that
trains on half of the rows (as many micro-batches, each half as large); and two such processes side by side, which have
nothing to do with each other. What two ranks lack of twice the speed of one falls into three parts by ratios of them:
smaller pieces (half of the rows in one process against all), the memory, cache and power that two cores share (two
processes against one), and all that is ours: waiting, reductions, imbalance (two ranks against two processes). Two
ranks have one advantage over two processes: each updates half of the weights. Writes benchmarks/results/pairs.json and
pairs.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import speed
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.writing import to_plain, to_yaml
from nettorrent_mpi.engine.usage import WARM_UP
from nettorrent_mpi.speedup import modes, runs
from nettorrent_mpi.speedup.machine import Launcher, describe_host, environment, in_words

ONE, TWO, HALF, HALVES = "1 rank", "2 ranks, rows", "1 process, half of the rows", "2 processes, half of the rows each"


def sides(case: speed.Case, seconds: float, folder: Path, launcher: Launcher) -> dict[str, Callable[[], float]]:
    """Return for each side a function that trains once and returns samples per second."""
    shared = speed.settings(case)
    one, setup = modes.serial(shared)
    two = modes.plan("rows", shared, shared, setup.network.facts, 2)
    assert one.config is not None
    assert two.config is not None
    plain = to_plain(one.config)
    half = configuration.from_plain(plain | {"train": plain["train"] | {"batch_size": case.batch // 2}})

    def written(name: str, config: Any, steps: int) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(to_yaml(modes.timed(config, steps + WARM_UP)), encoding="utf-8")
        return path

    def ours(ranks: int, path: Path) -> float:
        return float(runs.train(path, ranks, launcher).summary["samples_per_second"])

    fast = ours(1, written("trial", one.config, speed.TRIAL_STEPS))
    steps = max(10, math.ceil(seconds * fast / case.batch))
    config = written("half", half, steps)
    return {
        ONE: partial(ours, 1, written("one", one.config, steps)),
        TWO: partial(ours, 2, written("two", two.config, 2 * steps)),
        HALF: partial(side_by_side, config, 1),
        HALVES: partial(side_by_side, config, 2),
    }


def side_by_side(config: Path, count: int) -> float:
    """Train `count` times at once in processes that do not know each other; return their samples per second."""
    with tempfile.TemporaryDirectory(prefix="nettorrent-") as folder:
        outputs = [Path(folder, str(i)) for i in range(count)]
        started = [
            subprocess.Popen(runs.training(config, output), env=environment(), stdout=subprocess.DEVNULL)
            for output in outputs
        ]
        assert not [each for each in started if each.wait()], "a training failed"
        return sum(float(runs.left_in(output)[0]["samples_per_second"]) for output in outputs)


def compare(case: speed.Case, repeats: int, seconds: float, launcher: Launcher) -> dict[str, Any]:
    """Run all sides of a case in turns; return their figures, and the parts of what is lacking."""
    with tempfile.TemporaryDirectory() as folder:
        ways = sides(case, seconds, Path(folder), launcher)
        figures: dict[str, list[float]] = {side: [] for side in ways}
        for turn in range(repeats):
            for side, measure in ways.items():
                figures[side].append(measure())
                print(f"{case.name}  turn {turn + 1}  {side}: {figures[side][-1]:,.0f} samples/s", flush=True)
    middle = {side: median(told) for side, told in figures.items()}
    ratios = {
        "two_ranks": middle[TWO] / middle[ONE],
        "two_processes": middle[HALVES] / middle[ONE],
        "smaller_pieces": middle[HALF] / middle[ONE],
        "shared_machine": middle[HALVES] / (2 * middle[HALF]),
        "ours": middle[TWO] / middle[HALVES],
    }
    return {"name": case.name, "batch": case.batch, "samples_per_second": figures, "ratios": ratios}


def to_markdown(report: Mapping[str, Any]) -> str:
    """Write the report as a table."""
    host = report["host"]
    lines = [
        "# Two ranks, and what two cores can do",
        "",
        f"Medians of {report['repeats']} alternating runs, one thread each. {in_words(host)}",
        f"Commit {host['commit']}, {host['date']}. Made by `{report['command']}`.",
        "",
        "Two ranks / one = 2 x smaller pieces x shared machine x ours. Two processes that have nothing to do with each",
        "other are the bound, but update all weights each, where two ranks share that work.",
        "",
        "| network and batch | 2 ranks / 1 | 2 processes / 1 rank | smaller pieces | shared machine | ours |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    names: Sequence[str] = ("two_ranks", "two_processes", "smaller_pieces", "shared_machine", "ours")
    lines += [
        f"| {case['name']} | " + " | ".join(f"{case['ratios'][name]:.2f}" for name in names) + " |"
        for case in report["cases"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Two ranks against one, and against what two cores can do.")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every side")
    parser.add_argument("--cases", nargs="+", choices=speed.CASES, default=list(speed.CASES), help="which networks")
    parser.add_argument("--seconds", type=float, default=2.0, help="that one rank trains in a turn")
    parser.add_argument("--results", type=Path, default=speed.RESULTS, help="folder for pairs.json and pairs.md")
    options = parser.parse_args()
    launcher = Launcher()
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks pairs", *sys.argv[1:]]),
        "repeats": options.repeats,
        "host": describe_host(),
        "cases": [],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    for name in options.cases:
        report["cases"].append(compare(speed.CASES[name], options.repeats, options.seconds, launcher))
        (options.results / "pairs.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (options.results / "pairs.md").write_text(to_markdown(report), encoding="utf-8")
    print(to_markdown(report))


if __name__ == "__main__":
    main()
