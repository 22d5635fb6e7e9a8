"""Moves are the transfers that bring arrays divided over ranks in one way into another division.

Changing the layout, resuming on other ranks, surviving a dead rank and writing whole arrays into a file are this one
operation. Blocks are boxes in the coordinates of the whole array: no rank needs to know how the others were made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

from nettorrent_mpi.plan.blocks import Span, overlap
from nettorrent_mpi.plan.errors import LostStateError

Box: TypeAlias = tuple[Span, ...]  # a part of an array: one span for each axis; () is the whole of a single number


class Holding(NamedTuple):
    """A block that a rank holds, or is to hold: the array's name and the box."""

    name: str
    box: Box


Placement: TypeAlias = Sequence[Sequence[Holding]]  # what each rank holds


class Move(NamedTuple):
    """Rank `source` sends rank `target` the part `box` of an array, out of its block `held`, for the block `wanted`."""

    source: int
    target: int
    name: str
    box: Box
    held: Box
    wanted: Box


def whole(shape: Sequence[int]) -> Box:
    """Return the box of a whole array."""
    return tuple(Span(0, length) for length in shape)


def volume(box: Box) -> int:
    """Return the number of elements in a box."""
    return prod(span.size for span in box)


def within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Return the position of `inner` in an array that holds `outer`."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer, strict=True))


def boxes_of_range(box: Box, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Split elements start..stop-1 of a flat block (C order) into boxes of contiguous elements.

    Yields pairs (first element, box), at most two boxes for each axis, and one.
    """
    if start >= stop:
        return
    if not box:
        yield start, box
        return
    first, rest = box[0], box[1:]
    inner = volume(rest)
    number = start // inner
    low, high = -(-start // inner), stop // inner  # the indices of the first axis whose elements are all wanted
    if number == (stop - 1) // inner and stop - start < inner:  # a part of the elements of one index
        at = Span(first.start + number, first.start + number + 1)
        yield from (
            (number * inner + begin, (at, *part))
            for begin, part in boxes_of_range(rest, start - number * inner, stop - number * inner)
        )
        return
    if start < low * inner:
        yield from boxes_of_range(box, start, low * inner)
    if low < high:
        yield low * inner, (Span(first.start + low, first.start + high), *rest)
    if high * inner < stop:
        yield from boxes_of_range(box, high * inner, stop)


def moves(old: Placement, new: Placement, alive: Collection[int] | None = None) -> list[Move]:
    """Return what each rank sends to which, so that all hold what `new` says: every element once for each block that
    wants it.

    A rank takes from itself what it holds; where several others hold the same block, the receivers are spread over
    them. Only ranks in `alive` (default: all) send. The list is sorted by name, target and box, so all ranks that
    compute it go through it in the same order. Raises LostStateError if no living rank holds a wanted part.
    """
    holders: dict[str, dict[Box, list[int]]] = {}
    for rank, holdings in enumerate(old):
        if alive is None or rank in alive:
            for name, box in holdings:
                holders.setdefault(name, {}).setdefault(box, []).append(rank)
    found: list[Move] = []
    for target, wanted in enumerate(new):
        for name, box in wanted:
            missing = [box] if volume(box) else []
            there = holders.get(name, {})
            for held, ranks in sorted(there.items(), key=lambda entry: (target not in entry[1], entry[0])):
                source = target if target in ranks else ranks[target % len(ranks)]
                rest: list[Box] = []
                for part in missing:
                    common = tuple(overlap(a, b) for a, b in zip(part, held, strict=True))
                    if volume(common):
                        found.append(Move(source, target, name, common, held, box))
                        rest += _without(part, common)
                    else:
                        rest.append(part)
                missing = rest
                if not missing:
                    break
            if missing:
                raise LostStateError(name, [list(span) for span in missing[0]])
    return sorted(found, key=lambda move: (move.name, move.target, move.box))


def _without(box: Box, part: Box) -> Iterator[Box]:
    """Return what remains of a box without one of its parts, as boxes."""
    for axis, (outer, inner) in enumerate(zip(box, part, strict=True)):
        before, after = Span(outer.start, inner.start), Span(inner.stop, outer.stop)
        yield from ((*part[:axis], piece, *box[axis + 1 :]) for piece in (before, after) if piece.size)
