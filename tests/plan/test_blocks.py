from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nettorrent_mpi.plan.blocks import Grid, Piece, Span, micro_batch, overlap, owner, redistribute, span

totals, parts = st.integers(0, 200), st.integers(1, 40)
grids = st.builds(Grid, st.integers(1, 6), st.integers(1, 6))


@given(totals, parts)
def test_spans_cover_everything_once_and_evenly(total: int, count: int) -> None:
    spans = [span(total, count, i) for i in range(count)]
    assert [x for s in spans for x in range(s.start, s.stop)] == list(range(total))
    assert max(s.size for s in spans) - min(s.size for s in spans) <= 1
    assert [s.size for s in spans] == sorted((s.size for s in spans), reverse=True)


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_a_smaller_mini_batch_has_fewer_micro_batches_of_the_usual_size(
    rows: int, count: int, data: st.DataObject
) -> None:
    count = min(count, rows)
    size = data.draw(st.integers(1, rows))
    usual, cuts = ([micro_batch(n, rows, count, m) for m in range(count)] for n in (rows, size))
    assert usual == [span(rows, count, m) for m in range(count)]
    assert [x for cut in cuts for x in range(*cut)] == list(range(size))
    smallest, filled = usual[-1].size, [cut.size for cut in cuts if cut.size]
    assert max(filled) <= usual[0].size
    assert len(filled) == 1 or min(filled) >= (smallest + 1) // 2


@given(totals.filter(bool), parts)
def test_owner_is_the_inverse_of_span(total: int, count: int) -> None:
    for position in range(total):
        held = span(total, count, owner(total, count, position))
        assert held.start <= position < held.stop


def test_owner_of_nothing() -> None:
    with pytest.raises(AssertionError, match="outside"):
        owner(3, 2, 3)


@given(*[st.builds(Span, st.integers(0, 30), st.integers(0, 30))] * 2)
def test_overlap_holds_what_both_hold(a: Span, b: Span) -> None:
    both = overlap(a, b)
    assert set(range(*both)) == set(range(*a)) & set(range(*b))
    assert both == overlap(b, a)
    assert both.size or both == Span(0, 0)


@settings(max_examples=1500, deadline=None)
@given(st.integers(0, 17), st.integers(0, 13), grids, grids)
def test_every_element_moves_once_to_each_place_that_wants_it(
    n_rows: int, n_cols: int, source: Grid, target: Grid
) -> None:
    pieces = redistribute(n_rows, n_cols, source, target)
    moved: Counter[tuple[int, int, int]] = Counter()
    for piece in pieces:
        row, col = divmod(piece.source, source.cols)
        assert piece.rows.size
        assert piece.cols.size
        assert overlap(piece.rows, span(n_rows, source.rows, row)) == piece.rows, "the source holds it"
        assert overlap(piece.cols, span(n_cols, source.cols, col)) == piece.cols
        moved.update((piece.target, r, c) for r in range(*piece.rows) for c in range(*piece.cols))
    wanted = Counter(
        (row * target.cols + col, r, c)
        for row in range(target.rows)
        for col in range(target.cols)
        for r in range(*span(n_rows, target.rows, row))
        for c in range(n_cols)
    )
    assert moved == wanted
    assert [piece[:2] for piece in pieces] == sorted({piece[:2] for piece in pieces}), "in order, one for each pair"


def test_an_example() -> None:
    # 5 rows over 2 become 5 rows over 1; 3 columns over 1 are wanted whole by 2 cols
    assert redistribute(5, 3, Grid(2, 1), Grid(1, 2)) == [
        Piece(0, 0, Span(0, 3), Span(0, 3)),
        Piece(0, 1, Span(0, 3), Span(0, 3)),
        Piece(1, 0, Span(3, 5), Span(0, 3)),
        Piece(1, 1, Span(3, 5), Span(0, 3)),
    ]


def test_large_grids_are_quick() -> None:
    assert len(redistribute(10**6, 1, Grid(1000, 1), Grid(999, 1))) == 1998
