"""Records tell of a training's progress; the lines of metrics.jsonl hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.plan.records import dataclass

MOST_STEPS = 1e15  # no training has so many: a larger number is damage
FIGURES = ("test_loss", "test_accuracy", "validation_loss", "validation_accuracy")


@dataclass(frozen=True)
class Record:
    """A Record describes the training after a step, over all ranks; `time` and `samples_per_second` are this rank's
    own.

    Ranks do not wait for each other between rests, so a record may arrive some steps late. Where `at_rest` is true, all
    ranks have stopped at that step and may evaluate, save and predict.
    """

    step: int  # counted from 1
    epoch: float  # passes over the training rows so far
    samples: int  # training rows so far
    time: float  # seconds since the training began, those before a resume included
    train_loss: float  # mean over the rows since the record before
    learning_rate: float  # of this step, the exchange's factor included; in an asynchronous pipeline, of its last stage
    samples_per_second: float  # training rows over training time, without the first steps
    consensus_distance: float | None = None  # of replicas that differ from their mean, relative to it (r.m.s.)
    # Where there was an evaluation (`evaluated`), and there are such rows; accuracies are fractions.
    test_loss: float | None = None
    test_accuracy: float | None = None
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    ranks: Mapping[str, Any] | None = None  # seconds of each rank since the record before: `rank_seconds.line`
    best_replica: int | None = None  # of replicas that train apart, the one that was evaluated
    evaluated: bool = False
    at_rest: bool = False

    def line(self) -> dict[str, Any]:
        """Return the record as a line of metrics.jsonl, with the figures of an evaluation if there was one."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = FIGURES if self.evaluated else ()
        return {k: v for k, v in found.items() if (v is not None or k in kept) and k not in ("evaluated", "at_rest")}


def read_lines(content: bytes) -> tuple[list[tuple[bytes, dict[str, Any]]], int]:
    """Return the undamaged lines of a metrics.jsonl, each with what it says, and the number of the others."""
    found, damaged = [], 0
    for text in filter(None, content.split(b"\n")):
        try:
            told = parsed(text)
            step = told["step"]
            if isinstance(step, bool) or not (isinstance(step, int | float) and 0 <= step < MOST_STEPS):
                raise ValueError
            found.append((text, told))
        except (ValueError, TypeError, KeyError):
            damaged += 1
    return found, damaged
