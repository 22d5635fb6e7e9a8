"""Moves between placements: every element that is wanted comes once, from someone who holds it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nettorrent_mpi.plan.blocks import Span, span
from nettorrent_mpi.plan.errors import LostStateError
from nettorrent_mpi.plan.moves import Box, Holding, boxes_of_range, moves, volume, whole, within


@given(st.data(), st.lists(st.integers(1, 5), max_size=4))
def test_ranges_are_boxes_side_by_side(data: st.DataObject, shape: list[int]) -> None:
    numbers = np.arange(int(np.prod(shape, dtype=int)))
    array, box = numbers.reshape(shape), tuple(Span(7, 7 + length) for length in shape)
    start = data.draw(st.integers(0, numbers.size))
    stop = data.draw(st.integers(start, numbers.size))
    found = list(boxes_of_range(box, start, stop))
    at = start
    for begin, part in found:
        assert begin == at
        np.testing.assert_array_equal(array[within(part, box)].reshape(-1), numbers[begin : begin + volume(part)])
        at += volume(part)
    assert at == max(start, stop)
    assert len(found) <= 2 * len(shape) + 1


def parts(data: st.DataObject, shape: tuple[int, ...], ranks: int) -> list[list[Holding]]:
    """A random way to hold an array: rows, columns, the ranges of a flat array, or whole; on some ranks alike."""
    how = data.draw(st.sampled_from(["axis 0", "axis 1", "flat", "whole"]))
    count = data.draw(st.integers(1, ranks))
    placement: list[list[Holding]] = []
    for rank in range(ranks):
        i, box = rank % count, whole(shape)
        boxes: list[Box] = [box]
        if how.startswith("axis"):
            axis = int(how[-1])
            boxes = [(*box[:axis], span(shape[axis], count, i), *box[axis + 1 :])]
        elif how == "flat":
            boxes = [part for _, part in boxes_of_range(box, *span(volume(box), count, i))]
        placement.append([Holding("w", part) for part in boxes])
    return placement


@given(st.data(), st.tuples(st.integers(1, 6), st.integers(1, 6)), st.integers(1, 6))
def test_everything_that_is_wanted_comes_once(data: st.DataObject, shape: tuple[int, int], ranks: int) -> None:
    old, new = parts(data, shape, ranks), parts(data, shape, ranks)
    array = np.arange(np.prod(shape)).reshape(shape)
    into = [{held: np.full([s.size for s in held.box], -1) for held in wanted} for wanted in new]
    seen: Counter[tuple[int, Holding]] = Counter()
    for move in moves(old, new):
        assert Holding("w", move.held) in old[move.source]
        target = into[move.target][Holding("w", move.wanted)]
        place = within(move.box, move.wanted)
        assert (target[place] == -1).all()
        target[place] = array[within(move.box, whole(shape))]
        seen[move.target, Holding("w", move.wanted)] += volume(move.box)
        mine = [held.box for held in old[move.target]]
        if move.source != move.target:  # nobody is sent what it holds
            for box in mine:
                assert not all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in zip(box, move.box, strict=True))
    for rank, wanted in enumerate(into):
        for held, found in wanted.items():
            np.testing.assert_array_equal(found, array[within(held.box, whole(shape))])
            assert seen[rank, held] == volume(held.box)


def test_those_who_want_a_block_are_spread_over_its_holders() -> None:
    one = [Holding("w", whole((3,)))]
    assert [move.source for move in moves([one, one, [], []], [[], [], one, one])] == [0, 1]


def test_the_dead_give_nothing_and_what_only_they_held_is_named() -> None:
    halves = [[Holding("w", (span(5, 2, i),))] for i in (0, 1, 1)]
    want = [[Holding("w", whole((5,)))], [], []]
    assert [move.source for move in moves(halves, want, alive={0, 2})] == [0, 2]
    with pytest.raises(LostStateError, match=r"no living rank holds part \[\[3, 5\]\] of w"):
        moves(halves, want, alive={0})
    with pytest.raises(LostStateError, match="of v"):
        moves(halves, [[Holding("v", whole((1,)))], [], []])
