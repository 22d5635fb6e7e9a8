"""The function `parallelize` makes a PyTorch training loop run on all ranks of an MPI program."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.config.sections import WatchdogTimes
from nettorrent_mpi.data.storage import replacing
from nettorrent_mpi.engine.run_files import written
from nettorrent_mpi.plan.errors import UserError
from nettorrent_mpi.plan.exchange_specs import Elite
from nettorrent_mpi.plan.specs import Spec
from nettorrent_mpi.torch.batching import serve
from nettorrent_mpi.torch.models import number_of
from nettorrent_mpi.torch.position import EpochLoader, Position
from nettorrent_mpi.torch.run_ranks import TIMES, RunRanks, world_of
from nettorrent_mpi.torch.shared_model import SharedModel
from nettorrent_mpi.torch.training_state import TrainingState


def parallelize(
    data: Any,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    batch_size: int | None = None,
    exchange: str | Mapping[str, Any] | Spec = "allreduce",
    replica_size: int | None = None,
    shuffle: bool = True,
    seed: int = 1,
    watchdog: str | Mapping[str, Any] | WatchdogTimes = TIMES,
    comm: Any = None,
    **loading: Any,
) -> ParallelRun:
    """Train `model` by `optimizer` on all ranks; both stay the script's objects, and the loop is the script's own.

    All ranks call with the same arguments, after the model is on its device and the optimizer is made. Every rank
    starts with rank 0's parameters and buffers. In a process that no launcher started this is the plain training.

    data: tensors (x, y), a Dataset, an IterableDataset (of which every rank reads all rows, in its own order), or None:
    the script has a loader of its own, different on each rank.
    batch_size: the rows of a mini-batch, of all ranks together; with None as `data` it is not needed.
    exchange: how replicas agree, as in a configuration: "allreduce" (exact: gradients are averaged), "gossip", "elite",
    "none", or with options {"gossip": {"every": 2}}.
    replica_size: the number of ranks that have one replica and average exactly, while their replica exchanges with the
    others; by default 1, with "allreduce" all.
    watchdog: seconds without advance of a rank until a table on standard error shows what all do, and until the run
    ends, by default {"report": 60, "end": 600}; or "none". The script's own code may take as long as it likes, also
    where others wait for it.
    loading: DataLoader's options for a data set, as num_workers or collate_fn.

    Raises UserErrors on all ranks alike.
    """
    with RunRanks.starting(world_of(comm), exchange, replica_size, watchdog) as ranks:
        with ranks.world.agreement():
            batches = serve(data, batch_size, ranks.place, seed=seed, shuffle=shuffle, options=loading)
        position = Position(ranks.world, ranks.place, batches)
        return ParallelRun(ranks, position, SharedModel(ranks, model, optimizer, position.done, seed=seed))


class ParallelRun:
    """A ParallelRun is a training that `parallelize` has spread over the ranks. All of them call its methods alike."""

    def __init__(self, ranks: RunRanks, position: Position, shared: SharedModel):
        self._ranks, self._position, self._shared = ranks, position, shared
        self.model, self.optimizer, self.place = shared.model, shared.optimizer, ranks.place
        self._quiet = False  # the present mini-batch has passes without messages, for a later step
        self._judged = 0  # samples at the latest comparison
        self._told = time.perf_counter(), 0  # at the latest report: time and samples

    # -- where this rank is -----------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self._ranks.world.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._ranks.world.size

    @property
    def epoch(self) -> int:
        """The epochs that are complete."""
        return self._position.epoch

    @property
    def batch(self) -> int:
        """The mini-batches of the present epoch that the loop has got."""
        return self._position.batch

    @property
    def step(self) -> int:
        """The optimizer's steps so far; fewer than on other ranks where this replica alone skips some."""
        return self._shared.step

    @property
    def replicas(self) -> int:
        """The number of replicas that have weights of their own."""
        return self._ranks.peers.size

    # -- the loop ---------------------------------------------------------------------------------------------------

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the numbers of the epochs that are left of `count`, from 0 or after those that a checkpoint has. At an
        epoch's end ranks that have run out of mini-batches take part in what the others still do."""
        self._position.plan(count)
        while self.epoch < count:
            yield self.epoch
            self._position.next_epoch()
            self._shared.end_epoch()

    def batches(self, loader: Iterable[Any] | None = None) -> Iterator[Any]:
        """Yield this rank's mini-batches of the present epoch: those of the data, or of `loader`, this rank's own.

        Loaders may yield other numbers of mini-batches on other ranks: a rank that has no more gets its last one again,
        which weighs nothing, until all are through. With a RankSampler as its batch_sampler, a loader's mini-batches
        are weighed by their rows; otherwise ranks weigh alike.

        Where replicas exchange, each mini-batch has an exchange, also one without an optimizer step, as where a
        gradient scaler skips it on some ranks; not one whose passes are inside `no_sync`.
        """
        gradients, replicas = self._shared.gradients, self._shared.replicas
        try:
            for served in self._position.served(loader):
                gradients.weight, self._quiet = served.weight, False
                before = 0 if replicas is None else replicas.step
                yield served.batch
                if replicas is not None and replicas.step == before and not self._quiet:
                    replicas.skip_step()
        finally:
            gradients.weight = 1.0

    def loader(self, loader: Iterable[Any] | None = None) -> EpochLoader:
        """Return the mini-batches of `batches` as a loader for a loop that is not the script's own, as Lightning's:
        each iteration is the next epoch. Their number has to be known."""
        return EpochLoader(self._position, lambda: self.batches(loader), self._position.length(loader))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Add up gradients of backward passes inside the `with` block on each rank; the next backward pass after it
        averages the sums. It saves messages where several passes make one optimizer step."""
        self._quiet = True
        with self._shared.gradients.paused():
            yield

    # -- what ranks tell each other -----------------------------------------------------------------------------------

    @NOW.during("a mean over ranks")
    def mean(self, value: Any) -> float:
        """Return the mean of a number over all ranks, weighed like the latest mini-batch."""
        number = number_of(value)
        self._shared.catch_up()
        weight = self._position.weight
        numbers = np.array([number * weight if weight else 0.0, weight])
        self._ranks.world.all_reduce(numbers)
        return float(numbers[0] / numbers[1]) if numbers[1] else float("nan")

    def report(self, loss: Any, **figures: Any) -> float:
        """Print a line with the mean of the loss, and of other figures, over all ranks; return the mean loss. The loss
        also tells exchanges that weigh replicas by it how well this one does."""
        self.tell_loss(loss)
        means = {"loss": self.mean(loss)} | {name: self.mean(value) for name, value in figures.items()}
        now, (then, samples) = time.perf_counter(), self._told
        self._told = now, self._position.samples
        if self.rank == 0:
            rate = (
                f"  {(self._position.samples - samples) / max(now - then, 1e-9):,.0f} rows/s"
                if self._position.samples
                else ""
            )
            words = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
            sys.stdout.write(f"epoch {self.epoch + 1}  step {self.step}  {words}{rate}\n")
            sys.stdout.flush()
        return means["loss"]

    def tell_loss(self, loss: Any) -> None:
        """Tell exchanges whose `mix` weighs replicas by their loss this one's latest; `report` does it, too."""
        replicas = self._shared.replicas
        if replicas is not None and replicas.wants_loss:
            replicas.tell_loss(number_of(loss))

    @NOW.during("comparing replicas")
    def judge(self, value: Any) -> int | None:
        """Compare the replicas by `value`, this one's validation loss, or its accuracy if the exchange's `metric` is
        validation_accuracy; losers take over the weights of winners. Return the best replica's number; None where the
        replicas have not yet trained on `every_samples` rows since the last comparison."""
        spec, samples = self._ranks.spec, self._position.samples
        if not isinstance(spec, Elite):
            raise UserError(f'judge is for exchange="elite", and this is {spec.kind}')
        if self._shared.replicas is None:
            return 0
        if self._position.counts_rows and samples - self._judged < spec.every_samples:
            return None
        self._judged = samples
        return self._shared.judge(number_of(value))

    def average(self) -> None:
        """Give all ranks the average of the replicas' parameters and of all ranks' buffers, for good."""
        self._shared.average()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give all ranks the average inside the `with` block, to evaluate or save it, and their own weights again
        afterwards."""
        with self._shared.averaged():
            yield

    @NOW.during("writing the model")
    def save(self, path: str | Path) -> None:
        """Write the averaged model's state_dict to a file, on rank 0: `torch.load(path, weights_only=True)` reads
        it."""
        path = Path(path)
        with self.averaged():
            state = self.model.state_dict()
            with self._ranks.world.agreement():
                if self.rank == 0:
                    with written(path), replacing(path) as part:
                        torch.save(state, part)

    @NOW.during("checkpoint")
    def checkpoint(self, folder: str | Path, *, keep: int = 2, **others: Any) -> Path:
        """Write the whole training state into a folder step-N in `folder`, where the `keep` newest stay: every replica,
        the optimizer, the exchange, the position in the data and the random states of each rank. `others` are objects
        with a state_dict, as a scheduler. Call it after an optimizer step. Raises OutputError."""
        self._shared.catch_up()
        step = max(self._ranks.world.gather_objects(self.step))
        rounds = step if self._shared.replicas is None else self._shared.replicas.step
        about = {"step": step, "rounds": rounds, "judged": self._judged, **self._position.told()}
        return self._state().save(Path(folder), step, about, others, keep)

    @NOW.during("reading a checkpoint")
    def resume(self, folder: str | Path, **others: Any) -> bool:
        """Go on from the newest undamaged checkpoint in `folder`, which may be of another number of ranks; return False
        if there is none. Replicas keep their own weights if there are as many as before, and start from their average
        otherwise. Raises DataError."""
        state = self._state()
        if not state.has_checkpoint(Path(folder)):
            return False
        about = state.restore(Path(folder), others)
        self._position.take(about)
        self._shared.step, self._judged = about["step"], about["judged"]
        self._told = (time.perf_counter(), self._position.samples)
        return True

    def _state(self) -> TrainingState:
        ranks, shared = self._ranks, self._shared
        return TrainingState(
            ranks.world, self.model, self.optimizer, shared.replicas, replica=ranks.replica, replicas=self.replicas
        )

    @NOW.during("the end")
    def close(self) -> None:
        """Let the model and optimizer go: they are plain PyTorch again. At the script's end this is not needed."""
        self._shared.close()
        self._ranks.close()
