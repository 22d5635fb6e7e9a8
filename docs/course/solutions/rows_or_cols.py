"""Exercise 2: one linear layer on two ranks, divided by rows and by neurons. mpirun -n 2 python rows_or_cols.py"""

import numpy as np

import nettorrent_mpi as nt
from nettorrent_mpi.config.sections import Layout, Swarm

ROWS, INPUTS, UNITS, RANKS = 64, 784, 512, 2
random = np.random.default_rng(0)
x, y = random.random((ROWS, INPUTS), np.float32), random.integers(0, 10, ROWS)
layers = [nt.Linear(UNITS, activation="relu"), nt.Linear(10)]
weights = {}
for way in ("rows", "cols"):
    swarm = Swarm(layers=2, **{way: RANKS})
    with nt.Trainer(layers, (x, y), layout=Layout(swarms=(swarm,)), batch_size=ROWS, dtype="float64") as trainer:
        for _ in trainer.train(steps=5):
            pass
        weights[way] = trainer.parameters()
        rank = trainer.rank

# Parallel equals serial, so both ways give the same weights, up to rounding.
for name, values in weights["rows"].items():
    assert np.abs(values - weights["cols"][name]).max() < 1e-12, name

# Bytes that a rank sends in one step for a layer of this size inside a network, in float32 and over messages.
part = 4 * (RANKS - 1) / RANKS
gradients = 2 * part * INPUTS * UNITS  # rows: reduce-scatter and all-gather of the weight gradients
activations = part * ROWS * UNITS + part * ROWS * INPUTS  # cols: outputs forward, gradients of the inputs backward
if rank == 0:
    print(f"rows: {gradients / 1e6:.2f} MB a step, however many rows; cols: {activations / 1e6:.2f} MB at {ROWS} rows")
    equal = 2 * INPUTS * UNITS / (UNITS + INPUTS)
    print(f"They are equal at {equal:.0f} rows: below, divide the neurons; above, the rows.")
