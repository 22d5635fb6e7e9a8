"""The work of a step, or of an evaluation, that a pipeline does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.engine.batches import Batches
from nettorrent_mpi.plan.actions import Action


class Work(NamedTuple):
    """A Work is a list of actions to execute for the present mini-batch of `batches`, cut into `micro_batches`
    micro-batches.

    `step` counts from 0; `first` says that the pipeline was empty before. With `outputs` nothing is scored: the last
    stage writes its rows of the network's outputs there.
    """

    actions: Sequence[Action]
    batches: Batches
    pieces: int
    step: int
    training: bool = True
    rate: float = 0.0
    first: bool = True
    outputs: Array | None = None

    @property
    def rows(self) -> int:
        """Return the rows of the mini-batch, over all replicas."""
        return self.batches.batch_size(0)
