"""The rows of each mini-batch are divided over the ranks, so that together they train on what one rank would."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from nettorrent_mpi.data.sampler import Sampler
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.plan.blocks import Span, span
from nettorrent_mpi.plan.errors import UserError


class RankPlace(NamedTuple):
    """A rank's place: its number among all ranks, and the ranks that have its replica, which average exactly."""

    rank: int
    ranks: int
    holders: Span

    def share(self, rows: int) -> Span:
        """Return which of a mini-batch's rows are this rank's."""
        return span(rows, self.ranks, self.rank)

    def weight(self, rows: int) -> float:
        """Return the weight of this rank's mean over its rows in the mean of its replica's ranks, 1 for an equal
        share."""
        shares = [span(rows, self.ranks, rank).size for rank in range(*self.holders)]
        return span(rows, self.ranks, self.rank).size * len(shares) / sum(shares) if sum(shares) else 0.0


class RankSampler:
    """A RankSampler yields, mini-batch by mini-batch, the numbers of this rank's rows: a batch_sampler for DataLoader.

    Each epoch shuffles the rows by the seed alone, and all ranks together go through every row once; the last
    mini-batch may be smaller. A rank that has no row of it gets some that weigh nothing. `weights` are those of the
    present epoch's mini-batches.
    """

    def __init__(self, rows: int, batch_size: int, place: RankPlace, *, seed: int = 1, shuffle: bool = True):
        self._sampler = Sampler(rows, seed, 0.0, batch_size)
        self._place, self._shuffle, self._rows, self.batch_size = place, shuffle, rows, batch_size
        self.epoch = 0
        self.first = 0  # the mini-batch that the next iteration begins with

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, that the next iteration goes through from its first mini-batch on."""
        self.epoch, self.first = epoch, 0

    def __len__(self) -> int:
        return self._sampler.steps_per_epoch

    def size(self, batch: int) -> int:
        """Return the number of rows that all ranks together have of a mini-batch."""
        return self._sampler.size(batch)

    def weight(self, batch: int) -> float:
        """Return the weight of this rank's rows of a mini-batch (`RankPlace.weight`)."""
        return self._place.weight(self.size(batch))

    def rows(self, batch: int) -> Array:
        """Return the numbers of this rank's rows of a mini-batch; of one that has fewer rows than there are ranks, as
        many as the first rank has."""
        order = self._sampler.order(self.epoch) if self._shuffle else np.arange(self._rows)
        start = batch * self.batch_size
        share = self._place.share(self.size(batch))
        if not share.size:
            share = span(self.size(batch), self._place.ranks, 0)
        found: Array = order[start + share.start : start + share.stop]
        return found

    def __iter__(self) -> Iterator[list[int]]:
        first, self.first = self.first, 0
        for batch in range(first, len(self)):
            yield self.rows(batch).tolist()


class Served(NamedTuple):
    """A mini-batch as this rank gets it: what the script's loop takes, and its weight."""

    batch: Any
    weight: float


class ServedRows:
    """ServedRows divide a data set's mini-batches over the ranks, and serve one rank's part epoch by epoch."""

    def __init__(
        self, data: Any, batch_size: int, place: RankPlace, *, seed: int, shuffle: bool, options: dict[str, Any]
    ):
        """`data`: a tensor or array, or a tuple of them with as many rows each; a Dataset, or a list of rows; an
        IterableDataset, of which every rank reads all rows, in its own order. `options` are DataLoader's, for data
        sets. Raises UserErrors."""
        self._place, self.batch_size = place, batch_size
        self.rows: int | None = None  # of the data; None: unknown
        self.sampler: RankSampler | None = None
        self._tensors: list[torch.Tensor] | None = None
        self._single = isinstance(data, torch.Tensor | np.ndarray)
        if isinstance(data, IterableDataset):
            self._collate: Callable[[Any], Any] = options.get("collate_fn") or default_collate
            others = {name: value for name, value in options.items() if name != "collate_fn"}
            self._stream = _loader(data, others, batch_size=None) if others else data
            return
        if self._single or isinstance(data, tuple):
            if options:
                raise UserError(f"{next(iter(options))} is for a Dataset, and the data are tensors: leave it out")
            self._tensors = _tensors([data] if self._single else list(data))
        rows = len(_checked(data) if self._tensors is None else self._tensors[0])
        if not rows:
            raise UserError("the data have no rows: a Dataset or tensors with at least one are needed")
        self.rows, self.sampler = rows, RankSampler(rows, batch_size, place, seed=seed, shuffle=shuffle)
        if self._tensors is None:
            self._loader = _loader(data, options, batch_sampler=self.sampler)

    @property
    def steps(self) -> int | None:
        """The number of mini-batches of an epoch; None if it is unknown."""
        return None if self.sampler is None else len(self.sampler)

    def epoch(self, number: int, first: int = 0) -> Iterator[Served]:
        """Yield the mini-batches of an epoch, from the `first` on."""
        if self.sampler is None:
            yield from self._of_stream(first)
            return
        self.sampler.set_epoch(number)
        self.sampler.first = first
        if self._tensors is None:
            for batch, served in enumerate(self._loader, first):
                yield Served(served, self.sampler.weight(batch))
            return
        for batch in range(first, len(self.sampler)):
            chosen = torch.tensor(self.sampler.rows(batch))  # a copy: the order is read-only
            parts = tuple(tensor[chosen] for tensor in self._tensors)
            yield Served(parts[0] if self._single else parts, self.sampler.weight(batch))

    def _of_stream(self, first: int) -> Iterator[Served]:
        for number, whole in enumerate(_cut(iter(self._stream), self.batch_size)):
            if number < first:
                continue
            share = self._place.share(len(whole))
            if not share.size:
                share = span(len(whole), self._place.ranks, 0)
            yield Served(self._collate(whole[slice(*share)]), self._place.weight(len(whole)))


