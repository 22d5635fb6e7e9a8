"""The interface of an exchange: what replicas do at the end of a step and at rest. The base class keeps them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.exchange.replicas import Replicas
from nettorrent_mpi.plan.scores import Scores


class Exchange(Replicas):
    """An Exchange makes one rank agree with its peers; this class itself is for replicas that train apart.

    A step (they count from 1) ends with `before_update`, the optimizer's update of the shards, `after_update`. All
    ranks of all replicas call the same methods after the same steps.
    """

    # Lets messages progress while this rank computes: called between actions and between layers.
    progress: Callable[[], None] | None = None
    # Whether `after_update` changes the shards, so that the holders can all-gather them only afterwards.
    changes_after_update: ClassVar[bool] = False
    # Whether a step waits for messages of peers without a deadline.
    waits_for_peers: bool = False
    # Whether `tell_loss` is to be called.
    wants_loss: bool = False
    # What is evaluated, and kept in the end: the replicas' average, or the best one by `metric`.
    averages: ClassVar[bool] = False
    metric: str = "validation_loss"

    @property
    def broken(self) -> bool:
        """Whether peers are lost, so that steps exchange nothing any more."""
        return False

    @property
    def measuring(self) -> bool:
        """Whether it measures the links and the steps to choose what it sends, which takes time of the first steps."""
        return False

    def rate_scale(self, done: float, decay: float) -> float:
        """Return the factor on the learning rate. `done` is the completed part of the run, from 0 to 1; `decay` what
        the schedule has made of the learning rate, from 1 to 0."""
        return 1.0

    def next_rest(self, step: int) -> int | None:
        """Return the next step, greater than `step`, after which all ranks have to rest for `at_rest`; None: never."""
        return None

    def is_collective(self, step: int) -> bool:
        """Whether peers do something all together at the end of this step, so that each waits for all others."""
        return False

    def tell_loss(self, loss: float) -> None:
        """Take note of this replica's latest mean training loss."""

    def before_update(self, step: int) -> None:
        """Merge into the shards what peers have sent, before the optimizer's update."""

    def after_update(self, rate: float, step: int) -> None:
        """Come nearer to the peers, after the optimizer's update at this learning rate."""

    def at_rest(
        self, step: int, compare: Callable[[], list[Scores] | None], distance: float | None = None
    ) -> Scores | None:
        """Do what is due when all ranks rest after `step`; return the best replica's scores if replicas were compared.

        `compare` evaluates each replica on the validation rows and returns the scores to all ranks; all of them call
        it. `distance` is the replicas' root mean square distance from their mean, relative to it, if known.
        """
        return None

    def memories(self) -> dict[str, list[Array]]:
        """Return what a checkpoint holds of this replica besides parameters and optimizer state: by name, arrays like
        the shards' parameters. A restored run writes into them and calls `recall`."""
        return {}

    def common(self) -> dict[str, list[Array]]:
        """Return those of the `memories` that are the same on all replicas, for runs with another number of them."""
        return {}

    def numbers(self) -> Array:
        """Return what a checkpoint holds besides arrays like the shards': float64 numbers that this rank alone keeps,
        as many as in any other run that is configured alike."""
        return np.empty(0)

    def take_numbers(self, numbers: Array) -> None:
        """Continue with these numbers, of the same rank of the same layout, before the arrays are restored. All peers
        call."""

    def recall(self, step: int) -> None:
        """Continue after `step`: parameters and `memories` were restored, or all replicas are equal."""

    def figures(self, ranks: Group) -> dict[str, Any]:
        """Return figures of the exchange, averaged over `ranks`, for reports. All of them call."""
        return {}

    def abandon(self) -> None:
        """Give up what is in flight, after the peers' group was revoked."""

    def close(self) -> None:
        """Free all requests. All peers call, settled."""


def next_multiple(step: int, every: int) -> int:
    """Return the first multiple of `every` after `step`."""
    return (step // every + 1) * every
