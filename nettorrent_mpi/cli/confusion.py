"""`nettorrent evaluate RUN --confusion` tells which classes a network takes for which, and shows its worst mistakes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nettorrent_mpi.cli.drawings import matrix_drawing, pictures_drawing
from nettorrent_mpi.cli.run_folder import EVALUATION
from nettorrent_mpi.cli.tables import aligned, shortened
from nettorrent_mpi.data.rows import BYTE, Split
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.answers import Answers
from nettorrent_mpi.engine.run_files import write_whole, written
from nettorrent_mpi.plan.errors import readable

SHOWN = 26  # classes of a matrix that a terminal shows
PAIRS, WORST, DRAWN = 10, 5, 48  # what is listed, and the pictures that are drawn


class Figures(NamedTuple):
    """The figures of one class; None where there is nothing to divide by."""

    rows: int
    precision: float | None  # the part of the rows taken to be this class that are
    recall: float | None  # the part of this class's rows that are taken to be it
    f1: float | None  # the harmonic mean of both


class MistakenRow(NamedTuple):
    """A MistakenRow is taken to be another class than its own, with this score."""

    row: int
    true: int
    predicted: int
    score: float


class Confusion:
    """A Confusion compares the labels of rows with what a network takes them to be.

    rows: the numbers of the rows in their split. labels: (rows,). outputs: the network's, (rows, units).
    `counts` (classes, classes): how many rows of a class (first axis) are taken to be a class (second axis).
    """

    def __init__(self, answers: Answers, rows: Array, labels: Array, outputs: Array):
        self.names, self._answers = answers.classes, answers
        self.rows, self.labels, self.predicted = rows, labels, answers.labels(outputs)
        scores = answers.scores(outputs)
        if scores.shape[1] == len(self.names):
            scores = np.take_along_axis(scores, self.predicted[:, np.newaxis], axis=1)
        self.scores = scores[:, 0]
        self.counts = np.zeros((len(self.names), len(self.names)), np.int64)
        np.add.at(self.counts, (labels, self.predicted), 1)

    def figures(self) -> list[Figures]:
        """Return the figures of each class."""
        found = []
        for k in range(len(self.names)):
            right, rows, taken = (
                int(each) for each in (self.counts[k, k], self.counts[k].sum(), self.counts[:, k].sum())
            )
            precision, recall = (right / taken if taken else None), (right / rows if rows else None)
            found.append(Figures(rows, precision, recall, 2 * right / (taken + rows) if taken + rows else None))
        return found

    def mistakes(self, most: int) -> list[MistakenRow]:
        """Return the mistakes with the highest scores, the worst first."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        worst = wrong[np.argsort(-self.scores[wrong], kind="stable")][:most]
        return [
            MistakenRow(int(self.rows[i]), int(self.labels[i]), int(self.predicted[i]), float(self.scores[i]))
            for i in worst
        ]

    def text(self) -> str:
        """Write for people: the matrix if it is small, the pairs that are confused most, figures, the worst rows."""
        names = [shortened(readable(name)) for name in self.names]
        parts = [self._matrix(names)] if len(names) <= SHOWN else []
        parts.append(self._pairs(names))
        header = ("class", "rows", "precision", "recall", "F1")
        table = [
            (name, f"{each.rows:,}", *map(_percent, each[1:])) for name, each in zip(names, self.figures(), strict=True)
        ]
        parts.append(aligned(header, table, ("class",)) + "\n")
        worst = [f"row {each.row:,}: {self._told(each, names)}" for each in self.mistakes(WORST)]
        if worst:
            parts.append("the most confident mistakes\n" + "".join(f"  {line}\n" for line in worst))
        return "\n".join(part for part in parts if part)

    def _told(self, mistake: MistakenRow, names: Sequence[str], between: str = " taken to be ") -> str:
        score = f"{100 * mistake.score:.1f} %" if self._answers.tells_probabilities else f"{mistake.score:.3g}"
        return f"{names[mistake.true]}{between}{names[mistake.predicted]} ({score})"

    def _matrix(self, names: Sequence[str]) -> str:
        """Write the matrix: a line for each class, a column for what its rows are taken to be."""
        cells = [[f"{count}" if count else "." for count in row] for row in self.counts]
        heads = [name[:4] for name in names]
        side = max(map(len, names))
        widths = [max(len(head), *(len(row[k]) for row in cells)) for k, head in enumerate(heads)]
        lines = [" " * side + "  " + " ".join(head.rjust(width) for head, width in zip(heads, widths, strict=True))]
        for name, row in zip(names, cells, strict=True):
            lines.append(f"{name:<{side}}  " + " ".join(c.rjust(width) for c, width in zip(row, widths, strict=True)))
        return "\n".join(["true class in each line, and in columns what the network takes its rows to be", *lines, ""])

    def _pairs(self, names: Sequence[str]) -> str:
        """List the pairs of classes that are confused most."""
        off = self.counts.copy()
        np.fill_diagonal(off, 0)
        order = np.argsort(-off, axis=None, kind="stable")[:PAIRS]
        pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, off.shape), strict=True) if off[i, j]]
        told = [f"{names[i]} → {names[j]} {off[i, j]:,}" for i, j in pairs]
        return f"confused most (true → taken to be): {', '.join(told)}\n" if told else "no row is mistaken\n"

    # -- files --------------------------------------------------------------------------------------------------------

    def write(self, folder: Path, split: Split, title: str) -> list[str]:
        """Write the files of EVALUATION into a folder, the pictures of `split`'s worst rows among them where they are
        pictures. Returns the names of those that were written; removes the others. Raises OutputError."""
        texts = {
            "confusion.csv": _csv([["true \\ predicted", *self.names]], zip(self.names, *self.counts.T, strict=True)),
            "confusion.svg": matrix_drawing(self.counts, self.names, title),
            "classes.csv": _csv(
                [["class", "rows", "precision", "recall", "f1"]],
                ((name, *each) for name, each in zip(self.names, self.figures(), strict=True)),
            ),
            "predictions.csv": _csv(
                [["row", "true", "predicted", "probability" if self._answers.tells_probabilities else "output"]],
                (
                    (row, self.names[true], self.names[predicted], f"{score:.4f}")
                    for row, true, predicted, score in zip(
                        self.rows, self.labels, self.predicted, self.scores, strict=True
                    )
                ),
            ),
        }
        worst = self.mistakes(DRAWN)
        pictures = _pictures(split, [each.row for each in worst])
        if worst and pictures is not None:
            captions = [self._told(each, self.names, " → ") for each in worst]
            texts["mistakes.svg"] = pictures_drawing(pictures, captions, f"{title}: the most confident mistakes")
        for name in EVALUATION:
            with written(folder / name, "--output DIR"):
                folder.mkdir(parents=True, exist_ok=True)
                if name in texts:
                    write_whole(folder / name, texts[name])
                else:
                    (folder / name).unlink(missing_ok=True)
        return [*texts]


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.2f} %"


def _csv(header: Iterable[Iterable[Any]], rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([*header, *rows])
    return text.getvalue()


def _pictures(split: Split, rows: Sequence[int]) -> Array | None:
    """Return these rows as bytes (rows, height, width, channels) to be shown; None if they are no pictures."""
    if len(split.shape) != 3 or split.shape[-1] not in (1, 3) or not rows:
        return None
    inputs = split.inputs(has_room=lambda size: False)
    out = np.empty((len(rows), inputs.native_bytes), np.uint8)
    inputs.stored(np.array(rows, np.intp), out)
    values = out.view(inputs.native).reshape(len(rows), *split.shape).astype(np.float64)
    low, high = (0.0, 1 / split.scaling.unit) if split.dtype == BYTE else (values.min(), values.max())
    return np.rint(np.clip((values - low) * (255 / max(high - low, 1e-300)), 0, 255)).astype(np.uint8)
