"""Trains a custom network on NumPy arrays: it classifies points of the plane by the spiral that they lie on.

python examples/own_network.py
mpirun -n 4 python examples/own_network.py
"""

import nettorrent_mpi as nt

nt.prepare()  # threads, and how waiting ranks wait: before NumPy and MPI load

import numpy as np  # noqa: E402

random = np.random.default_rng(0)  # every rank makes the same arrays
y = random.integers(0, 3, 3000)
radius = random.uniform(0.1, 1, y.size)
angle = 4 * radius + 2 * np.pi / 3 * y + random.normal(0, 0.1, y.size)
x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

layers = [nt.Linear(64, activation="tanh"), nt.Linear(64, activation="relu"), nt.Linear(3)]
data = (x[:2500], y[:2500], x[2500:], y[2500:])
with nt.Trainer(layers, data, optimizer=nt.Adam(0.01), batch_size=50) as trainer:
    for record in trainer.train(epochs=5):
        if trainer.rank == 0 and record.evaluated:
            print(f"epoch {record.epoch:.0f}: test accuracy {record.test_accuracy:.1%}", flush=True)
    classes = trainer.predict(x[2500:]).argmax(axis=1)
    assert (classes == y[2500:]).mean() == record.test_accuracy
