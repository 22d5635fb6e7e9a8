"""Markdown and numbers for the reports of the exchanges."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def points(difference: float | None) -> str:
    """Write a difference of two fractions in percentage points, with its sign."""
    return "" if difference is None else f"{100 * difference:+.2f}"


def megabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}"


def paragraph(text: str) -> list[str]:
    """Wrap text to lines of at most 120 characters."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """Return the lines of a table; the first `texts` columns are text, the others are numbers."""
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
