"""What an exchange between replicas does at the end of a step and at rest; by itself it leaves them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from nettorrent_mpi.comm.group import Group
from nettorrent_mpi.device.arrays import Array
from nettorrent_mpi.exchange.replicas import Replicas
from nettorrent_mpi.plan.scores import Scores


class Exchange(Replicas):
    """The exchange of one rank with its peers; this class is the one of replicas that train apart.

    A step (they count from 1) ends with `before_update`, the optimizer's update of the shards, `after_update`. All
    ranks of all replicas call the same methods after the same steps.
    """

    # Lets messages move while this rank computes: to be called between actions and between layers.
    progress: Callable[[], None] | None = None
    # Whether `after_update` changes the shards, so that they can be all-gathered among their holders only then.
    changes_after_update: ClassVar[bool] = False
    # Whether a step waits for messages of peers, however late they are.
    waits_for_peers: bool = False
    # Whether `tell_loss` is to be called.
    wants_loss: bool = False
    # What of the replicas is evaluated and kept in the end: their average, or the best one by `metric`.
    averages: ClassVar[bool] = False
    metric: str = "validation_loss"

    def rate_scale(self, done: float, decay: float) -> float:
        """What the learning rate is multiplied by. `done` is the part of the run that is done, from 0 to 1; `decay`
        what the schedule has made of the learning rate, from 1 to 0."""
        return 1.0

    def next_rest(self, step: int) -> int | None:
        """The first step after `step` after which all ranks have to come to rest for `at_rest`; None: none."""
        return None

    def tell_loss(self, loss: float) -> None:
        """The latest mean training loss of this replica is `loss`."""

    def before_update(self, step: int) -> None:
        """Merge into the shards what peers have sent, before the optimizer's update."""

    def after_update(self, rate: float, step: int) -> None:
        """Come nearer to the peers, after the optimizer's update at this learning rate."""

    def at_rest(
        self, step: int, compare: Callable[[], list[Scores] | None], distance: float | None = None
    ) -> Scores | None:
        """Do what is due when all ranks rest after `step`; gives the best replica's scores if replicas were compared.

        `compare` evaluates each replica on the validation rows, of which all ranks get the scores; all of them call it.
        `distance` is the replicas' root mean square distance from their mean, relative to it, as far as it is known.
        """
        return None

    def memories(self) -> dict[str, list[Array]]:
        """What a checkpoint has to hold besides parameters and optimizer state: by name an array like each of the
        shards' parameters, which a restored run writes. Settled."""
        return {}

    def recall(self, step: int) -> None:
        """The run goes on after `step`: parameters and `memories` were restored, or all replicas are the same."""

    def figures(self, ranks: Group) -> dict[str, Any]:
        """What the members of `ranks` did on average, for people. All of them call."""
        return {}

    def close(self) -> None:
        """Free all requests. All peers call, settled."""


def next_multiple(step: int, every: int) -> int:
    """The first multiple of `every` after `step`."""
    return (step // every + 1) * every
