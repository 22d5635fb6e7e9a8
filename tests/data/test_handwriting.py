"""Handwriting is prepared as in the data sets."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from nettorrent_mpi.data.dataset import open_dataset
from nettorrent_mpi.data.handwriting import HANDS, hand_of, ink_of_picture, prepared
from nettorrent_mpi.data.rows import private, unlimited
from nettorrent_mpi.data.strokes import GLYPHS, inked

SIZES = {"mnist": 28, "emnist": 28, "digits": 8}


def extent(found: Any, axis: int) -> tuple[int, int]:
    inked = np.flatnonzero(found.max(axis=axis) > 0.3)
    return int(inked[0]), int(inked[-1]) + 1


@pytest.mark.parametrize("name", HANDS)
@pytest.mark.parametrize("glyph", GLYPHS)
def test_place_and_size(name: str, glyph: str) -> None:
    """A character gets its size and place wherever and however large it was written."""
    hand, size = HANDS[name], SIZES[name]
    ink = inked(GLYPHS[glyph], hand.pen, 192)
    found = prepared(ink, hand, size)
    assert found is not None
    assert found.shape == (size, size)
    rows, columns = extent(found, 1), extent(found, 0)
    longer = max(rows[1] - rows[0], columns[1] - columns[0])
    assert longer == pytest.approx(hand.box * size, abs=1.01)
    if hand.by_mass:
        for axis in (0, 1):
            mass = found.sum(axis=axis)
            assert np.arange(size) @ mass / mass.sum() == pytest.approx(size / 2, abs=0.75)
    else:
        for first, last in (rows, columns):
            assert (first + last) / 2 == pytest.approx(size / 2, abs=1.01)
    moved = np.zeros((300, 400))
    moved[90 : 90 + 192, 17 : 17 + 192] = 0.8 * ink
    np.testing.assert_allclose(prepared(moved, hand, size), found, atol=1e-12)
    larger = prepared(ink.repeat(2, axis=0).repeat(2, axis=1), hand, size)
    assert larger is not None
    # Where the centre of mass lies between two pixels, either may be the middle.
    near = [np.roll(larger, shift, (0, 1)) for shift in np.ndindex(2, 2)] if hand.by_mass else [larger]
    near += [np.roll(larger, (-y, -x), (0, 1)) for y, x in np.ndindex(2, 2)] if hand.by_mass else []
    assert min(np.abs(each - found).max() for each in near) < 0.02


def test_paper_is_empty() -> None:
    for shape in ((1, 1), (28, 28), (300, 200)):
        assert prepared(np.zeros(shape), HANDS["mnist"], 28) is None
        assert prepared(ink_of_picture(np.full(shape, 200, np.uint8)), HANDS["mnist"], 28) is None
    noise = np.random.default_rng(0).normal(210, 3, (120, 90)).clip(0, 255).astype(np.uint8)
    assert prepared(ink_of_picture(noise), HANDS["mnist"], 28) is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (2, 2)])
@pytest.mark.parametrize("name", HANDS)
def test_any_ink_has_a_picture(name: str, shape: tuple[int, int]) -> None:
    found = prepared(np.ones(shape), HANDS[name], 28)
    assert found is not None
    assert np.isfinite(found).all()
    assert found.max() > 0


def test_pictures_dark_on_light_and_light_on_dark() -> None:
    ink = inked(GLYPHS["R"], 0.11, 128)
    noise = np.random.default_rng(0).normal(0, 2, ink.shape)
    wanted = prepared(ink, HANDS["emnist"], 28)
    assert wanted is not None
    for paper, pen in ((230, 40), (20, 250), (120, 60)):
        picture = (paper + (pen - paper) * ink + noise).clip(0, 255).astype(np.uint8)
        found = prepared(ink_of_picture(picture), HANDS["emnist"], 28)
        assert found is not None
        assert np.abs(found - wanted).mean() < 0.02


@pytest.mark.skipif("NETTORRENT_DATA" not in os.environ, reason="NETTORRENT_DATA names no folder with mnist/")
def test_pictures_of_mnist_stay_as_they_are() -> None:
    """Enlarged ten times they become the pictures that they were: size and place are MNIST's."""
    test = open_dataset("mnist", os.environ["NETTORRENT_DATA"]).test
    assert test is not None
    raw = np.empty((300, 28 * 28), np.uint8)
    test.open_rows(private, unlimited)(np.arange(300), raw)
    off = []
    for pixels in raw.reshape(-1, 28, 28) / 255:
        found = prepared(pixels.repeat(10, axis=0).repeat(10, axis=1), HANDS["mnist"], 28)
        assert found is not None
        off.append(np.abs(found - pixels).mean())
    assert np.mean(off) < 0.002
    assert np.median(off) < 1e-9


def test_data_sets_and_their_hands() -> None:
    asked = ("mnist", "letters", "emnist_balanced", "digits", "fashion_mnist", "hdf5")
    assert [hand_of(data) for data in asked] == ["mnist", "emnist", "emnist", "digits", None, None]
