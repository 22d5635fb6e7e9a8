"""Class weights as numbers, and whom a warning names."""

from __future__ import annotations

import numpy as np

from nettorrent_mpi.engine.class_weights import class_weights, weightless
from nettorrent_mpi.plan.specs import BinaryCrossEntropy, CrossEntropy

LABELS = np.array([0, 2, 2, 2, 3, 3, 0, 2], np.uint8)
BALANCED = CrossEntropy(class_weights="balanced")


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    """sklearn.utils.class_weight.compute_class_weight("balanced", classes=[0, 2, 3], y=LABELS) gives the three."""
    found = class_weights(BALANCED, LABELS, 5)
    assert found is not None
    np.testing.assert_allclose(found, [8 / (3 * 2), 0, 8 / (3 * 4), 8 / (3 * 2), 0], rtol=1e-15)
    np.testing.assert_allclose(found[LABELS].mean(), 1, rtol=1e-15)


def test_others_are_as_they_are_given() -> None:
    found = class_weights(CrossEntropy(class_weights=(1, 0, 2.5)), LABELS, 3)
    assert found is not None
    assert found.tolist() == [1.0, 0.0, 2.5]
    assert found.dtype == np.float64
    assert class_weights(CrossEntropy(0.1), LABELS, 4) is None
    assert class_weights(BinaryCrossEntropy(), np.zeros((3, 2)), 2) is None


def test_classes_without_training_rows_are_told() -> None:
    weights = class_weights(BALANCED, LABELS, 9)
    assert weights is not None
    told = weightless(BALANCED, weights, ("cat", "dog", "cow", "pig", "hen"))
    assert told is not None
    assert "no training rows of class dog, hen, 5, 6, 7 and 1 more: " in told
    assert weightless(BALANCED, weights[[0, 2, 3]], None) is None
    assert weightless(CrossEntropy(class_weights=(0, 1)), np.array([0.0, 1.0]), None) is None, "as asked for"
