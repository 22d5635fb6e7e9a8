"""Classes may weigh in the loss: these functions give their weights as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.specs import CrossEntropy, Spec


def class_weights(spec: Spec, labels: Array, outputs: int) -> Array | None:
    """Return the weight (float64) of each of the `outputs` classes that the loss `spec` asks for; None if it asks for
    none. `labels` are those of the training rows, from 0 to outputs - 1: every rank that has them gets the same.

    Balanced weights are rows / (classes * rows of the class), where only classes that have rows count, as in
    scikit-learn: every such class weighs the same in total, and a row weighs 1 on average. Other classes weigh 0.
    """
    if not isinstance(spec, CrossEntropy) or spec.class_weights is None:
        return None
    if spec.class_weights != "balanced":
        return np.array(spec.class_weights, np.float64)
    counts = np.bincount(labels, minlength=outputs)
    weights: Array = np.zeros(outputs)
    there = counts > 0
    weights[there] = len(labels) / (np.count_nonzero(there) * counts[there])
    return weights


def weightless(spec: Spec, weights: Array, names: Sequence[str] | None) -> str | None:
    """Return a warning of classes that balanced weights leave out, as they have no training rows."""
    out = np.flatnonzero(weights == 0)
    if not out.size or not isinstance(spec, CrossEntropy) or spec.class_weights != "balanced":
        return None
    few = ", ".join(names[c] if names and c < len(names) else str(c) for c in out[:5].tolist())
    more = f" and {out.size - 5} more" if out.size > 5 else ""
    return (
        f"model.loss.cross_entropy.class_weights: balanced, but there are no training rows of class {few}{more}: rows "
        "of it in evaluations do not count in the loss"
    )
