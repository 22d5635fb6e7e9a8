"""This benchmark measures what a checkpoint costs the training beside which it is written.

    python -m benchmarks checkpoints [--millions 100] [--ranks 2] [--checkpoints 7] [--write]

Trains a network of so many parameters (float32, Adam) and saves its state every few steps. Reports for each checkpoint
by how much the step that takes the snapshot is delayed (all that happens at the rest: the wait for the checkpoint
before, if there is one, the look whether weights are finite, the copy), and how long a plain copy of the same arrays
into memory that was touched takes, measured right before on all ranks at once; how long the writing takes, and a step
beside it and without it; and by how much a rank's memory grows while it writes. On a busy machine,
the CPU seconds of both tell more than the clock. `--write` puts the figures into
benchmarks/results/checkpoints.json. Medians; a busy machine shows in the spread.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nettorrent_mpi.cli.launching import as_root
from nettorrent_mpi.speedup.machine import Launcher, describe_host, environment

RESULTS = Path(__file__).parent / "results" / "checkpoints.json"
EVERY = 6  # steps between two checkpoints, at least; more if the one before is still being written
COPIES = 3  # plain copies before each checkpoint


def train(millions: float, count: int, folder: Path) -> None:
    """One rank: train, and print what was measured on all ranks."""
    import numpy as np

    import nettorrent_mpi as nt

    width = round((millions * 1e6 / 2) ** 0.5)
    layers = [nt.Flatten(), nt.Linear(width, activation="relu"), nt.Linear(width, activation="relu"), nt.Linear(10)]
    random = np.random.default_rng(0)
    x, y = random.normal(size=(256, width)).astype("float32"), random.integers(0, 10, 256)
    never = {"every_steps": EVERY, "every_epochs": None, "every_seconds": None, "keep": 1}
    with nt.Trainer(
        layers, (x, y), batch_size=32, micro_batches=1, optimizer=nt.Adam(1e-4), output=folder, checkpoint=never
    ) as trainer:
        world, files, engine = trainer._world, trainer._files, trainer._engine
        writer = files._writer
        names = ("copy", "copy_cpu", "delay", "delay_cpu", "write", "grown", "beside", "alone")
        found: dict[str, list[float]] = {name: [] for name in names}
        began = resting = 0.0
        inside = False
        target: list[Any] = []

        def write(*, needed: bool) -> None:
            nonlocal began, resting, inside
            writer.finish()
            told(time.perf_counter())
            blocks = list(engine.owned_blocks().values())
            if not target:
                target.extend(np.ones(block.shape, block.dtype) for block in blocks)
            copies, computed = [], []
            for _ in range(COPIES):
                world.barrier()
                start, cpu = time.perf_counter(), time.thread_time()
                for out, block in zip(target, blocks, strict=True):
                    np.copyto(out, block)
                copies.append(time.perf_counter() - start)
                computed.append(time.thread_time() - cpu)
            Path("/proc/self/clear_refs").write_text("5")
            before = status("VmRSS")
            found["grown"].append(-before)
            world.barrier()
            start, cpu = time.perf_counter(), time.thread_time()
            original(needed=needed)
            found["delay"].append(time.perf_counter() - start)
            found["delay_cpu"].append(time.thread_time() - cpu)
            found["copy"].append(statistics.median(copies))
            found["copy_cpu"].append(statistics.median(computed))
            began, inside = time.perf_counter(), True
            resting = began

        def told(now: float) -> None:
            """Take note of the end of a checkpoint."""
            nonlocal inside
            if inside and writer._step is None:
                inside = False
                found["write"].append(now - began)
                found["grown"][-1] += status("VmHWM")

        def prepare(*given: Any, **named: Any) -> Any:
            nonlocal resting
            now = time.perf_counter()
            was = inside
            told(now)
            if resting:
                found["beside" if was else "alone"].append(now - resting)
            resting = now
            return before_step(*given, **named)

        original, files.write = files.write, write  # type: ignore[method-assign]
        before_step, engine.prepare = engine.prepare, prepare  # type: ignore[method-assign]
        for _ in trainer.train(steps=EVERY * count):
            pass
        told(time.perf_counter())
        sizes = [sum(block.nbytes for block in engine.owned_blocks().values())] * len(found["copy"])
        every = world.gather_objects(found | {"owned": [float(size) for size in sizes]})
        if world.rank == 0:
            print("FOUND", json.dumps(every), flush=True)


def status(name: str) -> float:
    """A line of this process's memory, in bytes."""
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024.0 * int(match[1])


def summarised(every: list[dict[str, list[float]]]) -> dict[str, Any]:
    """The figures of the slowest rank of each checkpoint (the first one is left out: HDF5 is loaded), and medians."""

    def slowest(name: str) -> list[float]:
        return [max(each) for each in zip(*(rank[name] for rank in every), strict=True)][1:]

    copies, delays, writes = slowest("copy"), slowest("delay"), slowest("write")
    ratios = [delay / copy for delay, copy in zip(delays, copies, strict=True)]
    of_cpu = [delay / copy for delay, copy in zip(slowest("delay_cpu"), slowest("copy_cpu"), strict=True)]
    beside = [seconds for rank in every for seconds in rank["beside"]]
    alone = [seconds for rank in every for seconds in rank["alone"]]
    owned = [rank["owned"][0] for rank in every]

    def spread(values: list[float], digits: int = 4) -> dict[str, Any]:
        middle = statistics.median(values) if values else None
        return {"median": middle and round(middle, digits), "all": [round(value, digits) for value in values]}

    return {
        "owned_mb": [round(size / 1e6, 1) for size in owned],
        "copy_seconds": spread(copies),
        "delay_seconds": spread(delays),
        "delay_over_copy": spread(ratios, 3),
        "delay_over_copy_in_cpu_seconds": spread(of_cpu, 3),
        "writing_seconds": spread(writes, 3),
        "written_mb_per_second": round(sum(owned) / 1e6 / statistics.median(writes), 1) if writes else None,
        "step_seconds_alone": round(statistics.median(alone), 4) if alone else None,
        "step_seconds_beside": round(statistics.median(beside), 4) if beside else None,
        "grown_mb": spread([size / 1e6 for size in slowest("grown")], 1),
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a checkpoint costs the training beside it.")
    parser.add_argument("--millions", type=float, default=100.0, help="parameters (default: 100)")
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--checkpoints", type=int, default=7, help="default: 7")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--write", action="store_true", help="write the figures to benchmarks/results/")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        train(options.millions, options.checkpoints, options.folder)
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        asked = ["--rank", "--millions", str(options.millions), "--checkpoints", str(options.checkpoints)]
        program = [sys.executable, "-m", "benchmarks", "checkpoints", *asked, "--folder", str(folder / "run")]
        done = subprocess.run(
            Launcher().command(options.ranks, program),
            env={**environment(), **as_root()},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if done.returncode or not lines:
        sys.exit(f"{done.stdout}\n{done.stderr}")
    found = {
        "command": f"python -m benchmarks checkpoints {' '.join(sys.argv[1:])}",
        "millions": options.millions,
        "ranks": options.ranks,
        "host": describe_host(),
        **summarised(json.loads(lines[0].removeprefix("FOUND "))),
    }
    print(json.dumps(found, indent=1))
    if options.write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
