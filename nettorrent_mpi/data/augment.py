"""Augmentation changes training images at random, depending on (key, row number) only, so alike on every rank.

    flip   left and right exchanged, for every second image
    crop   the image is padded by 4 zero pixels on each side and a random part of the original size is cut out

as is usual for CIFAR-10 (He et al., Deep Residual Learning for Image Recognition, 2015, section 4.2). The padding is
the stored value zero: it is applied before the rows are scaled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.errors import ConfigError

PADDING = 4

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
    (np.uint64(31), np.uint64(1)),
)


class Augment:
    """Applies "flip", "crop" or both to images of `shape` (height, width, channels).

    Raises ConfigError for an unknown name, and for rows that are not images.
    """

    def __init__(self, names: Sequence[str], shape: tuple[int, ...]):
        if len(shape) != 3:
            text = f"{', '.join(names)} needs images (height, width, channels); the rows of this data set are {shape}"
            raise ConfigError(text, key="data.augment")
        self.flip, self.crop = "flip" in names, "crop" in names
        self._height, self._width, _ = shape
        self._hash, self._work = np.empty(0, np.uint64), np.empty(0, np.uint64)

    def apply(self, indices: Array, key: int, raw_bR: Array, out_bR: Array) -> None:
        """Compute out_bR[i] <- raw_bR[i] changed by (key, indices[i]); both uint8, (b, bytes of a row)."""
        count = len(indices)
        height, width = self._height, self._width
        # A pixel is one item of all its bytes, whatever the channels and their type.
        pixel = np.dtype((np.void, raw_bR.shape[1] // (height * width)))
        source, target = (x.view(pixel).reshape(count, height, width) for x in (raw_bR, out_bR))
        if self.crop:
            out_bR.fill(0)
        for row, bits in enumerate(self._bits(indices, key)):
            image = source[row, :, ::-1] if self.flip and bits & 1 else source[row]
            if self.crop:
                # Multiply and shift maps 16 random bits onto 0..8 without a division.
                dy = ((bits >> 8 & 0xFFFF) * (2 * PADDING + 1) >> 16) - PADDING
                dx = ((bits >> 24 & 0xFFFF) * (2 * PADDING + 1) >> 16) - PADDING
                # If nothing of a small image is left in the part, both ends coincide and nothing is copied.
                top, left = min(height, max(0, -dy)), min(width, max(0, -dx))
                bottom, right = max(top, min(height, height - dy)), max(left, min(width, width - dx))
                target[row, top:bottom, left:right] = image[top + dy : bottom + dy, left + dx : right + dx]
            else:
                target[row] = image

    def _bits(self, indices: Array, key: int) -> list[int]:
        """Return 64 random bits for each row from the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA
        2014)."""
        count = len(indices)
        if len(self._hash) < count:
            self._hash, self._work = np.empty(count, np.uint64), np.empty(count, np.uint64)
        bits, work = self._hash[:count], self._work[:count]
        np.copyto(bits, indices, casting="unsafe")
        np.multiply(bits, _GOLDEN, out=bits)
        np.add(bits, np.uint64(key & 0xFFFFFFFFFFFFFFFF), out=bits)
        for shift, factor in _MIX:
            np.right_shift(bits, shift, out=work)
            np.bitwise_xor(bits, work, out=bits)
            np.multiply(bits, factor, out=bits)
        numbers: list[int] = bits.tolist()
        return numbers
