"""The evaluation of one network, or of replicas that differ: loss and accuracy on test and validation rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.plan.scores import Scores, best_of


@dataclass(frozen=True)
class Evaluation:
    """An Evaluation holds the scores on the test set and on the validation rows; None where there are none.

    Where replicas train apart they are those of the best one, `best_replica`, or (gossip) of their average.
    """

    test: Scores | None
    validation: Scores | None
    best_replica: int | None = None

    @property
    def deciding(self) -> Scores | None:
        """The scores that decide when training stops: those on the validation rows, where there are any."""
        return self.validation or self.test

    def figures(self) -> dict[str, Any]:
        """Return the four figures under their names in metrics.jsonl."""
        found: dict[str, Any] = {}
        for name, scores in (("test", self.test), ("validation", self.validation)):
            found[f"{name}_loss"], found[f"{name}_accuracy"] = scores or (None, None)
        return found


class Evaluator:
    """An Evaluator evaluates the network that a training has produced. All ranks call its methods alike, at rest.

    With gossip that network is the replicas' average; with replicas that stay apart, the best one. The best is chosen
    on the validation rows, or by the training loss where there are none: never on the test set.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._metric, self._averages = engine.exchange.metric, engine.exchange.averages
        self.losses: Sequence[float] = ()  # the replicas' latest training losses
        self.unified = engine.exchange.count == 1  # whether all replicas hold the same weights at present

    @contextmanager
    def network(self) -> Iterator[int | None]:
        """Give every replica the weights of that network inside the `with` block; yields the best replica's number
        where it is that one."""
        best = None if self.unified or self._averages else self._best()[0]
        if self.unified:
            yield None
            return
        with self._engine.exchange.shown(best):
            yield best

    def evaluate(self) -> Evaluation:
        """Return the scores of that network."""
        engine = self._engine
        with self.network() as best:
            validation, test = engine.evaluate_validation(), engine.evaluate_test()
        return Evaluation(test, validation, best)

    def unify(self) -> dict[str, Any]:
        """Make all replicas that network for good, and return the scores of their average and of the best of them,
        under their names in summary.json; nothing where there is only one network."""
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
        """Choose the best replica; return its number and the criterion."""
        found = self._engine.compare_replicas()
        if found is not None:
            return best_of(found, self._metric), self._metric
        if not self.losses:  # no training loss yet: no replica is known to be better
            return 0, "train_loss"
        return best_of([Scores(loss, None) for loss in self.losses], "train_loss"), "train_loss"
