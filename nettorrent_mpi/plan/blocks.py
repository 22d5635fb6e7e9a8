"""Blocks: who owns which part of a dimension, and which pieces move when an array changes from one division to
another."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """The half-open range [start, stop) of a dimension."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def span(total: int, parts: int, index: int) -> Span:
    """Return the part of `total` items that part `index` of `parts` owns.

    Parts are contiguous and differ in size by at most one, the larger ones first. Nothing has to divide evenly; with
    fewer items than parts the last parts are empty.
    """
    each, more = divmod(total, parts)
    start = index * each + min(index, more)
    return Span(start, start + each + (index < more))


def micro_batch(size: int, batch_size: int, micro_batches: int, index: int) -> Span:
    """Return the rows that micro-batch `index` of `micro_batches` has of a mini-batch of `size` rows.

    A mini-batch of `batch_size` rows is divided by `span`; a smaller one, the last of an epoch, into fewer
    micro-batches of about the usual size, the others being empty: batch statistics of a few rows are worth little.
    """
    cuts = min(micro_batches, -(-size // max(batch_size // micro_batches, 1)))
    return span(size, cuts, index) if index < cuts else Span(size, size)


def overlap(a: Span, b: Span) -> Span:
    """Return the intersection of two spans; Span(0, 0) if it is empty."""
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    return Span(start, stop) if start < stop else Span(0, 0)


def owner(total: int, parts: int, position: int) -> int:
    """Return the part whose span holds `position`: the inverse of `span`."""
    assert 0 <= position < total, f"position {position} lies outside 0..{total - 1}"
    each, more = divmod(total, parts)
    longer = more * (each + 1)
    return position // (each + 1) if position < longer else more + (position - longer) // each


class Grid(NamedTuple):
    """A team's grid: rows divide the rows of an array, cols its columns. Block (row, col) has the index row * cols +
    col."""

    rows: int
    cols: int


class Piece(NamedTuple):
    """A rectangle that block `source` of one grid holds and block `target` of another wants, in global coordinates."""

    source: int
    target: int
    rows: Span
    cols: Span


def redistribute(n_rows: int, n_cols: int, source: Grid, target: Grid) -> list[Piece]:
    """Return the pieces that move when an array of n_rows x n_cols changes from one grid to another.

    Source block (row, col) holds span(n_rows, rows, row) x span(n_cols, cols, col). Target block (row, col) wants all
    columns of the rows span(n_rows, rows, row) of its own grid (a stage's input: every col of a team reads all
    features). Every element reaches each block that wants it exactly once.

    The pieces are sorted by (source, target); there is at most one for each pair, and none is empty. Both sides of a
    link compute the same list, so each knows what the other sends.

    The way back is exactly the transpose: the same pieces with source and target exchanged. Where several targets
    received the same element, each returns a partial gradient and the source adds them up.
    """
    row_pairs = _overlaps(n_rows, source.rows, target.rows)
    held = [(col, span(n_cols, source.cols, col)) for col in range(source.cols)]
    return sorted(
        Piece(source_row * source.cols + source_col, target_row * target.cols + target_col, rows, cols)
        for source_row, target_row, rows in row_pairs
        for source_col, cols in held
        if cols.size
        for target_col in range(target.cols)
    )


def _overlaps(total: int, source_parts: int, target_parts: int) -> list[tuple[int, int, Span]]:
    """Return (source part, target part, intersection) for all parts that intersect, in order along the dimension."""
    pairs: list[tuple[int, int, Span]] = []
    position = 0
    while position < total:
        i, j = owner(total, source_parts, position), owner(total, target_parts, position)
        stop = min(span(total, source_parts, i).stop, span(total, target_parts, j).stop)
        pairs.append((i, j, Span(position, stop)))
        position = stop
    return pairs
