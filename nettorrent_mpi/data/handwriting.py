"""Handwriting is prepared as the data sets of handwriting prepared theirs, so that networks read what a person draws.

mnist     the character fits into a box of 20 pixels and lies in 28 x 28 with its centre of mass in the middle
          (LeCun, Cortes, Burges, The MNIST database)
emnist    blurred, fitted with a border of 2 pixels into the middle of 28 x 28
          (EMNIST: Cohen, Afshar, Tapson, van Schaik, arXiv:1702.05373, section II-B)
digits    fitted into 32 x 32, of whose blocks of 4 x 4 each becomes one pixel: the part that is inked
          (Alpaydin and Kaynak, Optical Recognition of Handwritten Digits)

Ink is (height, width), 0 for paper and 1 for ink.
"""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.records import dataclass

FAINT = 0.2  # less ink, in parts of the darkest, does not belong to the character
EMPTY = 0.1  # darkest ink of a picture that shows nothing
LONGEST = 1024  # side of a picture that is read
_BLUR = 1 / 80  # the standard deviation in parts of the character: one pixel of a scan of 128 x 128


@dataclass(frozen=True)
class Hand:
    """A Hand describes how a data set prepares its characters.

    box: the part of the picture's side that the longer side of a character takes.
    by_mass: whether its centre of mass lies in the middle, or else the middle of its extent.
    blurred: whether it is blurred before.
    pen: the width of a stroke, in parts of the longer side of the character.
    """

    box: float
    by_mass: bool
    blurred: bool
    pen: float


HANDS = {
    "mnist": Hand(20 / 28, by_mass=True, blurred=False, pen=0.15),
    "emnist": Hand(24 / 28, by_mass=False, blurred=True, pen=0.11),
    "digits": Hand(1.0, by_mass=False, blurred=False, pen=0.15),
}


def hand_of(data: str) -> str | None:
    """Return the one of HANDS by which a data set of this name was prepared; None: by none of them."""
    return "emnist" if data == "letters" or data.startswith("emnist_") else data if data in HANDS else None


def prepared(ink: Array, hand: Hand, size: int) -> Array | None:
    """Return the character in the ink as the data set has it, (size, size) with values of 0 to 1; None where there is
    none."""
    most = float(ink.max(initial=0.0))
    if most < EMPTY:
        return None
    ink = ink / most
    top, bottom = _extent(ink.max(axis=1))
    left, right = _extent(ink.max(axis=0))
    side = max(bottom - top, right - left)
    if hand.blurred:
        ink = _blurred(ink, side * _BLUR)
    scale = side / (hand.box * size)  # given pixels for one of the result
    middle = ((top + bottom) / 2, (left + right) / 2)
    if hand.by_mass:
        inside = ink[top:bottom, left:right]
        rows, columns = inside.sum(axis=1), inside.sum(axis=0)
        middle = (top + _mean(rows), left + _mean(columns))
    # The middle of MNIST is the centre of pixel 14 of 0 to 27. Characters are moved by whole pixels there.
    aim = size / 2 + (0.5 if hand.by_mass else 0)
    y_at, x_at = (
        first - scale * np.floor((first - centre) / scale + aim + 0.5)
        for first, centre in zip((top, left), middle, strict=True)
    )
    found = _shrinking(len(ink), size, y_at, scale) @ ink @ _shrinking(ink.shape[1], size, x_at, scale).T
    return np.asarray(np.clip(found, 0.0, 1.0))


def _extent(most: Array) -> tuple[int, int]:
    inked = np.flatnonzero(most > FAINT)
    return int(inked[0]), int(inked[-1]) + 1


def _mean(weights: Array) -> float:
    """Return the mean position, in pixels from the edge, of pixels with these weights."""
    return float((np.arange(len(weights)) + 0.5) @ weights / weights.sum())


def _shrinking(given: int, wanted: int, start: float, scale: float) -> Array:
    """Return the matrix (wanted, given) whose row i averages the given pixels from start + i scale to start + (i + 1)
    scale; beyond the edges is paper."""
    lower = start + scale * np.arange(wanted)[:, np.newaxis]
    pixels = np.arange(given)[np.newaxis, :]
    covered = np.minimum(lower + scale, pixels + 1) - np.maximum(lower, pixels)
    return np.asarray(np.maximum(covered, 0.0) / scale)


def _blurred(ink: Array, deviation: float) -> Array:
    """Blur by a Gaussian, an axis after the other."""
    reach = int(np.ceil(3 * deviation))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    weights /= weights.sum()
    for axis in (0, 1):
        ink = np.apply_along_axis(lambda line: np.convolve(np.pad(line, reach), weights, "valid"), axis, ink)
    return ink


def ink_of_picture(grey: Array) -> Array:
    """Return the ink in a picture of handwriting (height, width), uint8, dark on light or light on dark: what differs
    from its edges, as far as it stands out."""
    values = grey.astype(np.float64)
    edges = _edges(values)
    paper = float(np.median(edges))
    noise = 4 * float(np.median(np.abs(edges - paper))) + 10
    sign = 1.0 if abs(values.max() - paper) > abs(values.min() - paper) else -1.0
    differing = np.maximum(sign * (values - paper) - noise, 0.0)
    if not differing.any():
        return differing
    return np.asarray(np.clip(differing / np.quantile(differing[differing > 0], 0.9), 0.0, 1.0))


def on_light_paper(grey: Array) -> bool:
    """Whether the edges of a picture (height, width), uint8, are light, so that what is written is dark."""
    return bool(np.median(_edges(grey)) > 127)


def _edges(values: Array) -> Array:
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
