"""Drawings in SVG, for light and dark screens: a confusion matrix, and pictures with captions."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

from nettorrent_mpi.device.arrays import Array

_STYLE = """\
<style>
  svg { background: #ffffff; font: 12px system-ui, sans-serif }
  text { fill: #1f2937 } .title { font-size: 15px; font-weight: 600 } .small { font-size: 11px; fill: #6b7280 }
  .grid { fill: none; stroke: #e5e7eb } .right { fill: #2563eb } .wrong { fill: #dc2626 } .over { fill: #ffffff }
  image { image-rendering: pixelated }
  @media (prefers-color-scheme: dark) {
    svg { background: #111827 } text { fill: #e5e7eb } .small { fill: #9ca3af } .grid { stroke: #374151 }
    .right { fill: #3b82f6 } .wrong { fill: #ef4444 } .over { fill: #ffffff }
  }
</style>"""
_NUMBERED = 40  # classes of a matrix whose cells hold numbers
_TILE, _ACROSS = 96, 8  # pixels of a picture, and pictures in a row


def matrix_drawing(counts: Array, names: Sequence[str], title: str) -> str:
    """Draw a confusion matrix: a row for each true class, a column for what it is taken to be. A cell is as strong as
    its part of the row."""
    n, numbered = len(names), len(names) <= _NUMBERED
    cell = (34 if numbered else max(4, min(16, 1200 // n))) if n else 0
    shown = [name if len(name) <= 20 else name[:19] + "…" for name in names]
    labelled = cell >= 12
    side = 40 + (7 * max(map(len, shown), default=0) if labelled else 0)
    width, height, top = side + n * cell + 20, 60 + side + n * cell, 40 + side
    parts = [f'<text class="title" x="20" y="26">{escape(title)}</text>']
    parts.append(
        f'<text class="small" x="{side}" y="46">in columns: what the rows of each true class are taken to be</text>'
    )
    for i in range(n):
        total = max(int(counts[i].sum()), 1)
        for j in range(n):
            part, count = float(counts[i, j]) / total, int(counts[i, j])
            if not count:
                continue
            x, y, kind = side + j * cell, top + i * cell, "right" if i == j else "wrong"
            opacity = max(part**0.5, 0.08)
            parts.append(
                f'<rect class="{kind}" x="{x}" y="{y}" width="{cell}" height="{cell}" fill-opacity="{opacity:.3f}">'
                f"<title>{escape(names[i])} → {escape(names[j])}: {count:,}</title></rect>"
            )
            if numbered:
                over = ' class="over"' if opacity > 0.6 else ""
                size = 12 if count < 1000 else 10
                parts.append(
                    f'<text{over} x="{x + cell / 2:g}" y="{y + cell / 2 + 4:g}" font-size="{size}" '
                    f'text-anchor="middle" pointer-events="none">{count}</text>'
                )
        if labelled:
            middle = cell * i + cell / 2 + 4
            parts.append(f'<text x="{side - 8}" y="{top + middle:g}" text-anchor="end">{escape(shown[i])}</text>')
            at = side + middle
            parts.append(
                f'<text x="{at:g}" y="{top - 8}" transform="rotate(-90 {at:g} {top - 8})">{escape(shown[i])}</text>'
            )
    for k in range(n + 1) if labelled else (0, n):
        x, y = side + k * cell, top + k * cell
        parts.append(f'<path class="grid" d="M{x} {top}v{n * cell}M{side} {y}h{n * cell}"/>')
    return _svg(width, height, parts)


def pictures_drawing(pictures: Array, captions: Sequence[str], title: str) -> str:
    """Draw pictures (rows, height, width, 1 or 3), uint8, with a caption under each."""
    across = min(_ACROSS, len(pictures))
    longest = max(map(len, captions))
    column, line = max(_TILE, min(7 * longest, 200)) + 16, _TILE + 34
    parts = [f'<text class="title" x="16" y="26">{escape(title)}</text>']
    for number, (pixels, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = 16 + number % across * column, 44 + number // across * line
        data = base64.b64encode(png(pixels)).decode()
        parts.append(f'<image x="{x}" y="{y}" width="{_TILE}" height="{_TILE}" href="data:image/png;base64,{data}"/>')
        short = caption if len(caption) <= 29 else caption[:28] + "…"
        parts.append(f'<text x="{x}" y="{y + _TILE + 15}">{escape(short)}<title>{escape(caption)}</title></text>')
    width = max(32 + across * column, 8 * len(title) + 32)
    return _svg(width, 60 + -(-len(pictures) // across) * line, parts)


def png(pixels: Array) -> bytes:
    """Return the PNG of pixels (height, width, 1 or 3), uint8 (ISO/IEC 15948: 8 bits, no filter, one chunk of data)."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">2I5B", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', _STYLE, *parts, "</svg>", ""])
