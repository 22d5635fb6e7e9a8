"""The topology: which rank stands where in replicas of stages of rows x cols, the groups that communicate, and
layouts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, overload

from nettorrent_mpi.plan.blocks import Span, span
from nettorrent_mpi.plan.records import dataclass


@dataclass(frozen=True)
class LayerFacts:
    """Facts for planning about one weight layer with the layers that follow it."""

    name: str
    operations: float  # floating-point operations, forward and backward, of one row
    parameters: int  # trainable elements
    units: int  # neurons or filters: the most cols that can divide it
    inputs: int  # elements of one row that enter
    outputs: int  # elements of one row that leave
    matrix: tuple[int, int] = (0, 0)  # for a linear layer: inputs and neurons of its weights


@dataclass(frozen=True)
class Stage:
    """The weight layers first..stop-1, computed by a team of rows x cols ranks in each replica."""

    first: int
    stop: int
    rows: int
    cols: int

    @property
    def size(self) -> int:
        """The ranks of one team."""
        return self.rows * self.cols

    @property
    def layers(self) -> int:
        """The number of weight layers."""
        return self.stop - self.first


class Place(NamedTuple):
    """The position of a rank."""

    replica: int
    stage: int
    row: int
    col: int


@dataclass(frozen=True)
class RepeatedRange(Sequence[int]):
    """A RepeatedRange has the numbers of a range moved by each of several offsets, one after another. Like a range it
    takes the same memory for any number of ranks, and its hash does not visit them."""

    offsets: range
    each: range

    def __len__(self) -> int:
        return len(self.offsets) * len(self.each)

    def __iter__(self) -> Iterator[int]:
        return (offset + rank for offset in self.offsets for rank in self.each)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        repetition, place = divmod(places, len(self.each))
        return self.offsets[repetition] + self.each[place]

    def __contains__(self, rank: object) -> bool:
        return any(rank - offset in self.each for offset in self.offsets) if isinstance(rank, int) else False


def repeated(offsets: range, each: range) -> range | RepeatedRange:
    """Return the numbers of `each` moved by each offset: a range where they are evenly spaced, so that the same ranks
    are equal however they were found."""
    if len(offsets) == 1:
        return range(each.start + offsets[0], each.stop + offsets[0], each.step)
    if len(each) == 1:
        return range(each[0] + offsets.start, each[0] + offsets.stop, offsets.step)
    if offsets.step == each.step * len(each):
        return range(each.start + offsets[0], each[-1] + offsets[-1] + 1, each.step)
    return RepeatedRange(offsets, each)


def compact(ranks: Sequence[int]) -> Sequence[int]:
    """Return these ranks as a range where they ascend evenly, else as a tuple."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    found = range(ranks[0], ranks[-1] + 1, max(step, 1))
    return found if list(found) == list(ranks) else tuple(ranks)


@dataclass(frozen=True)
class Topology:
    """The topology of a run: `replicas` copies of the stages.

    Ranks count up over cols first, then rows, then stages, then replicas. Launchers put neighbouring ranks on the same
    node, so the ranks that communicate most are near: the cols of one row (several times in each layer and
    micro-batch), then the team, then the next stage (a link in each micro-batch), and last the other replicas (once per
    step).
    """

    replicas: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        assert self.replicas >= 1
        assert self.stages
        assert all(s.layers >= 1 and s.rows >= 1 and s.cols >= 1 for s in self.stages), self.stages
        assert [s.first for s in self.stages] == [0, *(s.stop for s in self.stages[:-1])], self.stages

    @cached_property
    def _offsets(self) -> list[int]:
        return [0, *accumulate(stage.size for stage in self.stages)]

    @property
    def _firsts(self) -> range:
        """The first rank of each replica."""
        return range(0, self.size, self._offsets[-1])

    @property
    def size(self) -> int:
        """The ranks of the run."""
        return self.replicas * self._offsets[-1]

    def place(self, rank: int) -> Place:
        """Return the position of `rank`."""
        assert 0 <= rank < self.size, f"rank {rank} of {self.size}"
        replica, inside = divmod(rank, self._offsets[-1])
        stage = bisect_right(self._offsets, inside) - 1
        return Place(replica, stage, *divmod(inside - self._offsets[stage], self.stages[stage].cols))

    def rank(self, replica: int, stage: int, row: int, col: int) -> int:
        """Return the rank at a position: the inverse of `place`."""
        return replica * self._offsets[-1] + self._offsets[stage] + row * self.stages[stage].cols + col

    def team(self, replica: int, stage: int) -> range:
        """Return the ranks of one stage in one replica, in the order row * cols + col."""
        first = self.rank(replica, stage, 0, 0)
        return range(first, first + self.stages[stage].size)

    def replica(self, replica: int) -> range:
        """Return all ranks of a replica."""
        return range(replica * self._offsets[-1], (replica + 1) * self._offsets[-1])

    def swarm(self, stage: int) -> Sequence[int]:
        """Return all ranks of a stage, over all replicas: replicas in order, each team in its order."""
        return repeated(self._firsts, self.team(0, stage))

    def peers(self, stage: int, row: int, col: int) -> range:
        """Return the ranks at the same position in every replica, among which weights are exchanged."""
        return range(self.rank(0, stage, row, col), self.size, self._offsets[-1])

    def row_group(self, replica: int, stage: int, col: int) -> range:
        """Return all rows of a team that hold the same neurons (col)."""
        return self.team(replica, stage)[col :: self.stages[stage].cols]

    def col_group(self, replica: int, stage: int, row: int) -> range:
        """Return all cols of a team that work on the same rows of the mini-batch."""
        cols = self.stages[stage].cols
        return self.team(replica, stage)[row * cols : (row + 1) * cols]

    def exact_group(self, stage: int, col: int) -> Sequence[int]:
        """Return all ranks that hold the same neurons, over replicas, then rows, whose gradients an exact exchange
        reduces."""
        return repeated(self._firsts, self.row_group(0, stage, col))

    def batch_rows(self, place: Place, batch_size: int, micro_batches: int, micro_batch: int) -> Span:
        """Return the rows of the mini-batch (0..batch_size-1) that this place has in a micro-batch; may be empty.

        A mini-batch is divided into micro-batches, each over the replicas, and that over the rows of the team, always
        by `span`; all cols of a row have the same rows.
        """
        cut = span(batch_size, micro_batches, micro_batch)
        mine = span(cut.size, self.replicas, place.replica)
        inner = span(mine.size, self.stages[place.stage].rows, place.row)
        start = cut.start + mine.start + inner.start
        return Span(start, start + inner.size)

    def describe(self, names: Sequence[str]) -> str:
        """Return the layout in one line, like "2 replicas x [conv2d1 3x1 | conv2d2..linear1 1x2]"; `names` are the
        weight layers'."""
        stages = " | ".join(
            (names[s.first] if s.layers == 1 else f"{names[s.first]}..{names[s.stop - 1]}") + f" {s.rows}x{s.cols}"
            for s in self.stages
        )
        return f"{self.replicas} replica{'s' if self.replicas > 1 else ''} x [{stages}]"
