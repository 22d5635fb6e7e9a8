"""This benchmark shows where the time of a training step goes on one rank: matrix products, convolutions, the rest.

    python -m benchmarks inside [--cases mlp-128 cnn-64] [--steps 200]

Times every layer's forward and backward, the loss, the optimizer and the gathering of rows, each as the median over the
steps; and within them the products themselves (calls of BLAS or oneDNN, or NumPy's matmul). Layers are executed in
every step, though a training repeats their calls of operations alone. Writes benchmarks/results/inside.json and
inside.md. Timing costs about a microsecond per call, which is included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

STEPS_BEFORE = 10


class Stopwatch:
    """A Stopwatch adds up the calls of some methods in a step, and keeps every step's sum."""

    def __init__(self) -> None:
        self._now: dict[str, float] = defaultdict(float)
        self.steps: dict[str, list[float]] = defaultdict(list)

    def watch(self, owner: Any, method: str, name: str) -> None:
        inner, now, clock = getattr(owner, method), self._now, time.perf_counter

        def timed(*arguments: Any, **options: Any) -> Any:
            began = clock()
            try:
                return inner(*arguments, **options)
            finally:
                now[name] += clock() - began

        setattr(owner, method, timed)

    def end_step(self, seconds: float) -> None:
        for name, took in self._now.items():
            self.steps[name].append(took)
        self.steps["step"].append(seconds)
        self._now.clear()


def measure(config: str, steps: int) -> dict[str, Any]:
    """Return the seconds of a step by operation, the median over the steps. Runs as a single rank."""
    from nettorrent_mpi.comm.world import World
    from nettorrent_mpi.config import reading as configuration
    from nettorrent_mpi.device.cpu import CpuOperations
    from nettorrent_mpi.engine.engine import Engine
    from nettorrent_mpi.engine.run_plan import Plan
    from nettorrent_mpi.engine.setup import set_up

    setup = set_up(configuration.load(config), 1)
    engine = Engine(World(), Plan(setup.network, setup.topology, setup.options))
    engine.open_data(setup.dataset, setup.sampler)
    engine.pipeline._repeats = False
    for n in range(STEPS_BEFORE):
        engine.step(n, 1e-4)
    watch = Stopwatch()
    for method in ("matmul", "convolve", "convolve_grad_x", "convolve_grad_w"):
        watch.watch(CpuOperations, method, "products")
    _watch_layers(watch, engine.layers)
    watch.watch(engine.optimizer, "update", "optimizer")
    watch.watch(engine.pipeline.loss, "forward", "loss")
    watch.watch(engine.train._inputs, "batch", "rows gathered")
    for n in range(STEPS_BEFORE, STEPS_BEFORE + steps):
        began = time.perf_counter()
        engine.step(n, 1e-4)
        watch.end_step(time.perf_counter() - began)
    engine.close()
    return {name: median(took) for name, took in watch.steps.items()}


def _watch_layers(watch: Stopwatch, sequence: Any) -> None:
    for layer in sequence.layers:
        if hasattr(layer, "body"):
            _watch_layers(watch, layer.body)
            _watch_layers(watch, layer.shortcut)
            continue
        for method in ("forward", "backward"):
            watch.watch(layer, method, f"{type(layer).__name__.removesuffix('Layer')}, {method}")


def to_markdown(report: Mapping[str, Any]) -> str:
    """Write the report as a table for each case."""
    from nettorrent_mpi.speedup.machine import in_words

    host = report["host"]
    lines = [
        "# Where a step's time goes",
        "",
        f"One rank, one thread; median over {report['steps']} steps. {in_words(host)}",
        f"Commit {host['commit']}, {host['date']}. Made by `{report['command']}`.",
    ]
    for case in report["cases"]:
        took = dict(case["seconds"])
        step, products = took.pop("step"), took.pop("products")
        rest = step - sum(took.values())
        lines += ["", f"## {case['name']}", ""]
        lines += [f"{step * 1e3:.3f} ms a step, **{products / step:.0%} of it in products and convolutions**.", ""]
        lines += ["| what | µs | share |", "|---|---:|---:|"]
        for name, seconds in [*sorted(took.items(), key=lambda item: -item[1]), ("everything else", rest)]:
            lines.append(f"| {name} | {seconds * 1e6:,.0f} | {seconds / step:.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--one"]:  # a process of its own for each case
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
        return
    from benchmarks import speed
    from nettorrent_mpi.config.writing import to_yaml
    from nettorrent_mpi.speedup import modes, runs
    from nettorrent_mpi.speedup.machine import describe_host

    parser = argparse.ArgumentParser(description="Where the time of a training step goes on one rank.")
    parser.add_argument("--cases", nargs="+", choices=speed.CASES, default=list(speed.CASES), help="which networks")
    parser.add_argument("--steps", type=int, default=100, help="that are timed")
    parser.add_argument("--results", type=Path, default=speed.RESULTS, help="folder for inside.json and inside.md")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks inside", *sys.argv[1:]]),
        "steps": options.steps,
        "host": describe_host(),
        "cases": [],
    }
    for name in options.cases:
        plan, _ = modes.serial(speed.settings(speed.CASES[name]))
        assert plan.config is not None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "one.yaml")
            path.write_text(to_yaml(plan.config), encoding="utf-8")
            told = runs.run([sys.executable, "-m", "benchmarks.inside", "--one", str(path), str(options.steps)])
        report["cases"].append({"name": name, "seconds": json.loads(told.splitlines()[-1])})
        print(to_markdown(report | {"cases": report["cases"][-1:]}), flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "inside.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.results / "inside.md").write_text(to_markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
