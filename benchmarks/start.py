"""Start-up: from starting mpirun to the end of the first training step.

    python -m benchmarks.start [CONFIG] [--ranks 4] [--repeats 7] [--beside DIR] [--set KEY=VALUE]... [--write NAME]

Starts the training, reports every step, and takes the time at which the line of step 1 arrives; CPU seconds are those
of all ranks for the whole run of three steps. In turns with it runs the part that cannot be changed here: mpirun with
ranks that do nothing but load MPI. `--beside` names another checkout, such as one before a change, which takes turns as
well. Prints a line for every run, then the medians, the median of the ratios to the first `--beside` of the same turn,
and the seconds of each phase (start_seconds of summary.json). `--write` adds all of it to benchmarks/results/start.json
under a name.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from nettorrent_mpi.cli.launching import as_root
from nettorrent_mpi.speedup.machine import Launcher, describe_host, in_words

HERE = Path(__file__).resolve().parent.parent
ALONE = "from mpi4py import MPI; MPI.COMM_WORLD.Barrier(); print('loaded', flush=True)"
RESULTS = HERE / "benchmarks" / "results" / "start.json"
STEPS = 3  # a step's line is printed one step later, so that no rank waits for it


class Start(NamedTuple):
    """Seconds until step 1 was reported (or the ranks had loaded MPI), CPU seconds of all processes to the end, and, of
    a training, seconds of each phase on rank 0."""

    seconds: float
    cpu: float
    phases: dict[str, float]


def measure(command: list[str], tree: Path, until: str) -> Start:
    """Run the command with the package of `tree`, until the first line that contains `until`, and on to its end."""
    environment = {**os.environ, **as_root(), "PYTHONPATH": str(tree)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # users have compiled modules from their second run on
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, seconds, lines = time.perf_counter(), None, []
    with subprocess.Popen(
        command, env=environment, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            lines.append(line)
            if seconds is None and until in line:
                seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode or seconds is None:
        sys.exit(f"{shlex.join(command)} in {tree} did not tell {until!r}:\n{''.join(lines)}")
    summary = tree if until == "loaded" else Path(command[command.index("--output") + 1]) / "summary.json"
    phases = json.loads(summary.read_text(encoding="utf-8")).get("start_seconds", {}) if summary.is_file() else {}
    return Start(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, phases)


def median(starts: list[Start]) -> str:
    """Format the medians."""
    seconds = [start.seconds for start in starts]
    spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
    return f"{statistics.median(seconds):.2f} s ({spread}), {statistics.median(s.cpu for s in starts):.2f} s of CPU"


def phases(starts: list[Start]) -> dict[str, float]:
    """Return the median seconds of each phase."""
    names = dict.fromkeys(name for start in starts for name in start.phases)
    return {name: round(statistics.median(start.phases.get(name, 0.0) for start in starts), 3) for name in names}


def write(name: str, about: dict[str, Any]) -> None:
    """Add a comparison to the results."""
    there = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(there | {name: about}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time from starting mpirun to the end of the first training step.")
    parser.add_argument("config", nargs="?", help="the configuration (default: the digits)")
    parser.add_argument("--ranks", type=int, default=4, help="default: 4")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each side, in turns (default: 7)")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="another checkout; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for train; repeatable")
    parser.add_argument("--write", metavar="NAME", help="add the figures to benchmarks/results/start.json")
    options = parser.parse_args()
    launcher = Launcher()
    trees = {str(tree): tree.resolve() for tree in [HERE, *options.beside]}
    found: dict[str, list[Start]] = {name: [] for name in ("MPI alone", *trees)}
    sets = [f"train.steps={STEPS}", "train.epochs=null", "train.report_every=1", *options.set]
    for turn in range(options.repeats + 1):
        alone = launcher.command(options.ranks, [sys.executable, "-c", ALONE])
        found["MPI alone"].append(measure(alone, HERE, "loaded"))
        for name, tree in trees.items():
            with tempfile.TemporaryDirectory() as folder:
                train = ["-m", "nettorrent_mpi.train", *([options.config] if options.config else [])]
                asked = [word for change in sets for word in ("--set", change)]
                program = [sys.executable, *train, "--output", f"{folder}/run", *asked]
                found[name].append(measure(launcher.command(options.ranks, program), tree, "step 1/"))
        if turn == 0:  # the modules were compiled
            for starts in found.values():
                starts.clear()
            continue
        print("  ".join(f"{name} {starts[-1].seconds:.2f} s" for name, starts in found.items()), flush=True)
    host = describe_host()
    print(in_words(host))
    about: dict[str, Any] = {"host": host, "ranks": options.ranks, "config": options.config, "set": options.set}
    before = found.get(str(options.beside[0])) if options.beside else None
    for name, starts in found.items():
        side = "here" if name == str(HERE) else "before" if starts is before else name
        print(f"{side}: {median(starts)}  {phases(starts) or ''}")
        about[side] = {"seconds": [round(s.seconds, 2) for s in starts], "cpu": [round(s.cpu, 1) for s in starts]}
        about[side] |= {"start_seconds": phases(starts)} if phases(starts) else {}
    if before is not None:
        for what in ("seconds", "cpu"):
            pairs = zip(found[str(HERE)], before, strict=True)
            about[f"{what}_ratio"] = ratio = statistics.median(getattr(a, what) / getattr(b, what) for a, b in pairs)
            print(f"{what}, here to {options.beside[0]}: {ratio:.2f}")
    if options.write:
        write(options.write, about)


if __name__ == "__main__":
    main()