def serve(
    data: Any, batch_size: Any, place: RankPlace, *, seed: int, shuffle: bool, options: dict[str, Any]
) -> ServedRows | None:
    """Return the data that are to be divided over the ranks, served to this one; None where there are none. Raises
    UserErrors for them, for `batch_size` and for `options`."""
    _check_options(options)
    _check_batch_size(batch_size, needed=data is not None)
    if data is not None:
        return ServedRows(data, batch_size, place, seed=seed, shuffle=shuffle, options=options)
    if options:
        raise UserError(f"{next(iter(options))} is for data that parallelize divides, and there are none")
    return None


def _check_batch_size(batch_size: Any, *, needed: bool) -> None:
    """Raise a UserError unless the number of rows of a mini-batch is one."""
    if batch_size is None and needed:
        raise UserError("batch_size is missing: the rows of a mini-batch, of all ranks together")
    if batch_size is not None and (not isinstance(batch_size, Integral) or batch_size < 1):
        raise UserError(f"batch_size is {batch_size!r}, but has to be a whole number of at least 1")


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise a UserError for an option that DataLoader does not know, or that is not the script's to choose."""
    known = list(inspect.signature(DataLoader.__init__).parameters)[2:]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(
                name, [*known, "exchange", "replica_size", "batch_size", "seed", "comm"], 1
            )
            told = f": did you mean {near[0]}?" if near else f"; DataLoader's are {', '.join(known)}"
            raise UserError(f"{name} is an option neither of parallelize nor of DataLoader{told}")
        if name in ("sampler", "batch_sampler", "drop_last"):
            raise UserError(
                f"{name} is not for data that parallelize divides, which trains on every row: leave it out, or give "
                "None as the data and run.batches() a loader of your own"
            )


def _loader(data: Any, options: Mapping[str, Any], **chosen: Any) -> DataLoader[Any]:
    """Make the DataLoader. Raises a UserError for values of options that it does not take."""
    try:
        return DataLoader(data, **chosen, **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"DataLoader does not take {', '.join(options)} as they are: {error}") from None


def _checked(data: Any) -> Any:
    """Return data that are rows to be chosen from by their numbers. Raises a UserError for others."""
    if isinstance(data, list) and data and all(isinstance(each, torch.Tensor | np.ndarray) for each in data):
        raise UserError(
            f"the data are a list of {len(data)} tensors: give a tuple (x, y) of tensors that have all rows, or a "
            "Dataset, as TensorDataset(x, y)"
        )
    wrong = isinstance(data, str | bytes | Mapping | DataLoader)
    if wrong or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise UserError(
            f"the data are a {type(data).__name__}: give a tuple of tensors (x, y), a Dataset, an IterableDataset, "
            "or None with a loader of your own"
        )
    return data


def _cut(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while whole := list(islice(rows, size)):
        yield whole


def _tensors(data: list[Any]) -> list[torch.Tensor]:
    try:
        tensors = [torch.as_tensor(each) for each in data]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the data are no tensors ({error}): give a tuple of tensors (x, y), or a Dataset") from None
    if not tensors or any(not tensor.dim() for tensor in tensors):
        raise UserError("the data are no tensors with rows: give a tuple of tensors (x, y)")
    counts = [len(tensor) for tensor in tensors]
    if len(set(counts)) > 1:
        raise UserError(f"the tensors have {' and '.join(map(str, counts))} rows: give as many of each")
    return tensors
