"""Pictures as SVG: curves, bars, time lines and the map of a layout. Every text is escaped; colours are classes of
report.css, so that they follow the reader's light or dark theme."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 250  # of a chart
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 30  # its margins
MOST_POINTS = 800  # of a curve; of more, the lowest and the highest of each part are drawn
LOG = 30.0  # times the smallest value from which an axis is logarithmic


class Curve(NamedTuple):
    """A Curve has a name, a class for its colour and points (x, y)."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


class Bar(NamedTuple):
    """A Bar is a part of a row: where it begins and ends, its class, what it says, and its label if there is room."""

    begin: float
    end: float
    colour: str
    tip: str
    label: str = ""


def chart(title: str, curves: Sequence[Curve], *, unit: str = "", logarithmic: bool = False, x_name: str = "") -> str:
    """Draw curves over a common axis; empty if there is no point. A unit "%" is for fractions."""
    curves = [curve._replace(points=thinned(curve.points)) for curve in curves if curve.points]
    if not curves:
        return ""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    x_axis, low, high = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT), min(ys), max(ys)
    logarithmic = logarithmic and low > 1e-200 and high < 1e200 and high / low > LOG
    if unit == "%":
        low, high = min(low, 1.0), max(high, 0.0)
    y_axis = _Axis(low, high, HEIGHT - BOTTOM, TOP, logarithmic=logarithmic, room=0.05)
    parts = []
    for y in y_axis.ticks(5):
        at = y_axis.at(y)
        shown = f"{100 * y:.4g}" if unit == "%" else short(y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{at + 4:.1f}">{shown}</text>')
    parts += [
        f'<text class="tick middle" x="{x_axis.at(x):.1f}" y="{HEIGHT - 10}">{short(x)}</text>' for x in x_axis.ticks(6)
    ]
    for curve in curves:
        places = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in curve.points)
        if len(curve.points) == 1:
            x, y = curve.points[0]
            parts.append(f'<circle class="dot {curve.colour}" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3"/>')
        parts.append(f'<polyline class="curve {curve.colour}" points="{places}"/>')
    told = [
        [curve.name, [[round(x_axis.at(x), 1), short(x), f"{100 * y:.2f} %" if unit == "%" else f"{y:.4g}"]
                      for x, y in curve.points]]
        for curve in curves
    ]  # fmt: skip
    keys = "".join(f'<span class="key {curve.colour}">{escape(curve.name)}</span>' for curve in curves)
    scale = " (logarithmic)" if logarithmic else ""
    axis = f' data-x="{escape(x_name)}"'
    return (
        f'<figure class="card"><figcaption>{escape(title)}{f" <i>{escape(unit)}</i>" if unit else ""}<i>{scale}</i>'
        f'<span class="keys">{keys if len(curves) > 1 else ""}</span></figcaption>'
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"{axis} '
        f'data-curves="{escape(json.dumps(told))}">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg></figure>'
    )


def rows(names: Sequence[str], bars: Sequence[Sequence[Bar]], *, unit: str, marked: int | None = None) -> str:
    """Draw one row of bars for each name, over a common axis from 0 in this unit. The row `marked` stands out."""
    width, left, lane = 1160, 20 + 6.6 * max(map(len, names), default=0), 24
    left = min(left, 300)
    axis = _Axis(0.0, max((bar.end for row in bars for bar in row), default=1.0), left, width - 14)
    height = lane * len(names) + 28
    parts = []
    for x in axis.ticks(8):
        at = f"{axis.at(x):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="{height - 24}"/>')
        parts.append(f'<text class="tick middle" x="{at}" y="{height - 8}">{short(x)}</text>')
    for number, (name, row) in enumerate(zip(names, bars, strict=True)):
        y, mark = lane * number, " marked" if number == marked else ""
        parts.append(f'<text class="name end{mark}" x="{left - 8:.1f}" y="{y + 16}">{escape(name)}</text>')
        for bar in row:
            x, length = axis.at(bar.begin), max(axis.at(bar.end) - axis.at(bar.begin), 0.6)
            parts.append(
                f'<rect class="{bar.colour}" x="{x:.1f}" y="{y + 3}" width="{length:.1f}" height="{lane - 6}">'
                f"<title>{escape(bar.tip)}</title></rect>"
            )
            if bar.label and length > 7 * len(bar.label) + 2:
                parts.append(
                    f'<text class="label middle" x="{x + length / 2:.1f}" y="{y + 16}">{escape(bar.label)}</text>'
                )
    parts.append(f'<text class="tick end" x="{left - 8:.1f}" y="{height - 8}">{escape(unit)}</text>')
    return f'<svg class="rows" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


class _Axis:
    """An axis from `low` to `high`, on the screen from `start` to `end`."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, logarithmic: bool = False, room: float = 0
    ):
        self._log = logarithmic
        low, high = (math.log10(low), math.log10(high)) if logarithmic else (low, high)
        if high - low <= max(1e-12 * abs(low), 1e-12 * abs(high), 1e-290):
            wide = abs(low) / 2 or 0.5
            low, high = low - wide * (room > 0), high + wide
        more = room * (high - low)
        self._low, self._high, self._start, self._end = low - more, high + more, start, end

    def at(self, value: float) -> float:
        """Return where a value lies on the screen."""
        value = math.log10(value) if self._log else value
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self, most: int) -> list[float]:
        """Return about `most` round values."""
        if self._log:
            powers = range(math.floor(self._low), math.ceil(self._high) + 1)
            steps = (1,) if len(powers) > 4 else (1, 2, 5)
            found = [m * 10.0**p for p in powers for m in steps]
            found = [value for value in found if self._low <= math.log10(value) <= self._high]
            return found[:: max(1, -(-len(found) // most))]
        raw = (self._high - self._low) / most
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
        first = math.ceil(self._low / step)
        return [n * step for n in range(first, first + most + 2) if n * step <= self._high * (1 + 1e-9)]


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Return at most about `most` of the points: of more, the lowest and the highest of each part, and the last."""
    if len(points) <= most:
        return list(points)
    size, found = len(points) / (most // 2), list[tuple[float, float]]()
    for part in range(most // 2):
        own = points[round(part * size) : round((part + 1) * size)]
        found += sorted({min(own, key=lambda p: p[1]), max(own, key=lambda p: p[1])})
    return found if found[-1] == points[-1] else [*found, points[-1]]


def short(value: float) -> str:
    """Write a number in a few characters: 12k, 0.05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"
