"""python -m tests.programs.growing_study FOLDER TRIALS GROUPS: tries so many small networks, in as many windows as
tests.growth compares, and prints what ranks take after each.

The study goes on in each window by one more command on the same ranks. Rank 0 prints a JSON list: for each rank, the
Usage after each window, and the number that MPI gives a new communicator then.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nettorrent_mpi import env

env.prepare()

from mpi4py import MPI  # noqa: E402

from nettorrent_mpi.__main__ import main  # noqa: E402
from tests.growth import WINDOWS, usage  # noqa: E402

SEARCH = """\
base:
  data: {name: synthetic, rows: 60, test_rows: 10, shape: [4], classes: 3, validation: 0.2}
  model: {layers: [{linear: {units: 4, activation: relu}}, {linear: 3}]}
  train: {epochs: 2, batch_size: 16}
parameters:
  train.optimizer.adam.lr: {low: 1e-3, high: 1e-1, log: true}
  train.batch_size: {low: 8, high: 24}
  fault: {none: {}, diverged: {train.optimizer: {sgd: {lr: 1.0e+38}}}, failed: {train.batch_size: -1}}
prune: median
"""


def communicator() -> int:
    """The number of a new communicator: it grows if others are not freed."""
    made = MPI.COMM_WORLD.Dup()
    number = made.py2f()
    made.Free()
    return number


folder, trials, groups = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
seen, numbers = [], []
for window in range(1, WINDOWS + 1):
    file = folder / f"search-{window}.yaml"
    if MPI.COMM_WORLD.rank == 0:
        file.write_text(f"{SEARCH}trials: {trials * window // WINDOWS}\n")
    MPI.COMM_WORLD.Barrier()
    code = main(["tune", str(file), "--groups", groups, "--output", str(folder / "study")])
    assert code == 0, code
    seen.append(usage())
    numbers.append(communicator())
told = MPI.COMM_WORLD.gather((seen, numbers))
if told is not None:
    print(json.dumps(told))
