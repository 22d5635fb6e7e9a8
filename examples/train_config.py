"""Trains the network of a configuration file, and saves it: the handwritten digits unless another file is named.

python examples/train_config.py
mpirun -n 4 python examples/train_config.py configs/mnist.yaml train.epochs=2
"""

import sys

import nettorrent_mpi as nt

nt.prepare()  # threads, and how waiting ranks wait: before NumPy and MPI load

with nt.Trainer(nt.load_config(*sys.argv[1:])) as trainer:
    for record in trainer.train():
        if trainer.rank == 0:
            accuracy = f", test accuracy {record.test_accuracy:.1%}" if record.test_accuracy is not None else ""
            print(f"epoch {record.epoch:.2f}: loss {record.train_loss:.4f}{accuracy}", flush=True)
    trainer.save("model.h5")
