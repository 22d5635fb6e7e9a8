"""The steady state of the pipeline without flush allocates no arrays and pickles nothing, as that of the others."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import pairwise
from typing import Any

import pytest
from mpi4py import MPI

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.data.dataset import Options as DataOptions
from nettorrent_mpi.data.dataset import open_dataset
from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.engine import choices, state
from nettorrent_mpi.engine.engine import Engine, Options
from nettorrent_mpi.nn import specs
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.topology import Stage, Topology

ONE = (1, 1)
STAGES = {2: (ONE, ONE), 3: (ONE,) * 3, 4: ((1, 2), (2, 1)), 5: ((2, 1), ONE, ONE, ONE)}  # (rows, cols) of each
LAYERS = (
    specs.Conv2d(16, padding="same", activation="relu"),
    specs.BatchNorm(),
    specs.MaxPool2d(2),
    specs.Conv2d(16, activation="relu"),
    specs.Dropout(0.3),
    specs.Flatten(),
    specs.Linear(64, activation="relu"),
    specs.LayerNorm(),
    specs.Linear(10),
)


@pytest.mark.ranks(*STAGES)
@pytest.mark.parametrize(("micro_batches", "shared"), [(4, True), (1, False)])
def test_a_step_neither_allocates_nor_pickles(
    micro_batches: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it fills the pipeline, keeps it full or drains it."""
    if not shared:
        monkeypatch.setattr(state, "fits", lambda *_: False)
    stages = STAGES[MPI.COMM_WORLD.size]
    cuts = [i * 4 // len(stages) for i in range(len(stages) + 1)]
    spans = zip(pairwise(cuts), stages, strict=True)
    topology = Topology(1, tuple(Stage(*layers, *grid) for layers, grid in spans))
    options = Options(
        specs.CrossEntropy(), specs.Adam(), batch_size=64, micro_batches=micro_batches, pipeline=choices.Async()
    )
    engine = Engine(World(), Network(LAYERS, (16, 16, 3)), topology, options)
    made = DataOptions(rows=640, test_rows=64, shape=(16, 16, 3), classes=10)
    engine.open_data(open_dataset("synthetic", None, options=made), Sampler(640, 1, 0.0, 64))
    for n, left in enumerate([*range(8, 0, -1), *range(4, 0, -1)]):  # over the end of an epoch
        engine.step(n, 0.001, left)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the steady state pickles")

    MPI.pickle.__init__(refuse, refuse)  # what every lower-case call of mpi4py uses
    try:
        with pytest.raises(AssertionError, match="pickles"):
            MPI.COMM_SELF.allgather(1)
        gc.collect()
        tracemalloc.start()
        for n, left in enumerate([6, 5, 4, 3, 2, 1, 3, 2, 1], start=12):
            engine.step(n, 0.001, left)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    finally:
        MPI.pickle.__init__()
    # A micro-batch of the first layer's outputs is 16 x 16 x 16 x 16 x 4 = 262,144 bytes, or more. NumPy's iterators
    # take some tens of KiB for a moment.
    assert held < 30_000, held
    assert peak < 262_144, peak
    engine.close()
