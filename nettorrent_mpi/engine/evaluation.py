"""Evaluates one network, or replicas that differ: loss and accuracy on test and validation rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.plan.scores import Scores, best_of


@dataclass(frozen=True)
class Evaluation:
    """An Evaluation holds the scores of the test set and of the validation rows; None where there are none.

    Of replicas that train apart it is of the best one, `best_replica`, or (gossip) of their average.
    """

    test: Scores | None
    validation: Scores | None
    best_replica: int | None = None

    @property
    def deciding(self) -> Scores | None:
        """The scores that decide when a training stops: those of the validation rows, where there are any."""
        return self.validation or self.test

    def figures(self) -> dict[str, Any]:
        """The four figures by their names in metrics.jsonl."""
        found: dict[str, Any] = {}
        for name, scores in (("test", self.test), ("validation", self.validation)):
            found[f"{name}_loss"], found[f"{name}_accuracy"] = scores or (None, None)
        return found


class Evaluator:
    """Evaluates the network that a training has come to. All ranks call alike, at rest.

    Of replicas that gossip that network is their average; of those that do not, the best one. The best is chosen on
    the validation rows, or by the training loss where there are none: never on the test set.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._metric, self._averages = engine.exchange.metric, engine.exchange.averages
        self.losses: Sequence[float] = ()  # the replicas' latest training losses
        self.unified = engine.exchange.count == 1  # whether all replicas hold the same weights at present

    @contextmanager
    def network(self) -> Iterator[int | None]:
        """Inside, every replica holds the network that the training has come to; gives the best replica's number
        where it is that one."""
        best = None if self.unified or self._averages else self._best()[0]
        if self.unified:
            yield None
            return
        with self._engine.exchange.shown(best):
            yield best

    def evaluate(self) -> Evaluation:
        """Compute the scores of that network."""
        engine = self._engine
        with self.network() as best:
            validation, test = engine.evaluate_validation(), engine.evaluate_test()
        return Evaluation(test, validation, best)

    def unify(self) -> dict[str, Any]:
        """Make all replicas that network, for good; gives the scores of their average and of the best of them, by
        their names in summary.json. Nothing where there is only one network."""
        engine = self._engine
        if self.unified:
            return {}
        best, chosen_by = self._best()
        found = {}
        for name, which in (("average", None), ("best_replica", best)):
            with engine.exchange.shown(which):
                test = engine.evaluate_test()
                found[name] = Evaluation(test, engine.evaluate_validation()).figures()
        found["best_replica"] |= {"replica": best, "chosen_by": chosen_by}
        engine.exchange.become(None if self._averages else best)
        self.unified = True
        final = found["average" if self._averages else "best_replica"]
        return {"test_accuracy": final["test_accuracy"], "test_loss": final["test_loss"], **found}

    def _best(self) -> tuple[int, str]:
        """Choose the best replica; returns its number and what it was chosen by."""
        found = self._engine.compare_replicas()
        if found is not None:
            return best_of(found, self._metric), self._metric
        if not self.losses:  # nothing was trained, or nothing was left to do: all are as good as known
            return 0, "train_loss"
        return best_of([Scores(loss, None) for loss in self.losses], "train_loss"), "train_loss"
