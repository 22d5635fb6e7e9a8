"""The ranks of the part `parity`: each network is trained by all of them on the GPU, and by rank 0 alone on the CPU."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np

from nettorrent_mpi import env

STEPS, ROWS, BATCH = 20, 210, 32  # an epoch has seven steps, the last one with fewer rows


def networks(ranks: int) -> dict[str, tuple[list[Any], dict[str, Any], Any]]:
    """Return layers, settings, and a layout for so many ranks, by name."""
    import nettorrent_mpi as nt

    def block(filters: int, stride: int) -> Any:
        layers = [
            nt.Conv2d(filters, stride=stride, padding="same", bias=False),
            nt.BatchNorm(),
            nt.Relu(),
            nt.Conv2d(filters, padding="same", bias=False),
            nt.BatchNorm(),
        ]
        shortcut = [nt.Conv2d(filters, 1, stride=stride, bias=False), nt.BatchNorm()] if stride > 1 else []
        return nt.Residual(layers, shortcut)

    perceptron = [nt.Flatten(), nt.Linear(61, activation="relu"), nt.Linear(37, activation="gelu"), nt.Linear(10)]
    images = [
        *(nt.Conv2d(12, padding="same", activation="relu"), nt.BatchNorm(), nt.MaxPool2d(2), nt.Dropout(0.25)),
        *(nt.Conv2d(18, activation="relu"), nt.Flatten(), nt.Linear(40, activation="tanh"), nt.Dropout(0.5)),
        nt.Linear(10),
    ]
    residual = [
        *(nt.Conv2d(8, padding="same", bias=False), nt.BatchNorm(), nt.Relu(), block(8, 1), nt.Relu()),
        *(block(12, 2), nt.Relu(), nt.GlobalAvgPool2d(), nt.Linear(10)),
    ]
    momentum = {"sgd": {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.001}}
    return {
        "perceptron": (perceptron, {"optimizer": momentum, "clip_norm": 1.0}, {"replicas": ranks}),
        "images": (images, {"optimizer": momentum, "augment": ["flip", "crop"]}, "layers"),
        "residual": (
            residual,
            {"optimizer": momentum, "pipeline": "gpipe"},
            {"replicas": 2} if ranks > 2 else "layers",
        ),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.parity_ranks")
    parser.add_argument("--host", action="store_true")
    options = parser.parse_args()
    env.prepare()
    if options.host:
        from tests.gpu.host.main import install

        install(0)
    import nettorrent_mpi as nt
    from nettorrent_mpi.comm.world import World

    world, rng = World(), np.random.default_rng(7)
    x, y = rng.integers(0, 256, (ROWS, 13, 11, 3), np.uint8), rng.integers(0, 10, ROWS)
    for name, (layers, settings, layout) in networks(world.size).items():
        for dtype in ("float32", "float64"):
            shared = {**settings, "dtype": dtype, "batch_size": BATCH, "micro_batches": 4, "steps": STEPS, "seed": 3}
            found = trained(nt.Trainer(layers, (x, y), comm=world, device="gpu", layout=layout, **shared))
            if world.rank == 0:
                alone = World(comm_self()) if world.size > 1 else world
                wanted = trained(nt.Trainer(layers, (x, y), comm=alone, device="cpu", kernels="numpy", **shared))
                worst = {key: difference(found[key], wanted[key]) for key in wanted}
                where = max(worst, key=lambda key: worst[key])
                told = {"case": f"{name} in {dtype}", "dtype": dtype, "difference": worst[where], "where": where}
                sys.stdout.write(json.dumps(told) + "\n")
                sys.stdout.flush()
            world.barrier()
    return 0


def comm_self() -> Any:
    """Return the communicator of this rank alone."""
    from mpi4py import MPI

    return MPI.COMM_SELF


def trained(trainer: Any) -> dict[str, Any]:
    """Return the weights after the steps."""
    with trainer:
        for _ in trainer.train():
            pass
        arrays: dict[str, Any] = trainer.parameters()
    return arrays


def difference(found: Any, wanted: Any) -> float:
    """Return the largest difference relative to the largest element."""
    most = float(np.abs(wanted).max(initial=0.0))
    return float(np.nan_to_num(np.abs(found - wanted), nan=np.inf).max(initial=0.0)) / max(most, 1e-300)


if __name__ == "__main__":
    sys.exit(main())
