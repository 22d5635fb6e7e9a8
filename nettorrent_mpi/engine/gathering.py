"""Whole arrays from blocks, and blocks from whole arrays: the same for any two layouts (design rule 3)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nettorrent_mpi.comm.world import World
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.nn.model import Network
from nettorrent_mpi.plan.topology import Topology

TAG = 78


def gather(
    world: World,
    topology: Topology,
    network: Network,
    blocks: Mapping[str, Array],
    *,
    trainable: bool = False,
    replica: int = 0,
) -> dict[str, Array]:
    """On rank 0: the whole arrays "<layer>/<name>" -> array, of one replica, in the network's order; elsewhere nothing.

    Every rank calls with its `blocks`. The holders of the replica's first row send; a block that every col holds comes
    from the first. `trainable` leaves out running statistics.
    """
    whole: dict[str, Array] = {}
    for s, stage in enumerate(topology.stages):
        for col in range(stage.cols):
            holder = topology.rank(replica, s, 0, col)
            if world.rank not in (0, holder):
                continue
            for key, parameter in network.stage(stage.first, stage.stop, stage.cols, col).parameters:
                if (col > 0 and parameter.axis is None) or (trainable and not parameter.trainable):
                    continue
                if world.rank == holder and world.rank != 0:
                    world.send(np.ascontiguousarray(blocks[key]), 0, TAG)
                if world.rank == 0:
                    block = blocks[key] if holder == 0 else np.empty(parameter.local, next(iter(blocks.values())).dtype)
                    if holder != 0:
                        world.receive(block, holder, TAG)
                    if key not in whole:
                        whole[key] = np.empty(parameter.shape, block.dtype)
                    whole[key][parameter.index] = block
    return whole
