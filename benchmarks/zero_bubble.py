"""This benchmark measures the pipelines 1f1b and zero_bubble on two ranks, and predicts them on four from a profile.

    python -m benchmarks zero_bubble [--segments 12] [--steps 8] [--kernels fastest]

The network is linear layers whose two (four) stages take equally long. One training on two ranks has an engine for each
pipeline; segments of steps take turns, in another order every time. Prints the median seconds of a step, and the median
of the ratios to the segment of 1f1b of the same turn. Then `nettorrent profile` measures the network on two ranks, and
the cost model predicts both pipelines in two and in four stages. Writes benchmarks/results/zero_bubble.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.planner import profiled
from nettorrent_mpi.cli.launching import as_root
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.config.sections import Config
from nettorrent_mpi.engine.layout import predicted
from nettorrent_mpi.engine.setup import set_up
from nettorrent_mpi.speedup.machine import Launcher, describe_host, in_words

HERE = Path(__file__).resolve().parent
WIDTH, LAYERS, ROWS, PIECES = 1024, 8, 512, 8
# The first layer needs no gradient of its inputs, and so has half as many inputs more.
INPUTS = WIDTH * 3 // 2
PIPELINES: dict[str, str] = {
    "1f1b": "1f1b",
    "zero_bubble": "zero_bubble",
    "zero_bubble, stored: 2 S - 1": "{zero_bubble: %d}",
}


def config_of(pipeline: str, stages: int, kernels: str) -> Config:
    """Return the configuration of this pipeline in so many equal stages."""
    layers = [f"{{linear: {{units: {WIDTH}, activation: relu}}}}"] * LAYERS + ["{linear: 10}"]
    parts = [LAYERS // stages] * (stages - 1) + [LAYERS // stages + 1]
    swarms = ", ".join(f"{{layers: {part}}}" for part in parts)
    written = PIPELINES[pipeline]
    return configuration.load(
        None,
        [
            f"data={{name: synthetic, rows: {8 * ROWS}, shape: [{INPUTS}]}}",
            f"model.layers=[{', '.join(layers)}]",
            f"train={{batch_size: {ROWS}, micro_batches: {PIECES}, epochs: 1}}",
            "train.optimizer={sgd: {lr: 0.001, momentum: 0.9}}",
            f"layout={{swarms: [{swarms}]}}",
            f"pipeline={written % (2 * stages - 1) if '%' in written else written}",
            f"kernels={kernels}",
        ],
    )


def measure(segments: int, steps: int, kernels: str) -> dict[str, Any]:
    """Return the figures of one training on two ranks. All of them call."""
    from nettorrent_mpi.comm.world import World
    from nettorrent_mpi.engine.engine import Engine

    world, engines, took = World(), {}, {}
    for name in PIPELINES:
        setup = set_up(config_of(name, world.size, kernels), world.size)
        engines[name] = Engine(world, setup.plan)
        engines[name].open_data(setup.dataset, setup.sampler)
        took[name] = list[float]()
    order, turns, done = random.Random(1), list(PIPELINES), 0
    for turn in range(segments + 1):  # the first is not counted
        order.shuffle(turns)
        for name in turns:
            world.barrier()
            began = time.perf_counter()
            for n in range(steps):
                engines[name].step(done + n, 1e-4)
            world.barrier()
            if turn:
                took[name].append((time.perf_counter() - began) / steps)
        done += steps
    for engine in engines.values():
        engine.close()
    return {
        "rank": world.rank,
        "step_ms": {name: 1e3 * median(each) for name, each in took.items()},
        "of_1f1b": {
            name: median(a / b for a, b in zip(each, took["1f1b"], strict=True)) for name, each in took.items()
        },
    }


def predictions(kernels: str) -> list[dict[str, Any]]:
    """Profile the network on two ranks, and predict the pipelines in two and in four stages."""
    with tempfile.TemporaryDirectory(prefix="nettorrent-") as folder:
        known = profiled(config_of("1f1b", 2, kernels), Path(folder), Launcher())
    found = []
    for stages in (2, 4):
        each: dict[str, Any] = {"stages": stages, "step_ms": {}, "bubble": {}}
        for name in PIPELINES:
            setup = set_up(config_of(name, stages, kernels), stages, planning=True, known=known)
            step = predicted(setup.config, setup.network, setup.topology, setup.machine)
            each["step_ms"][name], each["bubble"][name] = 1e3 * step.seconds, step.bubble
            if setup.plan.paces:
                each["paces"] = [pace[:4] for pace in setup.plan.paces]
        each["of_1f1b"] = {name: ms / each["step_ms"]["1f1b"] for name, ms in each["step_ms"].items()}
        found.append(each)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks zero_bubble", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--segments", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8, help="in each segment")
    parser.add_argument("--kernels", default="fastest", choices=["fastest", "numpy"])
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        found = measure(asked.segments, asked.steps, asked.kernels)
        if found["rank"] == 0:
            print(json.dumps(found), flush=True)
        return
    inside = ["-c", "from benchmarks import zero_bubble; zero_bubble.main()", "--inside"]
    inside += ["--segments", str(asked.segments), "--steps", str(asked.steps), "--kernels", asked.kernels]
    environment = {**os.environ, **as_root(), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"} | {
        "OMPI_MCA_mpi_yield_when_idle": "1"
    }
    run = subprocess.run(
        Launcher().command(2, [sys.executable, *inside]), env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode:
        sys.exit(run.stderr)
    line = next(each for each in run.stdout.splitlines() if each.startswith("{"))
    measured = {key: value for key, value in json.loads(line).items() if key != "rank"}
    print("measured, 2 stages:", measured, flush=True)
    told = predictions(asked.kernels)
    for each in told:
        print("predicted:", each, flush=True)
    host = describe_host()
    report = {
        "command": " ".join(["python -m benchmarks zero_bubble", *sys.argv[1:]]),
        "host": host,
        "network": f"{LAYERS} linear layers of {WIDTH} units, {ROWS} rows in {PIECES} micro-batches, {asked.kernels}",
        "measured": measured,
        "predicted": told,
    }
    (HERE / "results" / "zero_bubble.json").write_text(json.dumps(report, indent=1) + "\n")
    print(in_words(host))


if __name__ == "__main__":
    main()
