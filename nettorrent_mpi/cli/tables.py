"""Tables and wrapped lines of at most WIDTH columns."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 120
MOST_LINES = 40  # columns of a table: more is folded or omitted


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Format a table: columns named in `left` are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    sides = [str.ljust if name in left else str.rjust for name in header]
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )


def shortened(name: str) -> str:
    """Cut a long name."""
    return name if len(name) <= 28 else name[:25] + "..."


def wrapped(label: str, text: str) -> list[str]:
    """Break `text` at spaces into lines; the first begins with the label."""
    lines = [label]
    for word in text.split(" "):
        if len(lines[-1]) + 1 + len(word) > WIDTH and lines[-1].strip():
            lines.append(" " * len(label))
        lines[-1] += word if len(lines[-1]) == len(label) else " " + word
    return lines
