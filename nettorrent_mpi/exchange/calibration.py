"""One measurement of the links tells how much can be exchanged in a round without anybody waiting for it."""

from __future__ import annotations

import math
import time

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.exchange.vector import Vector
from nettorrent_mpi.plan.blocks import Span

PROBE = 1 << 21  # bytes: several times what a token bucket or a socket swallows at once
TRAVEL = 0.7  # of a round's compute may pass until a message has arrived
WORK = 0.07  # of a round's compute may be spent on copying, sending and merging
COPIES = 1.0e-9  # seconds a byte that MPI and the kernel spend on a core for a message, both ends together


def parts_that_hide(peers: Group, vector: Vector, seconds: float, messages: int) -> int:
    """Return into how many parts the vector has to be divided so that exchanging one hides under `seconds` of compute.

    Each peer sends `messages` in a round. All peers call and get the same answer, the most that any of them needs. All
    send at once, so what they share of the network is shared in the measurement, too.
    """
    size = vector.size * vector.bytes_per_element
    probe = np.zeros(min(PROBE, max(size, 1024)), np.uint8)  # in the host's memory, as messages are
    into = np.empty_like(probe)
    link = 0.0
    for _ in range(2):  # the first one opens the connections
        peers.barrier()
        began = time.perf_counter()
        peers.pass_on(probe, into)
        link = (time.perf_counter() - began) / probe.size
    where = Span(0, min(vector.size, 1 << 18))
    values = vector.device.empty((where.size * len(vector.layers),), vector.dtype)
    touch = math.inf
    for _ in range(4):  # the first one fetches what the others find in the cache; any may be interrupted
        began = time.perf_counter()
        vector.read(where, values)
        vector.move(where, 0.0, values, values)
        vector.mix(where, 0.0, values)
        touch = min(touch, (time.perf_counter() - began) / max(values.nbytes, 1))
    travels = TRAVEL * seconds / (link * messages)
    works = WORK * seconds / (touch + COPIES * messages)
    most = np.array([size / max(min(travels, works), 1.0)])
    peers.maximum(most)
    return max(round(float(most[0])), 1)  # a whole that nearly hides is better than two halves
