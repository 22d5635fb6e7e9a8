"""The topology: which rank stands where in replicas of stages of rows x cols, the groups that communicate, and
layouts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from nettorrent_mpi.plan.blocks import Span, span


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

    def team(self, replica: int, stage: int) -> list[int]:
        """Return the ranks of one stage in one replica, in the order row * cols + col."""
        first = self.rank(replica, stage, 0, 0)
        return list(range(first, first + self.stages[stage].size))

    def replica(self, replica: int) -> list[int]:
        """Return all ranks of a replica."""
        first = self.rank(replica, 0, 0, 0)
        return list(range(first, first + self._offsets[-1]))

    def swarm(self, stage: int) -> list[int]:
        """Return all ranks of a stage, over all replicas: replicas in order, each team in its order."""
        return [rank for replica in range(self.replicas) for rank in self.team(replica, stage)]

    def peers(self, stage: int, row: int, col: int) -> list[int]:
        """Return the ranks at the same position in every replica, among which weights are exchanged."""
        return [self.rank(replica, stage, row, col) for replica in range(self.replicas)]

    def row_group(self, replica: int, stage: int, col: int) -> list[int]:
        """Return all rows of a team that hold the same neurons (col)."""
        return [self.rank(replica, stage, row, col) for row in range(self.stages[stage].rows)]

    def col_group(self, replica: int, stage: int, row: int) -> list[int]:
        """Return all cols of a team that work on the same rows of the mini-batch."""
        return [self.rank(replica, stage, row, col) for col in range(self.stages[stage].cols)]

    def exact_group(self, stage: int, col: int) -> list[int]:
        """Return all ranks that hold the same neurons, over replicas, then rows, whose gradients an exact exchange
        reduces."""
        return [rank for replica in range(self.replicas) for rank in self.row_group(replica, stage, col)]

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
