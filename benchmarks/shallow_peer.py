"""ShallowSpeed's own training (github.com/siboehm/ShallowSpeed), timed on random rows.

    mpirun -n 2 python -m benchmarks.shallow_peer CHECKOUT --steps 500

trains its network of eight layers by its own model, worker, schedule and optimizer, on one data-parallel rank or
several, as its train.py does, and prints one line of JSON. Only the rows are others: of MNIST's shape, in memory.
Needs a checkout of the repository, and pandas, which its data set imports.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SIZES = [784, 128, 127, 126, 125, 124, 123, 10]  # train.py's
BATCH, PIECES, RATE = 128, 4, 0.006
WARM_UP = 20  # steps before the timed ones


def rows_for(dataset: Any, steps: int, ranks: int, seed: int) -> None:
    """Give a data set of ShallowSpeed random rows for so many steps of one of the ranks."""
    rng = np.random.default_rng(seed)
    count = BATCH // ranks * steps
    dataset.local_batch_size = BATCH // ranks
    dataset.input_X = rng.standard_normal((count, SIZES[0]), dtype=np.float32)
    dataset.target_y = np.eye(SIZES[-1], dtype=np.float32)[rng.integers(SIZES[-1], size=count)]


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """Train `steps` steps on all ranks; return the samples per second of all together."""
    from mpi4py import MPI
    from shallowspeed.dataset import Dataset
    from shallowspeed.layers import MLP
    from shallowspeed.optimizer import SGD
    from shallowspeed.pipe import NaiveParallelSchedule, Worker

    everyone, alone = MPI.COMM_WORLD, MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank)
    ranks = everyone.size
    model = MLP(SIZES, stage_idx=0, n_stages=1, batch_size=BATCH)
    model.train()
    different = 100  # batches, one after another again and again
    dataset = Dataset(folder, global_batch_size=BATCH, mubatch_size=BATCH // ranks // PIECES)
    rows_for(dataset, different, ranks, everyone.rank)
    worker = Worker(everyone, alone, model, dataset, SGD(model.parameters(), lr=RATE))
    began = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            everyone.Barrier()
            began = time.perf_counter()
        schedule = NaiveParallelSchedule(num_micro_batches=PIECES, num_stages=1, stage_id=0)
        worker.execute(schedule, step % different)
    everyone.Barrier()
    return {"samples_per_second": BATCH * steps / (time.perf_counter() - began), "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description="ShallowSpeed's training, timed.")
    parser.add_argument("checkout", metavar="CHECKOUT", type=Path, help="folder of its repository")
    parser.add_argument("--steps", type=int, default=500, help="timed steps")
    options = parser.parse_args()
    sys.path.insert(0, str(options.checkout))
    told = measure(options.checkout, options.steps)
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(told))


if __name__ == "__main__":
    main()
