"""The position of a run in its data, and the mini-batches that follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from nettorrent_mpi.comm.activity import NOW
from nettorrent_mpi.comm.world import World
from nettorrent_mpi.plan.errors import UserError
from nettorrent_mpi.torch.batching import RankPlace, RankSampler, Served, ServedRows


class Position:
    """A Position counts complete epochs, and in the present one the mini-batches that the loop has got, which it
    serves. `samples` are the rows of all ranks so far, where they are known; `weight` is that of the latest mini-batch.
    """

    def __init__(self, world: World, place: RankPlace, batches: ServedRows | None):
        """All ranks make one, with as many rows in their data. Raises a LaunchError on all of them otherwise."""
        if batches is not None:
            world.same("number of rows in its data", str(batches.rows))
        self._world, self._place, self._batches = world, place, batches
        self.epoch = self.batch = self.samples = 0
        self.weight = 1.0
        self._steps = self._epochs = 0  # of the run; 0: unknown

    @property
    def counts_rows(self) -> bool:
        """Whether `samples` are known: whether there are data that are divided."""
        return self._batches is not None

    def plan(self, epochs: int) -> None:
        """Take note of the length of the run."""
        self._epochs = epochs
        self._steps = epochs * (0 if self._batches is None else self._batches.steps or 0)

    def done(self, step: int) -> float:
        """Return the completed part of the run, from 0 to 1, as far as known."""
        whole, now = (self._steps, step) if self._steps else (self._epochs, self.epoch)
        return min(now / whole, 1.0) if whole else 0.0

    def next_epoch(self) -> None:
        """Go on with the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0

    def told(self) -> dict[str, int]:
        """Return what a checkpoint says of the position: an epoch that has no more mini-batches is complete."""
        epoch, batch = self.epoch, self.batch
        if self._batches is not None and batch == self._batches.steps:
            epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, "samples": self.samples}

    def take(self, told: Mapping[str, int]) -> None:
        """Go on from what `told` returned."""
        self.epoch, self.batch, self.samples = told["epoch"], told["batch"], told["samples"]

    def length(self, loader: Iterable[Any] | None) -> int:
        """Return the number of mini-batches of a whole epoch, the most that a rank has. All ranks call. Raises a
        UserError where it is unknown."""
        own = _length(loader) if loader is not None else None if self._batches is None else self._batches.steps
        lengths = [length for length in self._world.gather_objects(own) if length is not None]
        if len(lengths) < self._place.ranks:
            with self._world.agreement():
                raise UserError("the number of mini-batches is unknown: give a Dataset, or a loader that has a length")
        return max(lengths)

    def served(self, loader: Iterable[Any] | None) -> Iterator[Served]:
        """Yield the mini-batches that are left of the present epoch. All ranks call."""
        if loader is not None:
            found = self._of_loader(loader)
        elif self._batches is not None:
            found = self._batches.epoch(self.epoch, self.batch)
        else:
            raise UserError("parallelize has no data: give run.batches() the loader")
        begun = self.batch
        for each in found:
            self.batch += 1  # before the script's steps: a checkpoint among them comes after this mini-batch
            self.weight = each.weight
            self.samples += self._rows() if loader is None else 0
            yield each
        if loader is None and not begun and not self.batch:
            with self._world.agreement():
                raise UserError(
                    f"the data have no rows in epoch {self.epoch + 1}: __iter__ has to return a new iterator each time"
                )

    def _rows(self) -> int:
        assert self._batches is not None
        sampler = self._batches.sampler
        return self._batches.batch_size if sampler is None else sampler.size(self.batch - 1)

    def _of_loader(self, loader: Iterable[Any]) -> Iterator[Served]:
        sampler = getattr(loader, "batch_sampler", None)
        if isinstance(sampler, RankSampler):
            sampler.set_epoch(self.epoch)
            sampler.first = self.batch
            for number, batch in enumerate(loader, self.batch):
                yield Served(batch, sampler.weight(number))
            return
        with NOW.during("the lengths of loaders"):
            lengths = self._world.gather_objects(_length(loader))
        known = None if None in lengths else [length for length in lengths if length is not None]
        source, last, number = iter(loader), None, 0
        while known is None or number < max(known):
            batch = next(source, None)
            has = self._who_has(batch is not None) if known is None else [length > number for length in known]
            if not any(has):
                return
            if batch is None and last is None:
                raise UserError("this rank's loader has no mini-batch: every rank needs at least one")
            last, number = (last if batch is None else batch), number + 1
            alike = has[slice(*self._place.holders)]  # the ranks that average exactly
            yield Served(last, 0.0 if batch is None else len(alike) / sum(alike))

    def _who_has(self, own: bool) -> list[bool]:
        """Return which ranks have another mini-batch."""
        found = np.zeros(self._place.ranks, np.int32)
        found[self._place.rank] = own
        with NOW.during("the next mini-batch"):
            self._world.all_reduce(found)
        return [bool(each) for each in found]


class EpochLoader:
    """An EpochLoader has the mini-batches that `batches` yields, for a loop that is not the script's own: each
    iteration is an epoch, the first one the present one. It has a length: a loop that fetched one mini-batch ahead, to
    learn whether it is the last, would weigh gradients by the next one."""

    def __init__(self, position: Position, batches: Callable[[], Iterator[Any]], length: int):
        self._position, self._batches, self._length, self._begun = position, batches, length, False

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        if self._begun:
            self._position.next_epoch()
        for batch in self._batches():
            self._begun = True
            yield batch


def _length(loader: Iterable[Any]) -> int | None:
    """Return the number of mini-batches of a loader; None if it does not tell."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
