"""What a run is worth: evaluations, of one network or of replicas that differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.plan.scores import Scores, best_of


class Judge:
    """Evaluates the network that a run has come to. All ranks call alike, at rest.

    Of replicas that gossip it is their average; of those that do not, the best one. The best is chosen on the
    validation rows, or by the training loss where there are none: never on the test set.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._metric, self._averages = engine.exchange.metric, engine.exchange.averages

    def now(self, losses: Sequence[float]) -> tuple[dict[str, Any], Scores | None]:
        """(the figures of a line of metrics.jsonl, the scores that stop_at looks at). `losses` are the replicas'
        training losses."""
        engine, best, more = self._engine, None, {}
        if engine.replicas.count > 1 and not self._averages:
            best, _ = self._best(losses)
            more = {"best_replica": best}
        with engine.replicas.shown(best):
            validation, test = engine.evaluate_validation(), engine.evaluate_test()
        figures = {**_figures("test", test), **_figures("validation", validation), **more}
        return figures, validation or test

    def end(self, losses: Sequence[float]) -> dict[str, Any]:
        """Of replicas that differ: what their average and the best of them are worth, for summary.json. Afterwards all
        replicas are the one or the other. Nothing where there is only one network."""
        engine = self._engine
        if engine.replicas.count == 1:
            return {}
        best, chosen_by = self._best(losses)
        found = {}
        for name, which in (("average", None), ("best_replica", best)):
            with engine.replicas.shown(which):
                found[name] = {
                    **_figures("test", engine.evaluate_test()), **_figures("validation", engine.evaluate_validation())
                }  # fmt: skip
        found["best_replica"] |= {"replica": best, "chosen_by": chosen_by}
        engine.replicas.become(None if self._averages else best)
        final = found["average" if self._averages else "best_replica"]
        return {"test_accuracy": final["test_accuracy"], "test_loss": final["test_loss"], **found}

    def _best(self, losses: Sequence[float]) -> tuple[int, str]:
        found = self._engine.compare_replicas()
        if found is not None:
            return best_of(found, self._metric), self._metric
        if not losses:  # nothing was trained, or nothing was left to do: all are as good as known
            return 0, "train_loss"
        return best_of([Scores(loss, None) for loss in losses], "train_loss"), "train_loss"


def _figures(name: str, scores: Scores | None) -> dict[str, Any]:
    loss, accuracy = (None, None) if scores is None else scores
    return {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
