"""python -m tests.programs.growing STEPS FOLDER SETTINGS: trains a small network, and prints what ranks take.

SETTINGS, in JSON, are those of `nettorrent_mpi.Trainer`. There are reports, evaluations and checkpoints among the
steps. Rank 0 prints a JSON list: for each rank the Usage in each quarter of the steps.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import nettorrent_mpi as nt

nt.Trainer  # noqa: B018  before NumPy is loaded, so that the environment is prepared

import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

from tests.growth import WINDOWS, Usage, least, usage  # noqa: E402

LAYERS = (nt.Linear(12, activation="relu"), nt.Dropout(0.1), nt.Linear(4), nt.Linear(3))

steps, folder, given = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
draw = np.random.default_rng(1)
x, y = draw.normal(size=(480, 8)).astype(np.float32), draw.integers(0, 3, 480)
settings: dict[str, Any] = {"batch_size": 16, "report_every": 50, "evaluate_every": 20, "validation": 0.1}
settings |= {"checkpoint": {"every_epochs": 40, "keep": 2}, "steps": steps, "optimizer": {"adam": {"lr": 1e-4}}}
settings["layout"] = {"replicas": MPI.COMM_WORLD.size, "swarms": [{"layers": 3}]}
found: list[list[Usage]] = [[] for _ in range(WINDOWS)]
with nt.Trainer(LAYERS, (x, y, x[:48], y[:48]), output=folder, **(settings | given)) as trainer:
    for record in trainer.train():
        if record.evaluated:
            found[(record.step - 1) * WINDOWS // steps].append(usage())
told = MPI.COMM_WORLD.gather([least(window) for window in found])
if told is not None:
    print(json.dumps(told))
