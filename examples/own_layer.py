"""Adds a layer and a data set from outside the package, and trains with both: they can be named in configurations, too.

python examples/own_layer.py
mpirun -n 4 python examples/own_layer.py
"""

from dataclasses import dataclass

import nettorrent_mpi as nt

nt.prepare()  # threads, and how waiting ranks wait: before NumPy and MPI load

import numpy as np  # noqa: E402


@dataclass(frozen=True)
class Sine(nt.LayerSpec):  # `sine: {frequency: 3}` in a configuration
    kind = "sine"
    frequency: float = 1.0


@nt.register_layer(Sine)
class SineLayer(nt.Layer):
    def __init__(self, spec, site):
        super().__init__(site.name, site.inputs, site.inputs)  # the outputs are as many as the inputs
        self.frequency = spec.frequency

    def forward(self, params, x, ctx):
        # memory that is kept until backward, and used again in the next step
        return np.sin(self.frequency * x, out=ctx.workspace.keep("y", x.shape)), x

    def backward(self, params, grads, saved, dy, ctx):
        return self.frequency * np.cos(self.frequency * saved) * dy


@nt.register_dataset("waves")  # `data: {name: waves}` in a configuration
def open_waves(root, options):
    x = np.random.default_rng(options.seed).uniform(-1, 1, (3000, 2)).astype(np.float32)
    y = (np.sin(6 * x[:, 0]) > x[:, 1]).astype(np.int64)  # above or below a wave?
    return nt.from_arrays(x[:2500], y[:2500], x[2500:], y[2500:])


with nt.Trainer([nt.Linear(32), Sine(3.0), nt.Linear(2)], {"name": "waves"}, optimizer="rmsprop") as trainer:
    *_, last = trainer.train(epochs=10)
    print(f"rank {trainer.rank}: test accuracy {last.test_accuracy:.1%}", flush=True)
