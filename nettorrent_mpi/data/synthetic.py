"""A synthetic data set is generated from a seed, in any size and shape, for speed measurements; it can be learned.

Every class has a prototype of random bytes; a row is the mean of its class's prototype and of as much random noise.
"""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.device.random import generator
from nettorrent_mpi.plan.records import dataclass

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class SyntheticRows:
    """The rows of one split, equal for equal (seed, split, rows, shape, classes)."""

    seed: int
    split: str
    rows: int
    shape: tuple[int, ...]
    classes: int

    def fill(self, out: Array) -> None:
        """Fill (rows, *shape) uint8, block by block: it needs at most a few MB, and the prototypes, besides `out`."""
        size = int(np.prod(self.shape))
        prototypes = generator(self.seed, "synthetic", "prototypes").integers(0, 128, (self.classes, size), np.uint8)
        noise = generator(self.seed, "synthetic", "noise", self.split)
        labels = self.labels()
        rows = out.reshape(self.rows, size)
        step = max(1, _BLOCK_BYTES // size)
        for first in range(0, self.rows, step):
            block = rows[first : first + step]
            block[...] = noise.integers(0, 128, block.shape, np.uint8)
            block += prototypes[labels[first : first + step]]

    def labels(self) -> Array:
        """Return (rows,) int64, drawn evenly from the classes."""
        return generator(self.seed, "synthetic", "labels", self.split).integers(0, self.classes, self.rows, np.int64)
