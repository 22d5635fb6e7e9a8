"""A measurement of the links that determines how much can be exchanged in a round without waiting."""

from __future__ import annotations

import math
import time

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.exchange.vector import Vector
from nettorrent_mpi.plan.blocks import Span

PROBE = 1 << 21  # bytes: several times what a token bucket or a socket buffers
TRAVEL = 0.7  # part of a round's compute within which a message has to arrive
WORK = 0.07  # part of a round's compute that copying, sending and merging may cost
COPIES = 1.0e-9  # core seconds per byte that MPI and the kernel spend on a message, both ends together


def parts_that_hide(peers: Group, vector: Vector, seconds: float, messages: int) -> int:
    """Return the number of parts of the vector such that exchanging one hides under `seconds` of compute.

    Each peer sends `messages` in a round. All peers call and get the same answer, the largest number that any of them
    needs. All send at once, so that shared links are measured under their real load.
    """
    size = vector.size * vector.bytes_per_element
    probe = np.zeros(min(PROBE, max(size, 1024)), np.uint8)  # in host memory, like messages
    into = np.empty_like(probe)
    link = 0.0
    for _ in range(2):  # the first message opens the connections
        peers.barrier()
        began = time.perf_counter()
        peers.pass_on(probe, into)
        link = (time.perf_counter() - began) / probe.size
    where = Span(0, min(vector.size, 1 << 18))
    values = vector.device.empty((where.size * len(vector.layers),), vector.dtype)
    touch = math.inf
    vector.device.synchronize()
    for _ in range(4):  # the first one warms the cache; any may be interrupted
        began = time.perf_counter()
        vector.read(where, values)
        vector.move(where, 0.0, values, values)
        vector.mix(where, 0.0, values)
        vector.device.synchronize()
        touch = min(touch, (time.perf_counter() - began) / max(values.nbytes, 1))
    travels = TRAVEL * seconds / (link * messages)
    works = WORK * seconds / (touch + COPIES * messages)
    most = np.array([size / max(min(travels, works), 1.0)])
    peers.maximum(most)
    return max(round(float(most[0])), 1)  # one message that nearly hides is better than two halves
