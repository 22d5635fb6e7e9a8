"""Files may hold anything: their values are taken as what they should be, or left out."""

from __future__ import annotations

from typing import Any, TypeGuard

from nettorrent_mpi.plan.errors import readable

LARGEST = 1e100  # figures beyond it are damage


def number(value: Any) -> float | None:
    """Return a value of a file as a finite number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        return None
    return float(value)


def text(value: Any) -> str:
    """Return a value of a file as a text that can be shown; empty if it is none."""
    return one_line(value) if isinstance(value, str) else ""


def one_line(told: str) -> str:
    """Write a text of a file, or its name, so that it can be shown in one line."""
    return readable(told).replace("\n", "\\n")


def items(value: Any) -> list[dict[str, Any]]:
    """Return a value of a file as a list of objects; empty if it is none."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def is_count(value: Any, least: int = 1) -> TypeGuard[int]:
    """Whether a value of a file is a plausible count or number of ranks, steps or rows."""
    return type(value) is int and least <= value < 1e15
