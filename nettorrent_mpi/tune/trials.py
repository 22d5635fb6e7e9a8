"""A trial of a study: what was tried, what came of it, when it is ended early, and how it is told of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from statistics import median
from typing import Any, Self

from nettorrent_mpi.config.search_file import MedianRule
from nettorrent_mpi.config.search_space import Label, Point
from nettorrent_mpi.data.files import parsed
from nettorrent_mpi.plan.records import dataclass

# States: it runs, or was left by a job that has ended; it has its accuracy; the median rule has ended it; its loss was
# not finite or grew without bounds; its configuration or layout is not possible.
RUNNING, COMPLETE, PRUNED, DIVERGED, FAILED = "running", "complete", "pruned", "diverged", "failed"

Accuracies = Sequence[tuple[float, float]]  # (epoch, validation accuracy) of each evaluation so far


@dataclass(frozen=True)
class Trial:
    """A Trial as its file trial.json has it. `accuracy` is that of its network, model.h5, on the validation
    rows."""

    number: int
    point: Mapping[str, Label]
    job: str  # the MPI run that has trained it, or does
    group: int  # of its ranks
    groups: int
    ranks: int  # of this group
    began: float  # seconds since 1970
    state: str = RUNNING
    accuracy: float | None = None
    test_accuracy: float | None = None  # for information: nothing is chosen by it
    accuracies: Accuracies = ()
    epochs: float = 0.0  # trained
    ended: float | None = None
    reason: str | None = None  # the error of one that has failed or diverged, in one line

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.state != RUNNING

    @property
    def seconds(self) -> float:
        """The seconds from its latest begin to its end."""
        return (self.ended or self.began) - self.began

    def text(self) -> str:
        """Return the text of trial.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, text: bytes) -> Self | None:
        """Read the text of trial.json; None if it is damaged."""
        try:
            given: dict[str, Any] = parsed(text)
            given["accuracies"] = [(float(epoch), float(accuracy)) for epoch, accuracy in given["accuracies"]]
            known = {each.name for each in fields(cls)}
            return cls(**{name: value for name, value in given.items() if name in known})
        except (ValueError, TypeError, KeyError):
            return None


def prunes(rule: MedianRule, accuracies: Accuracies, others: Sequence[Trial]) -> bool:
    """Whether a trial with these accuracies is to be ended: its best one so far is below the median of the complete
    trials' after as many epochs. The rule is that of Optuna's MedianPruner."""
    complete = [trial for trial in others if trial.state == COMPLETE]
    epoch = accuracies[-1][0]
    if len(complete) < rule.startup_trials or epoch <= rule.warmup_epochs:
        return False
    there = [value for trial in complete for at, value in trial.accuracies if at == epoch]
    return bool(there) and max(value for _, value in accuracies) < median(there)


def value_in_words(value: Any) -> str:
    """Write the value of a parameter."""
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)


def point_in_words(point: Point) -> str:
    """Write a point as `layers=2 lr=0.001`, with the last word of each setting."""
    return " ".join(f"{short(name, point)}={value_in_words(value)}" for name, value in point.items())


def short(name: str, among: Mapping[str, Any]) -> str:
    """Return the end of a setting's name that no other parameter has."""
    words = name.split(".")
    ends = (".".join(words[-count:]) for count in range(1, len(words) + 1))
    alike = [each for each in among if each != name]
    return next((end for end in ends if not any(each == end or each.endswith(f".{end}") for each in alike)), name)
