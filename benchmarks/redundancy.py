"""This benchmark measures what copies at a buddy cost: steps with a copy after every 1, 5 and 10, beside steps without.

    python -m benchmarks.redundancy [CONFIG] [--ranks 2 4] [--segments 30] [--steps 60] [--set KEY=VALUE]...

One training for each number of ranks, in which segments of steps take turns: without copies, and with each interval, in
another order every time. Prints the median seconds of a step without, and for each interval the median of the ratios to
the segment without of the same turn; writes benchmarks/results/redundancy.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from nettorrent_mpi.cli.launching import as_root
from nettorrent_mpi.speedup.machine import Launcher, describe_host, in_words

HERE = Path(__file__).resolve().parent
INTERVALS = (1, 5, 10)


def measure(config: str, settings: list[str], segments: int, steps: int) -> dict[str, Any]:
    """Return the figures of one training. All ranks call."""
    from nettorrent_mpi.comm.world import World
    from nettorrent_mpi.config import reading
    from nettorrent_mpi.engine.engine import Engine
    from nettorrent_mpi.engine.redundancy import Redundancy
    from nettorrent_mpi.engine.setup import set_up

    world = World()
    setup = set_up(reading.load(config, settings), world.size)
    engine = Engine(world, setup.plan)
    engine.open_data(setup.dataset, setup.sampler)
    kept = {every: Redundancy(engine, every) for every in INTERVALS}
    kinds: list[int | None] = [None, *INTERVALS]
    took: dict[int | None, list[float]] = {kind: [] for kind in kinds}
    order, step = random.Random(1), 0
    for turn in range(segments + 1):  # the first is not counted
        order.shuffle(kinds)
        for kind in kinds:
            engine.wiring.everyone.barrier()
            began = time.perf_counter()
            for n in range(steps):
                engine.step(step, 1e-3, steps - n)
                step += 1
                if kind is not None:
                    kept[kind].after(step)
            if kind is not None:
                kept[kind]._finish()
            engine.wiring.everyone.barrier()
            if turn:
                took[kind].append((time.perf_counter() - began) / steps)
    found: dict[str, Any] = {
        "rank": world.rank,
        "layout": setup.layout_line,
        "copies_mb": max(world.gather_objects(kept[1].bytes)) / 1e6,
        "step_ms": 1e3 * median(took[None]),
        **{
            f"every_{every}": median(a / b for a, b in zip(took[every], took[None], strict=True)) for every in INTERVALS
        },
    }
    for each in kept.values():
        each.close()
    engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.redundancy", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("config", nargs="?", default="configs/mnist.yaml")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--segments", type=int, default=30)
    parser.add_argument("--steps", type=int, default=60, help="in each segment")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        found = measure(asked.config, asked.set, asked.segments, asked.steps)
        if found["rank"] == 0:
            print(json.dumps(found), flush=True)
        return
    cases = []
    for ranks in asked.ranks:
        inside = ["-m", "benchmarks.redundancy", "--inside", asked.config]
        inside += ["--segments", str(asked.segments), "--steps", str(asked.steps)]
        inside += [part for value in asked.set for part in ("--set", value)]
        command = Launcher().command(ranks, [sys.executable, *inside])
        environment = {**os.environ, **as_root(), "OPENBLAS_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(run.stderr)
        cases.append({"ranks": ranks, **json.loads(run.stdout.strip().splitlines()[-1])})
        print(cases[-1], flush=True)
    host = describe_host()
    report = {"command": " ".join(["python -m benchmarks.redundancy", *sys.argv[1:]]), "host": host, "cases": cases}
    (HERE / "results" / "redundancy.json").write_text(json.dumps(report, indent=1) + "\n")
    print(in_words(host))


if __name__ == "__main__":
    main()
