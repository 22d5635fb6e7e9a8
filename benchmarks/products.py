"""The matrix products of training a fully connected network, and nothing else: the upper limit with NumPy alone.

    python -m benchmarks.products CONFIG.yaml --steps 100

prints one line of JSON. For each layer x @ w, x.T @ dy and, except for the first, dy @ w.T, each into an existing
array.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from typing import Any

import numpy as np

# isort: split
from nettorrent_mpi.config import reading as configuration
from nettorrent_mpi.device.cpu.blas import wake
from nettorrent_mpi.plan.specs import Linear

WARM_UP = 5  # steps before the timed ones


def widths(config: configuration.Config, inputs: int) -> list[int]:
    """Return the numbers of features before and after each layer."""
    return [inputs, *(layer.units for layer in config.model.layers if isinstance(layer, Linear))]


def measure(sizes: list[int], rows: int, steps: int) -> dict[str, Any]:
    """Return the samples per second of the products of `steps` training steps."""
    rng = np.random.default_rng(1)
    xs = [rng.standard_normal((rows, size), dtype=np.float32) for size in sizes]
    weights = [rng.standard_normal(shape, dtype=np.float32) for shape in pairwise(sizes)]
    gradients = [np.empty_like(weight) for weight in weights]
    outs = [np.empty_like(x) for x in xs]
    wake(np.float32)  # so that it is the best that NumPy can do
    begin = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            begin = time.perf_counter()
        for i, weight in enumerate(weights):
            np.matmul(xs[i], weight, out=outs[i + 1])
        for i in range(len(weights) - 1, -1, -1):
            np.matmul(xs[i].T, xs[i + 1], out=gradients[i])
            if i:
                np.matmul(xs[i + 1], weights[i].T, out=outs[i])
    seconds = time.perf_counter() - begin
    return {"samples_per_second": rows * steps / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The products of a fully connected network's training, and nothing else."
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, as `nettorrent train` takes it")
    parser.add_argument("--inputs", type=int, default=784, help="numbers of a row")
    parser.add_argument("--steps", type=int, default=100, help="timed steps")
    options = parser.parse_args()
    config = configuration.load(options.config)
    print(json.dumps(measure(widths(config, options.inputs), config.train.batch_size, options.steps)))


if __name__ == "__main__":
    main()
