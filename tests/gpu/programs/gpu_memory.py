"""Trains small networks on the host device, and writes what each rank's arrays take of its memory, and what was
predicted: a line of JSON for each network, with [predicted, taken] of each stage. Under mpirun; argument: a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nettorrent_mpi import env

env.prepare()

from nettorrent_mpi.api import Trainer  # noqa: E402
from nettorrent_mpi.comm.world import World  # noqa: E402
from nettorrent_mpi.device.gpu import planned  # noqa: E402
from nettorrent_mpi.planning import load_config  # noqa: E402
from tests.gpu.host.main import install  # noqa: E402

WORKSPACE = 1000  # bytes that the host device asks for a convolution
IMAGES = "data={name: synthetic, rows: 400, test_rows: 100, shape: [9, 7, 3], classes: 5}"
WIDE = "model.layers=[flatten, {linear: {units: 300, activation: relu}}, {linear: 200}, {dropout: 0.3}, {linear: 5}]"
DEEP = (
    "model.layers=[{conv2d: {filters: 24, padding: same}}, batch_norm, relu, {residual: {layers: [{conv2d: {filters: "
    "24, padding: same, activation: gelu}}]}}, {max_pool2d: 2}, {conv2d: {filters: 40}}, flatten, {linear: 5}]"
)
CASES = {
    "wide": [IMAGES, WIDE],
    "wide, adam, cols": [IMAGES, WIDE, "train.optimizer=adam", "layout={swarms: [{layers: 3, cols: RANKS}]}"],
    "wide, float64, rows": [IMAGES, WIDE, "dtype=float64", "layout={swarms: [{layers: 3, rows: RANKS}]}"],
    "deep": [IMAGES, DEEP, "data.augment=[flip, crop]"],
    "deep, replicas": [IMAGES, DEEP, "layout={replicas: RANKS}"],
    "deep, gossip": [IMAGES, DEEP, "layout={replicas: RANKS}", "exchange=gossip"],
    "wide, small messages": [IMAGES, WIDE, "layout={replicas: RANKS}", "exchange={gossip: {compress: int8}}"],
    "wide, async": [IMAGES, WIDE, "pipeline=async", "train.report_every=3"],
}


def main() -> None:
    install(3)
    planned.ASSUMED = WORKSPACE
    world = World()
    for name, case in CASES.items():
        if world.size == 1 and "exchange" in str(case):
            continue
        changes = [change.replace("RANKS", str(world.size)) for change in case]
        settings = ["device=gpu", "train.batch_size=60", "train.steps=7", "train.schedule=constant", "seed=2"]
        with Trainer(load_config(None, *settings, *changes), comm=world) as trainer:
            list(trainer.train())
            trainer.evaluate()
            stage = trainer.setup.topology.place(world.rank).stage
            found = world.gather_objects((stage, trainer.gpu_bytes))
            if world.rank == 0:
                pairs = [
                    (each.total - each.libraries, max(taken for place, taken in found if place == stage))
                    for stage, each in enumerate(trainer.planned.gpu_memory)
                ]
                with Path(sys.argv[1]).open("a") as file:
                    file.write(json.dumps([name, pairs]) + "\n")


main()
