"""Flips and crops: the right pixels, the right frequencies, the same on whatever rank."""

from __future__ import annotations

import numpy as np
import pytest

from nettorrent_mpi.data.augment import PADDING, Augment
from nettorrent_mpi.plan.errors import ConfigError
from nettorrent_mpi.plan.seeds import key

ROWS = 3000


def apply(names: list[str], image: np.ndarray, rows: int = ROWS, seed: int = 1) -> np.ndarray:
    raw = np.repeat(image[None], rows, axis=0)
    out = np.full_like(raw, 99)
    flat = raw.reshape(rows, -1).view(np.uint8), out.reshape(rows, -1).view(np.uint8)
    Augment(names, image.shape).apply(np.arange(rows), key(seed, "augment", 0), *flat)
    return out


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_result_is_a_flip_and_a_crop_and_all_occur(dtype: type, channels: int) -> None:
    image = np.random.default_rng(0).integers(1, 255, (12, 10, channels)).astype(dtype)
    possible = {}
    for flip in (False, True):
        padded = np.pad(image[:, ::-1] if flip else image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
        for top in range(2 * PADDING + 1):
            for left in range(2 * PADDING + 1):
                possible[padded[top : top + 12, left : left + 10].tobytes()] = (flip, top, left)
    seen = [possible[result.tobytes()] for result in apply(["flip", "crop"], image)]
    flips = np.mean([flip for flip, _, _ in seen])
    assert abs(flips - 0.5) < 0.05
    for place in (1, 2):
        counts = np.bincount([choice[place] for choice in seen], minlength=9)  # type: ignore[call-overload]
        assert counts.min() > 0.8 * ROWS / 9
        assert counts.max() < 1.2 * ROWS / 9
    assert len(set(seen)) == 162


def test_each_alone() -> None:
    image = np.random.default_rng(0).integers(1, 255, (6, 6, 3), np.uint8)
    flipped = {result.tobytes() for result in apply(["flip"], image)}
    assert flipped == {image.tobytes(), image[:, ::-1].tobytes()}
    assert len({result.tobytes() for result in apply(["crop"], image)}) == 81


def test_choices_follow_key_and_row() -> None:
    image = np.random.default_rng(0).integers(1, 255, (32, 32, 3), np.uint8)
    all_rows = apply(["flip", "crop"], image, 50)
    assert not np.array_equal(all_rows, apply(["flip", "crop"], image, 50, seed=2))
    rows = np.array([49, 3, 3, 17])
    raw = np.repeat(image[None], 4, axis=0).reshape(4, -1)
    out = np.empty_like(raw)
    Augment(["crop", "flip"], image.shape).apply(rows, key(1, "augment", 0), raw, out)
    np.testing.assert_array_equal(out, all_rows[rows].reshape(4, -1))


def test_images_smaller_than_the_padding() -> None:
    image = np.full((3, 2, 1), 7, np.uint8)
    results = apply(["crop"], image, 500)
    assert set(np.unique(results)) == {0, 7}
    assert any((result == image).all() for result in results)


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="needs images"):
        Augment(["flip"], (64,))
