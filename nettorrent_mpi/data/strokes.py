"""Letters and digits as strokes of a pen: plain forms, by which a network is asked what it reads without any data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import cos, pi, sin
from typing import TypeAlias

import numpy as np

from nettorrent_mpi.device.arrays import Array

Stroke: TypeAlias = tuple[tuple[float, float], ...]
"""Points (x, y) that are joined by straight lines: x from left to right, y from top to bottom, both from 0 to 1."""


def _arc(x: float, y: float, wide: float, high: float, first: float, last: float) -> Stroke:
    """Return an arc of the ellipse around (x, y) between two angles in degrees: 0 is right, 90 is the bottom."""
    angles = [first + (last - first) * i / 16 for i in range(17)]
    return tuple((x + wide * cos(angle * pi / 180), y + high * sin(angle * pi / 180)) for angle in angles)


_BAR = ((0.5, 0.0), (0.5, 1.0))
_STEM = ((0.2, 0.0), (0.2, 1.0))
GLYPHS: dict[str, tuple[Stroke, ...]] = {
    "0": (_arc(0.5, 0.5, 0.3, 0.5, -90, 270),),
    "1": (_BAR,),
    "2": ((*_arc(0.5, 0.28, 0.3, 0.28, 180, 390), (0.2, 1.0), (0.82, 1.0)),),
    "3": ((*_arc(0.47, 0.25, 0.28, 0.25, -150, 90), *_arc(0.47, 0.73, 0.32, 0.27, -90, 150)),),
    "4": (((0.52, 0.0), (0.18, 0.6), (0.85, 0.6)), ((0.66, 0.3), (0.62, 1.0))),
    "5": (((0.75, 0.0), (0.3, 0.0), (0.26, 0.42), *_arc(0.46, 0.69, 0.31, 0.31, -110, 150)),),
    "6": (((0.66, 0.0), (0.36, 0.35), *_arc(0.5, 0.72, 0.27, 0.28, 180, -180)),),
    "7": (((0.2, 0.0), (0.8, 0.0), (0.42, 1.0)),),
    "8": ((*_arc(0.5, 0.24, 0.24, 0.24, 90, 450), *_arc(0.5, 0.74, 0.29, 0.26, -90, 270)),),
    "9": ((*_arc(0.48, 0.28, 0.27, 0.28, 0, -360), (0.75, 0.28), (0.68, 1.0)),),
    "A": (((0.1, 1.0), (0.5, 0.0), (0.9, 1.0)), ((0.26, 0.62), (0.74, 0.62))),
    "B": (_STEM, (*_arc(0.2, 0.25, 0.5, 0.25, -90, 90), *_arc(0.2, 0.75, 0.6, 0.25, -90, 90))),
    "C": (_arc(0.55, 0.5, 0.42, 0.5, -50, -310),),
    "D": (_STEM, _arc(0.2, 0.5, 0.65, 0.5, -90, 90)),
    "E": (((0.8, 0.0), (0.2, 0.0), (0.2, 1.0), (0.8, 1.0)), ((0.2, 0.5), (0.7, 0.5))),
    "F": (((0.8, 0.0), (0.2, 0.0), (0.2, 1.0)), ((0.2, 0.48), (0.68, 0.48))),
    "G": ((*_arc(0.52, 0.5, 0.42, 0.5, -50, -340), (0.92, 0.55), (0.55, 0.55)),),
    "H": (((0.15, 0.0), (0.15, 1.0)), ((0.85, 0.0), (0.85, 1.0)), ((0.15, 0.5), (0.85, 0.5))),
    "I": (_BAR, ((0.25, 0.0), (0.75, 0.0)), ((0.25, 1.0), (0.75, 1.0))),
    "J": (((0.65, 0.0), (0.65, 0.7), *_arc(0.4, 0.7, 0.25, 0.3, 0, 170)), ((0.35, 0.0), (0.9, 0.0))),
    "K": (_STEM, ((0.8, 0.0), (0.2, 0.55), (0.85, 1.0))),
    "L": (((0.2, 0.0), (0.2, 1.0), (0.8, 1.0)),),
    "M": (((0.05, 1.0), (0.12, 0.0), (0.5, 0.7), (0.88, 0.0), (0.95, 1.0)),),
    "N": (((0.15, 1.0), (0.15, 0.0), (0.85, 1.0), (0.85, 0.0)),),
    "O": (_arc(0.5, 0.5, 0.45, 0.5, -90, 270),),
    "P": (_STEM, _arc(0.2, 0.28, 0.58, 0.28, -90, 90)),
    "Q": (_arc(0.5, 0.47, 0.45, 0.47, -90, 270), ((0.58, 0.68), (0.95, 1.0))),
    "R": (_STEM, (*_arc(0.2, 0.26, 0.56, 0.26, -90, 90), (0.8, 1.0))),
    "S": ((*_arc(0.5, 0.25, 0.32, 0.25, -30, -270), *_arc(0.5, 0.75, 0.34, 0.25, -90, 150)),),
    "T": (_BAR, ((0.1, 0.0), (0.9, 0.0))),
    "U": (((0.15, 0.0), (0.15, 0.6), *_arc(0.5, 0.6, 0.35, 0.4, 180, 0), (0.85, 0.0)),),
    "V": (((0.12, 0.0), (0.5, 1.0), (0.88, 0.0)),),
    "W": (((0.02, 0.0), (0.25, 1.0), (0.5, 0.3), (0.75, 1.0), (0.98, 0.0)),),
    "X": (((0.12, 0.0), (0.88, 1.0)), ((0.88, 0.0), (0.12, 1.0))),
    "Y": (((0.12, 0.0), (0.5, 0.48)), ((0.88, 0.0), (0.5, 0.48), (0.5, 1.0))),
    "Z": (((0.15, 0.0), (0.85, 0.0), (0.15, 1.0), (0.85, 1.0)),),
}


def inked(strokes: Sequence[Stroke], pen: float, size: int = 96) -> Array:
    """Return the ink (size, size) of strokes by a round pen of this width, in the middle of a sheet on which they take
    three quarters of the side."""
    y, x = (np.mgrid[:size, :size] + 0.5) / (0.75 * size) - 0.125 / 0.75
    nearest = np.full((size, size), np.inf)
    for stroke in strokes:
        for (x0, y0), (x1, y1) in pairwise(stroke):
            length = max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-12)
            along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length, 0, 1)
            nearest = np.minimum(nearest, np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)))
    return np.clip((pen / 2 - nearest) * 0.75 * size + 0.5, 0, 1)
