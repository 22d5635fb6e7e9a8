"""An Evaluator evaluates one network, or replicas that differ: loss and accuracy on test and validation rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.data.rows import Split, private
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.batches import Batches
from nettorrent_mpi.engine.blame import check_finite
from nettorrent_mpi.engine.engine import Engine
from nettorrent_mpi.engine.metrics import SUMS
from nettorrent_mpi.plan.errors import warn
from nettorrent_mpi.plan.records import dataclass
from nettorrent_mpi.plan.scores import Scores, best_of, mean_scores

Part: TypeAlias = Literal["test", "validation"]
BAD, HOPELESS = 1e2, 1e6  # times the loss of outputs that are all 0


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
        """Return the scores that decide when training stops: those on the validation rows, where there are any."""
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
        self.diverged = False  # whether the training loss was hopeless at the latest evaluation
        self._warned = False

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

    @NOW.during("evaluation")
    def evaluate(self) -> Evaluation:
        """Return the scores of that network. Warns, once, if the training loss says that it has diverged."""
        self._judge_loss()
        with self.network() as best:
            validation, test = self.validation(), self.test()
        return Evaluation(test, validation, best)

    def _judge_loss(self) -> None:
        """Compare the training loss, of the best replica, with that of a network that always gives 0. Collective."""
        of_zeros = np.array([self._engine.loss_of_zeros])
        self._engine.wiring.everyone.all_reduce(of_zeros)
        loss, zeros = min(self.losses, default=0.0), float(of_zeros[0])
        self.diverged = loss > HOPELESS * zeros > 0
        if loss > BAD * zeros > 0 and not self._warned and self._engine.world.rank == 0:
            self._warned = True
            warn(
                f"the training loss is {loss:.3g}, {loss / zeros:.2g} times that of outputs that are all 0: the "
                "training diverges; lower the learning rate, add warm-up, clip the gradients (train.clip_norm), or "
                "scale the data"
            )

    def unify(self) -> dict[str, Any]:
        """Make all replicas that network for good, and return the scores of their average and of the best of them,
        under their names in summary.json; nothing where there is only one network."""
        exchange = self._engine.exchange
        if self.unified:
            return {}
        best, chosen_by = self._best()
        found = {}
        for name, which in (("average", None), ("best_replica", best)):
            with exchange.shown(which):
                found[name] = Evaluation(self.test(), self.validation()).figures()
        found["best_replica"] |= {"replica": best, "chosen_by": chosen_by}
        exchange.become(None if self._averages else best)
        self.unified = True
        final = found["average" if self._averages else "best_replica"]
        return {"test_accuracy": final["test_accuracy"], "test_loss": final["test_loss"], **found}

    # -- the replicas as they are at present --------------------------------------------------------------------------

    def test(self) -> Scores | None:
        """Return loss and accuracy on the test set, None without one. Collective over all ranks, at rest.

        The replicas divide the rows, so they have to be equal (`exchange.shown`).
        """
        test, batches = self._engine.dataset.test, self._engine.test
        return None if batches is None or test is None else self._scores(batches, np.arange(test.rows))[0]

    def validation(self) -> Scores | None:
        """Return loss and accuracy on the validation rows, None without any; otherwise like `test`."""
        rows = self._engine.sampler.validation_rows
        return self._scores(self._engine.train, rows)[0] if len(rows) else None

    def compare(self) -> list[Scores] | None:
        """Return each replica's loss and accuracy on all validation rows, None without any. Collective over all
        ranks."""
        rows = self._engine.sampler.validation_rows
        return self._scores(self._engine.train, rows, alone=True) if len(rows) else None

    def predict(self, split: Split) -> Array:
        """Return on all ranks the network's outputs (rows, *output_shape) for the rows of `split` (`unlabelled`).

        They are the same on all ranks. All ranks call, at rest. Where replicas differ, the outputs are those of the
        weights shown (`exchange.shown`).
        """
        batches = self._engine.batches(split, private, resident=False, name="predictions") if split.rows else None
        return self._outputs(batches, np.arange(split.rows))

    def outputs(self, part: Part) -> Array:
        """Return on all ranks the network's outputs (rows, *output_shape) for the rows of the test set, or for those
        held back for validation. Otherwise like `test`."""
        engine, rows = self._engine, self._engine.sampler.validation_rows
        if part == "validation":
            return self._outputs(engine.train, rows)
        assert engine.dataset.test is not None
        return self._outputs(engine.test, np.arange(engine.dataset.test.rows))

    def _outputs(self, batches: Batches | None, rows: Array) -> Array:
        engine = self._engine
        outputs = np.zeros((len(rows), *engine.network.output_shape), engine.state.weights_dtype)
        if batches is not None:
            engine.forward(batches, rows, outputs=outputs)
            engine.wiring.everyone.all_reduce(outputs)  # zeros where another rank computes the row
        return outputs

    def _scores(self, batches: Batches, rows: Array, *, alone: bool = False) -> list[Scores]:
        """Score all rows. With `alone` each replica scores all rows, and the result has the scores of each; otherwise
        the replicas divide them."""
        engine, metrics = self._engine, self._engine.metrics
        before = metrics.sums()
        metrics.take()
        engine.forward(batches, rows, alone=alone)
        sums = np.zeros((engine.topology.replicas, SUMS))
        sums[engine.place.replica if alone else 0] = metrics.take()
        engine.wiring.everyone.all_reduce(sums)
        metrics.restore(before)
        if not np.isfinite(sums).all():
            check_finite(engine, batches)
        return [mean_scores(*replica) for replica in (sums if alone else sums[:1])]

    def _best(self) -> tuple[int, str]:
        """Choose the best replica; return its number and the criterion."""
        found = self.compare()
        if found is not None:
            return best_of(found, self._metric), self._metric
        if not self.losses:  # no training loss yet: no replica is known to be better
            return 0, "train_loss"
        return best_of([Scores(loss, None) for loss in self.losses], "train_loss"), "train_loss"
